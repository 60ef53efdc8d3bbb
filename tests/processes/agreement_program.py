"""One of two processes that tell each other errors and values. Prints, in JSON, what each exchange gave."""

import errno
import json
import sys
import threading

from xception_jax.config import DistributedConfig
from xception_jax.errors import BadDataError, ConfigError, UserError
from xception_jax.processes import agree, connected, gather, together

coordinator, number = sys.argv[1], int(sys.argv[2])


def outcome(function):
    try:
        return function()
    except UserError as error:
        return [type(error).__name__, error.what, error.where, error.fix, error.is_printed_here]


def fails_on(failing):
    def prepare():
        if number in failing:
            raise BadDataError(f"damaged on {number}", "here", "mend it")
        return number

    return prepare


def stale_on_1():
    if number == 1:
        raise OSError(errno.ESTALE, "Stale file handle", "images")


def agree_on(name, values):
    return outcome(lambda: agree(name, "configs", values, ConfigError, "use one config"))


with connected(DistributedConfig("on", coordinator, 2, number, 60, 10), "work directory"):
    results = {
        "gather": gather("first", f"value {number}"),
        "nobody": outcome(lambda: together("nobody", fails_on(()))),
        "one": outcome(lambda: together("one", fails_on((1,)))),
        "both": outcome(lambda: together("both", fails_on((0, 1)))),
        "disk": outcome(lambda: together("disk", stale_on_1)),
        "equal": agree_on("equal", {"seed": 1, "batch": 2}),
        "different": agree_on("different", {"seed": number, "batch": 2}),
        "missing": agree_on("missing", {"seed": 1} if number else {}),
        "null": agree_on("null", {"seed": None} if number else {}),
    }
with connected(DistributedConfig("on", coordinator, 2, number, 60, 10), "work directory"):
    results["again"] = gather("first", f"second run {number}")
results["threads"] = [thread.name for thread in threading.enumerate() if thread.name == "peers"]
print(json.dumps(results))
