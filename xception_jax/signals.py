"""Turns SIGTERM and SIGINT into a request to stop. Imports nothing slow, so that it can stand before what does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from xception_jax.errors import INTERRUPTED_EXIT_CODE, PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Programs such as `timeout` signal both their child and its process group. The two signals count as one request.
ONE_REQUEST_SECONDS = 1.0

# signal(2) and sigaction(2), because Python's signal module can neither query nor restore a handler of a C++ library.
_libc = ctypes.CDLL(None)
_libc.signal.argtypes, _libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
_libc.sigaction.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

_Self = TypeVar("_Self", bound="StopSignals")


class StopRequested(BaseException):
    """A signal asks the program to end, and nothing is lost by it.

    This is not an `Exception`, because libraries would take that for a failure of their own, for example of an import.
    """

    def as_error(self, where: str) -> PreemptedError:
        """Returns the error to report."""
        return PreemptedError(f"stopped by {self}; no trained step is lost", where, "run the same command to resume")


class StopSignals:
    """Context manager that handles SIGTERM and SIGINT.

    Where nothing can be lost, the first signal ends a program of ours at once, with code 75: an exception could be
    swallowed by a callback, or crash a library that other threads are in. In programs of others, such as notebooks, it
    raises `StopRequested` in the main thread. Inside of `deferred()` it only sets `requested`, and the exception is
    raised at the end of it. A second signal, at least one second later, ends the process with code 130. Processes end
    even while the main thread is in C.

    Args:
      report: called with one line that acknowledges the first signal, from another thread.
      where: what is stopped, for the message.
      owns_process: whether the first signal may end the process. Inside of another `StopSignals`, what that one says.

    Raises:
      ValueError: entered outside of the main thread, where Python cannot install signal handlers.
    """

    def __init__(self, report: Callable[[str], None], where: str = "", *, owns_process: bool = False):
        self._report, self._where, self._owns_process = report, where, owns_process
        self._signal: signal.Signals | None = None
        self._acknowledged = ""  # name of the first signal, known also while the main thread is in C
        self._deferred = False
        self._was_deferred = False  # when the first signal came

    def __enter__(self: _Self) -> _Self:
        """Installs the handlers."""
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("signal handlers can only be installed in the main thread")
        before = {signum: _handler_address(signum) for signum in SIGNALS}
        self._previous_handlers = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        # Handlers that a C++ library installed, which Python does not know.
        python = _handler_address(signal.SIGTERM)
        ours = (None, signal.SIG_DFL, signal.SIG_IGN, python)
        self._foreign_handlers = {signum: None if address in ours else address for signum, address in before.items()}
        outer = getattr(self._previous_handlers[signal.SIGTERM], "__self__", None)
        if isinstance(outer, StopSignals):
            self._owns_process = outer._owns_process
        # Python runs signal handlers between two bytecodes of the main thread, so not during a compilation. The signal
        # number is written to this socket immediately, and the thread that reads it can end the process.
        listener, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(listener,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Restores the previous handlers."""
        signal.set_wakeup_fd(self._previous_wakeup)
        for signum in SIGNALS:
            signal.signal(signum, self._previous_handlers[signum] or signal.SIG_DFL)
            if self._foreign_handlers[signum] is not None:
                _libc.signal(signum, self._foreign_handlers[signum])
        self._writer.close()  # ends the thread
        self._thread.join()

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return self._signal is not None

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Context in which a signal only sets `requested`, because what the program holds must first be saved.

        Raises:
          StopRequested: at its end, if a signal came and the program did not end by itself.
        """
        self._deferred = True
        try:
            self._raise_if_requested()
            yield
        finally:
            self._deferred = False
        self._raise_if_requested()

    def _raise_if_requested(self) -> None:
        if self.requested and self._signal is not None:
            raise StopRequested(self._signal.name)

    @property
    def _immediate(self) -> bool:
        """Whether the first signal raises at once."""
        return not self._deferred

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._signal is None:
            self._signal = signal.Signals(signum)
            self._was_deferred = not self._immediate
            if self._immediate and not self._owns_process:
                raise StopRequested(self._signal.name)

    def _listen(self, listener: socket.socket) -> None:
        first, first_time = "", 0.0
        with listener:
            while numbers := listener.recv(64):
                for number in numbers:
                    if number not in SIGNALS:
                        continue
                    name = signal.Signals(number).name
                    if first and time.monotonic() - first_time < ONE_REQUEST_SECONDS:
                        continue
                    if first:
                        _write(f"{name} after {first}: exiting now, the last checkpoint is intact\n")
                        os._exit(INTERRUPTED_EXIT_CODE)
                    if self._immediate and self._owns_process:
                        _write(f"{StopRequested(name).as_error(self._where)}\n")
                        os._exit(PreemptedError.exit_code)
                    first, first_time = name, time.monotonic()
                    self._acknowledged = name
                    when = " after this step" if self._was_deferred or not self._immediate else ""
                    self._report(f"{name}: stopping{when}; send a second signal to exit now")


def handle_signals() -> None:
    """Lets SIGTERM and SIGINT end this program with code 75, from now on."""
    StopSignals(_write, "the start of the program", owns_process=True).__enter__()


def _write(text: str) -> None:
    # `print` could block, because the main thread may hold the lock of the stream.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Restores the handlers of SIGTERM and SIGINT at its end, because a C++ library replaces them inside of it."""
    before = {signum: _action(signum) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, action in before.items():
            _libc.sigaction(signum, action, None)


def _handler_address(signum: int) -> int | None:
    """Returns the address of the handler of a signal, in C: the first field of `struct sigaction`."""
    return ctypes.c_void_p.from_buffer(_action(signum)).value


def _action(signum: int) -> ctypes.Array[ctypes.c_char]:
    """Returns the `struct sigaction` of a signal."""
    action = ctypes.create_string_buffer(512)
    _libc.sigaction(signum, None, action)
    return action
