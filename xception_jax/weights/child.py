"""Parses one weight file in this process, under limits of its own, and writes what it found. `isolation` starts it.

The process starts without JAX, and without reading anything from the directory it is in. It sets its limits after all
imports and before the first byte of the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import sys
from typing import Any

from xception_jax.errors import StorageError, UserError
from xception_jax.weights import guard
from xception_jax.weights.content import ERROR, MEMORY, READY, encode
from xception_jax.weights.limits import Limits, address_space
from xception_jax.weights.parse import parse

_PR_SET_PDEATHSIG = 1
_ASSUMED_BYTES = 2 << 30  # of address space after the imports, on systems that do not tell


def main() -> None:
    """Waits for a byte on standard input, parses, and writes a JSON object to standard output.

    The only argument is a JSON object: descriptors of the file and of the buffer, the path for messages, the limits,
    and the number of the parent process.
    """
    task = json.loads(sys.argv[1])
    limits = Limits(**task["limits"])
    _end_with(task["parent"])
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print
    output.write(READY)
    output.flush()
    if not os.read(0, 1):  # the parent has ended
        return
    _limit(limits)
    with output:
        output.write(_answer(task, limits))


def _answer(task: dict[str, Any], limits: Limits) -> bytes:
    where = task["where"]

    def allocate(size: int) -> mmap.mmap:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(task["buffer"], 0, size)  # a mapping of missing space would crash
            else:
                os.ftruncate(task["buffer"], size)
        except OSError as error:
            what = f"there is no room for the {size:,} bytes of the tensors: {error}"
            is_limit = error.errno == errno.EFBIG
            fix = "raise the limit on file sizes, ulimit -f" if is_limit else "free some memory, or space in TMPDIR"
            raise StorageError(what, where, fix) from None
        return mmap.mmap(task["buffer"], size)

    try:
        with os.fdopen(task["file"], "rb") as file:
            return encode(parse(file, where, limits, allocate))
    except UserError as error:
        failure: UserError = error
    except MemoryError:
        return json.dumps({MEMORY: limits.memory}).encode()
    except Exception as error:  # whatever a library raises, the cause is the file
        failure = guard.damaged(where, error)
    if guard.is_memory_error(failure.what):
        return json.dumps({MEMORY: limits.memory}).encode()
    return json.dumps({ERROR: [type(failure).__name__, failure.what, failure.where, failure.fix]}).encode()


def _end_with(parent: int) -> None:
    """Ends this process with its parent where the system can do this, else at the latest with the limits of time."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def _limit(limits: Limits) -> None:
    """Sets limits that hold inside libraries too, and that nothing in this process can raise again."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for signum in (signal.SIGXCPU, signal.SIGALRM):
        signal.signal(signum, signal.SIG_DFL)
    signal.alarm(2 * limits.wall)  # `isolation` ends this process earlier, if it is still there
    _set(resource.RLIMIT_CORE, 0, 0)
    used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 1
    _set(resource.RLIMIT_CPU, used + limits.cpu, used + limits.cpu + 1)
    _set(resource.RLIMIT_FSIZE, limits.tensors + guard.SMALL, limits.tensors + guard.SMALL)
    if hasattr(resource, "RLIMIT_AS"):
        memory = (address_space() or _ASSUMED_BYTES) + limits.memory
        _set(resource.RLIMIT_AS, memory, memory)


def _set(kind: int, soft: int, hard: int) -> None:
    """Sets a limit, unless a stricter one is inherited. macOS refuses some limits."""
    inherited = [value for value in resource.getrlimit(kind) if value != resource.RLIM_INFINITY]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(kind, (min(soft, *inherited, soft), min(hard, *inherited, hard)))
