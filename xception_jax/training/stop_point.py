"""Lets all processes of a run stop at the same point when one of them is asked to stop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from xception_jax.processes import gather, publish, published

_REQUEST = "stop"
_POLL = 0.5  # seconds
_CLOSING = 5.0


class StopPoint:
    """Chooses the point at which all processes stop.

    A run passes numbered points, the same in every process: one before each step, and one before each batch of an
    evaluation. After a request, every process reports the last point that it has passed, and all stop at the first
    that none has passed. So no process waits in a collective for one that has stopped. A thread asks and reports,
    because the main thread may be waiting for input or in a collective, and the coordinator may not answer.

    Args:
      agreed: called in that thread, once the processes have agreed.
    """

    def __init__(self, agreed: Callable[[], None]):
        self._agreed = agreed
        self._lock = threading.Lock()  # held while the processes agree, so that this one passes no point meanwhile
        self._passed = 0
        self._stop_at: int | None = None
        self._requested, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="stop point", daemon=True)
        self._thread.start()

    def request(self) -> None:
        """Lets the thread ask all processes to stop."""
        self._requested.set()

    def close(self) -> None:
        """Ends the thread. At the end of Python, a thread in a library would end the process."""
        self._closed.set()
        self._thread.join(_CLOSING)

    @property
    def is_before_all(self) -> bool:
        """Whether all processes stop before they have passed a point."""
        return self._stop_at == 1

    @property
    def is_next(self) -> bool:
        """Whether this process must stop before it passes the next point."""
        with self._lock:
            return self._stop_at == self._passed + 1

    def stops(self) -> bool:
        """Passes the next point, unless this process must stop there; returns whether it must.

        Every process must call this for the same points, in the same order.
        """
        with self._lock:
            if self._stop_at == self._passed + 1:
                return True
            self._passed += 1
            return False

    def _run(self) -> None:
        with contextlib.suppress(Exception):  # if the coordinator is lost, this process ends anyway
            while not published(_REQUEST):
                if self._closed.wait(_POLL):
                    return
                if self._requested.is_set():
                    publish(_REQUEST, "yes")
            with self._lock:
                self._stop_at = 1 + max(map(int, gather("stop point", str(self._passed))))
            gather("stop point is known", "")  # before any process ends
            self._agreed()
