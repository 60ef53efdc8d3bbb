"""Holds a lease until standard input ends, and renews it for each line. Arguments: directory, seconds to take over."""

import sys

from xception_jax.errors import UserError
from xception_jax.storage import Patience, hold, open_store


def main() -> int:
    """Prints a line for each step, and returns the exit code."""
    place, take_over_after = sys.argv[1:]
    brisk = Patience(retries=3, first_delay=0.05, longest_delay=0.1, total=5)
    store = open_store(place, "--workdir", patience=brisk)
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        with hold(store, "lease", renew_every=0.2, take_over_after=float(take_over_after), report=print) as lease:
            print(f"held {lease.owner.nonce}", flush=True)
            for _ in sys.stdin:
                lease.renew()
                print("renewed", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("released", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
