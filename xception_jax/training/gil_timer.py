"""Ends a process in which no Python thread can run, because one is stuck in C and holds the global lock (GIL).

No Python code can notice this. A thread that waits for the lock looks at it every few milliseconds, though, and the
kernel has a timer for the CPU time of a thread. So the CPU time of the waiting thread measures how long it has been
waiting. Unlike any other clock it stands still while the process is stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import signal
import statistics
import sys
import threading
import time
from typing import Any

from xception_jax.errors import PreemptedError

_CLOCK_THREAD_CPUTIME_ID = 3
_SIGEV_SIGNAL, _SIGEV_THREAD = 0, 2
_PROBES = 20
_BETWEEN_SECONDS = 0.02  # of CPU time, between the stacks and the end


class _Event(ctypes.Structure):
    """`struct sigevent` of Linux on 64 bits."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_char * 32),
    )


class _Setting(ctypes.Structure):
    """`struct itimerspec`: an interval, and the time until the timer fires."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("every", "every_ns", "after", "after_ns"))


class GilTimer:
    """Context manager that ends the process with code 75 if its thread has waited for the global lock for too long.

    The thread that enters it must call `set` regularly. Before the end, the stacks of all threads are written to
    standard error. Without the timers of Linux, it does nothing.
    """

    def __init__(self) -> None:
        self._timers: list[ctypes.c_void_p] = []
        self._cost = 0.0

    def __enter__(self) -> GilTimer:
        """Creates the timers, for the CPU time of the calling thread."""
        if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8:
            return self
        self._cost = _cost_of_waking_up()
        dump = signal.SIGRTMAX - 1
        code, end = PreemptedError.exit_code, ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p)
        events = (
            _Event(signo=dump, notify=_SIGEV_SIGNAL),
            _Event(value=code, notify=_SIGEV_THREAD, function=end),
        )
        with contextlib.suppress(AttributeError):  # an older C library has them elsewhere
            _timers()
            faulthandler.register(dump, file=2, all_threads=True)
            for event in events:
                timer = ctypes.c_void_p()
                if _timers().timer_create(_CLOCK_THREAD_CPUTIME_ID, ctypes.byref(event), ctypes.byref(timer)) == 0:
                    self._timers.append(timer)
        return self

    def __exit__(self, *_: object) -> None:
        """Deletes the timers."""
        for timer in self._timers:
            _timers().timer_delete(timer)

    def set(self, seconds: float) -> None:
        """Starts to count anew. It ends after about `seconds` of waiting for the lock, or later on a busy machine."""
        cpu = max(seconds / sys.getswitchinterval() * self._cost, _BETWEEN_SECONDS)
        for number, timer in enumerate(self._timers):
            after = cpu + number * _BETWEEN_SECONDS
            setting = _Setting(after=int(after), after_ns=int(after % 1 * 1e9))
            _timers().timer_settime(timer, 0, ctypes.byref(setting), None)


def _cost_of_waking_up() -> float:
    """Returns the median CPU time, in seconds, of a wake-up after a wait as long as those for the global lock."""
    lock, seconds = threading.Lock(), []
    with lock:
        for _ in range(_PROBES):
            start = time.thread_time()
            lock.acquire(timeout=sys.getswitchinterval())
            seconds.append(time.thread_time() - start)
    return statistics.median(seconds)


def _timers() -> Any:
    """Returns the C library, with the types of its timer functions."""
    library = ctypes.CDLL(None)
    pointer = ctypes.c_void_p
    library.timer_create.argtypes = (ctypes.c_int, pointer, pointer)
    library.timer_settime.argtypes = (pointer, ctypes.c_int, pointer, pointer)
    library.timer_delete.argtypes = (pointer,)
    return library
