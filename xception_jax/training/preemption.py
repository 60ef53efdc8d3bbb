"""Stops on request: the first SIGTERM or SIGINT ends the run after its step, the second ends it at once."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

import jax
from jax.experimental import multihost_utils

from xception_jax.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_AT_ONCE = 130
# A program such as `timeout` signals its child and the group that the child belongs to: both signals are one request.
ONE_REQUEST_SECONDS = 1.0

# signal(2) itself: Python's module neither tells of nor restores a handler that a C++ library has installed.
_set_handler = ctypes.CDLL(None).signal
_set_handler.argtypes, _set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


class Preemption:
    """Context manager that turns SIGTERM and SIGINT into a request to stop.

    The loop asks `should_stop(step)` once after each step; told to stop, it saves and raises `error(step)`.
    A second signal, at least a second later, ends the process with code 130, even while the main thread is inside a
    compilation; what was saved before stays as it is.

    On several processes a signal to one of them stops all of them after the same step. JAX sees to that: its
    distributed runtime has a SIGTERM handler of its own, which tells the others. Therefore
    `jax.distributed.initialize()` comes first and this context second, which then calls that handler.

    Args:
      report: takes the line that acknowledges the first signal; called from another thread.

    Raises:
      ValueError: entered outside the main thread, where Python cannot install signal handlers.
    """

    def __init__(self, report: Callable[[str], None] = print):
        self._report = report
        self._signal: signal.Signals | None = None
        self._agreed = False  # among all processes

    def __enter__(self) -> Preemption:
        """Installs the handlers."""
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("signal handlers can only be installed in the main thread")
        self._distributed = jax.distributed.is_initialized()
        self._foreign_handlers = {signum: _foreign_handler(signum) for signum in SIGNALS}
        self._previous_handlers = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        # A Python handler runs between two bytecodes of the main thread, so not while it compiles. The number of the
        # signal is written to this socket at once, to a thread that can still end the process.
        listener, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(listener,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the handlers that were there before."""
        signal.set_wakeup_fd(self._previous_wakeup)
        for signum in SIGNALS:
            signal.signal(signum, self._previous_handlers[signum] or signal.SIG_DFL)
            if self._foreign_handlers[signum] is not None:
                _set_handler(signum, self._foreign_handlers[signum])
        self._writer.close()  # ends the thread
        self._thread.join()

    @property
    def requested(self) -> bool:
        """Whether to stop now; cheap enough for every batch of an evaluation or a wait for input.

        On several processes it stays False until `should_stop` has found the step at which all of them stop: a
        process that left a loop earlier would leave the others waiting for it in a collective.
        """
        return self._agreed if self._distributed else self._signal is not None

    def should_stop(self, step: int) -> bool:
        """Whether the run ends after this step.

        Args:
          step: the step that was just dispatched. Every process asks for every step in turn, without a gap: JAX
            answers yes for one step only, the first that none of the processes had reached when the signal came.
        """
        if self._distributed and not self._agreed:
            self._agreed = multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def error(self, step: int, workdir: str | os.PathLike) -> PreemptedError:
        """Returns what the loop raises once the checkpoint of `step` is on disk."""
        cause = self._signal.name if self._signal else "a signal to another process"
        return PreemptedError(
            f"stopped by {cause} after step {step}, which is saved", str(workdir), "run the same command to resume"
        )

    def _on_signal(self, signum: int, frame: object) -> None:
        if self._signal is None:
            self._signal = signal.Signals(signum)
            handler = self._foreign_handlers[signal.SIGTERM]
            if self._distributed and handler is not None:
                ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)(signal.SIGTERM)

    def _listen(self, listener: socket.socket) -> None:
        first, first_time = None, 0.0
        with listener:
            while numbers := listener.recv(64):
                for number in numbers:
                    if number not in SIGNALS:
                        continue
                    name = signal.Signals(number).name
                    if first is not None and time.monotonic() - first_time < ONE_REQUEST_SECONDS:
                        continue
                    if first is not None:
                        # Not through print: the main thread may hold the lock of its buffer for good.
                        os.write(2, f"{name} after {first}: ended at once, the last checkpoint is intact\n".encode())
                        os._exit(EXIT_AT_ONCE)
                    first, first_time = name, time.monotonic()
                    self._report(f"{name}: stopping after this step; a second signal ends the run at once")


def _foreign_handler(signum: int) -> int | None:
    """Takes a signal away from a handler that some C++ library installed, and returns its address if there is one."""
    if callable(signal.getsignal(signum)):
        return None
    address = _set_handler(signum, signal.SIG_IGN)
    return None if address in (None, signal.SIG_DFL, signal.SIG_IGN) else address
