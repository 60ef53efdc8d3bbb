"""Sets up and ends the process of a program: its standard streams, its signals, and an end that cannot hang.

Imports nothing slow: a program calls `enter` before all other imports.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from xception_jax.environment import SCRIPT, program
from xception_jax.errors import (
    BUG_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    OUT_OF_DEVICE_MEMORY,
    READER_LEFT_EXIT_CODE,
    SUCCESS_EXIT_CODE,
    ConfigError,
    DeviceMemoryError,
    InputMissingError,
    StorageError,
    UserError,
)
from xception_jax.names import one_line
from xception_jax.signals import SIGNALS, StopRequested, handle_signals

# The time that threads, data workers and libraries get to end after a success.
LEAVING_SECONDS = 5.0


class ReaderLeft(BaseException):
    """The program that reads the output has ended, as `head` does. Not an error, and nothing to catch on the way."""


class _Output(io.FileIO):
    """Standard output, which reports that it cannot be written once, and then swallows the rest."""

    _failed = False

    def write(self, data: Any) -> int:
        if not self._failed:
            try:
                return super().write(data)
            except BrokenPipeError:
                self._failed = True
                raise ReaderLeft from None
            except OSError as error:
                self._failed = True
                fix = "free some space, or send the output elsewhere"
                raise StorageError(f"the output cannot be written: {error.strerror}", "standard output", fix) from None
        return memoryview(data).nbytes


class _Messages(io.FileIO):
    """Standard error, which swallows what cannot be written: there is no place to complain about it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def run_program(main: Callable[[], int | None], *, resumable: bool) -> NoReturn:
    """Runs a program and ends its process with the exit code.

    Args:
      main: the program. It must import slow modules lazily, after streams and signal handlers are set up.
      resumable: whether SIGTERM and SIGINT end the program with code 75 instead of killing the process.
    """
    _open_streams()
    # Orbax logs each error with its traceback before raising it, and warns about files that it did not write.
    # `Checkpoints` raises everything that concerns the user, as a UserError.
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    if resumable:
        handle_signals()
    _leave(exit_code(main, unblock=SIGNALS))


def exit_code(main: Callable[[], int | None], unblock: tuple[signal.Signals, ...] = ()) -> int:
    """Returns the exit code of a program, after printing in three lines why it failed.

    Args:
      main: returns the exit code, or None for 0.
      unblock: signals to let through while `main` runs; they are blocked while a program restarts itself.
    """
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, unblock)
        code = main() or SUCCESS_EXIT_CODE
        _flush()
        return code
    except SystemExit as end:  # such as of --help
        return _exit_code_after(end)
    except ReaderLeft:
        return READER_LEFT_EXIT_CODE
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    except StopRequested as stop:
        return _report(stop.as_error("the start of the program"))
    except Exception as error:
        found = as_user_error(error)
        if found is not None:
            return _report(found)
        traceback.print_exc()
        return BUG_EXIT_CODE


def _exit_code_after(end: SystemExit) -> int:
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
        return BUG_EXIT_CODE
    return exit_code(lambda: end.code or 0)  # type: ignore[return-value, arg-type]


def as_user_error(error: Exception) -> UserError | None:
    """Returns a UserError, or the failure of a disk or of memory as one; None for a bug."""
    if isinstance(error, UserError):
        return error
    fix = "lower the batch size, or free some memory"
    if isinstance(error, MemoryError):
        return DeviceMemoryError("there is not enough memory", "this process", fix)
    if type(error).__name__ == "JaxRuntimeError" and OUT_OF_DEVICE_MEMORY in str(error):
        return DeviceMemoryError("there is not enough memory on a device", "this process", fix)
    if _is_missing_platform(error):
        what = f"JAX cannot use the platform in JAX_PLATFORMS: {one_line(error)[:200] or 'its plugin is missing'}"
        fix = "install what it needs, such as pip install '.[cuda12]', or unset JAX_PLATFORMS"
        return ConfigError(what, f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}", fix)
    if not isinstance(error, OSError):
        return None
    where = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    if error.errno == errno.ENAMETOOLONG:
        # Any path may be too long, and fails where it is first used.
        fix = "correct or shorten the path"
        return InputMissingError("a path is longer than the system allows", f"{where[:60]}...", fix)
    reason = error.strerror or str(error) or type(error).__name__
    fix = "free space there, or make it readable and writable; then run the same command again"
    return StorageError(f"a file cannot be read or written: {reason}", where or "the system", fix)


def _is_missing_platform(error: Exception) -> bool:
    """Returns whether JAX cannot use a platform that the user asks for. It has no error of its own for this."""
    if not isinstance(error, RuntimeError | AssertionError) or not os.environ.get("JAX_PLATFORMS"):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.endswith(os.path.join("jax", "_src", "xla_bridge.py"))


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _report(error: UserError) -> int:
    with contextlib.suppress(Exception, ReaderLeft):
        _flush()  # what was printed before belongs in front of the error
    if not error.is_printed_here:
        return error.exit_code
    with contextlib.suppress(OSError, ValueError):
        text = str(error).encode(errors="backslashreplace").decode()  # a name may hold bytes that are not UTF-8
        print(text.replace(f"{SCRIPT} ", f"{program()} "), file=sys.stderr)
    return error.exit_code


def _open_streams() -> None:
    """Opens closed streams, because the next file would get their numbers, and guards the writing ones."""
    # A standard output that is closed fails as it does in other programs: when it is written.
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, flags), number)  # `dup2` also makes it inheritable
    for name, number, kind in (("stdout", 1, _Output), ("stderr", 2, _Messages)):
        old = getattr(sys, name)
        errors = "backslashreplace" if old is None or old.errors == "strict" else old.errors
        stream = io.TextIOWrapper(
            io.BufferedWriter(kind(number, "w", closefd=False)),
            encoding="utf-8" if old is None else old.encoding,
            errors=errors,
            line_buffering=name == "stderr" or os.isatty(number),
            write_through=old is not None and old.write_through,
        )
        setattr(sys, name, stream)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)


def _leave(code: int) -> NoReturn:
    """Ends the program with an exit code within `LEAVING_SECONDS`, whatever its threads and children do."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)  # the code is decided
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()  # processes wait here for each other, and for no thread or child
    if code == SUCCESS_EXIT_CODE:
        end = threading.Timer(LEAVING_SECONDS, os._exit, [code])
        end.daemon = True
        end.start()
        sys.exit(code)
    # After a failure, threads may be anywhere. Some would crash a process that cleans up, others print tracebacks.
    with contextlib.suppress(Exception, ReaderLeft):
        _flush()
    os._exit(code)
