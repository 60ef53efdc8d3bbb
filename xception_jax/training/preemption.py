"""Handles SIGTERM and SIGINT: the first one ends the run after the current step, a second one immediately."""

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

from xception_jax.errors import INTERRUPTED_EXIT_CODE, PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Programs such as `timeout` signal both their child and its process group. The two signals count as one request.
ONE_REQUEST_SECONDS = 1.0

# signal(2), because Python's signal module can neither query nor restore a handler installed by a C++ library.
_set_handler = ctypes.CDLL(None).signal
_set_handler.argtypes, _set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


class Preemption:
    """Context manager that turns SIGTERM and SIGINT into a request to stop.

    The loop calls `should_stop(step)` once after each step. If this is True, the loop saves and raises `error(step)`. A
    second signal, at least one second later, ends the process with code 130, even during a compilation. Existing
    checkpoints stay intact.

    With several processes, a signal to one of them stops all of them after the same step: the distributed runtime of
    JAX has its own SIGTERM handler, which notifies the others. This context calls that handler, so
    `jax.distributed.initialize()` must run first.

    Args:
      report: called with one line that acknowledges the first signal, from another thread.

    Raises:
      ValueError: entered outside of the main thread, where Python cannot install signal handlers.
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
        # Python runs signal handlers between two bytecodes of the main thread, so not during a compilation. The signal
        # number is written to this socket immediately, and the thread that reads it can end the process.
        listener, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(listener,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the previous handlers."""
        signal.set_wakeup_fd(self._previous_wakeup)
        for signum in SIGNALS:
            signal.signal(signum, self._previous_handlers[signum] or signal.SIG_DFL)
            if self._foreign_handlers[signum] is not None:
                _set_handler(signum, self._foreign_handlers[signum])
        self._writer.close()  # ends the thread
        self._thread.join()

    @property
    def requested(self) -> bool:
        """Whether to stop now. Cheap enough to check at every batch of an evaluation, or while waiting for input.

        With several processes, it stays False until `should_stop` has agreed on the step at which all of them stop. If
        one process left the loop earlier, the others would wait for it in a collective.
        """
        return self._agreed if self._distributed else self._signal is not None

    def should_stop(self, step: int) -> bool:
        """Returns whether the run must end after this step.

        Args:
          step: the step that was just dispatched. Every process must ask for every step, in order: JAX answers yes only
            for one step, the first that no process had reached when the signal arrived.
        """
        if self._distributed and not self._agreed:
            self._agreed = multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def error(self, step: int, workdir: str | os.PathLike) -> PreemptedError:
        """Returns the error to raise after the checkpoint of `step` has been written."""
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
                        # `print` could block, because the main thread may hold the lock of the stream.
                        os.write(2, f"{name} after {first}: exiting now, the last checkpoint is intact\n".encode())
                        os._exit(INTERRUPTED_EXIT_CODE)
                    first, first_time = name, time.monotonic()
                    self._report(f"{name}: stopping after this step; send a second signal to exit now")


def _foreign_handler(signum: int) -> int | None:
    """Removes the signal handler that a C++ library has installed and returns its address, or None."""
    if callable(signal.getsignal(signum)):
        return None
    address = _set_handler(signum, signal.SIG_IGN)
    return None if address in (None, signal.SIG_DFL, signal.SIG_IGN) else address
