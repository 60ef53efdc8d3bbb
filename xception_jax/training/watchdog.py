"""Ends a stalled run, so that a scheduler starts it again."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import threading
import time
from pathlib import Path

import jax

from xception_jax.config import WatchdogConfig
from xception_jax.errors import PreemptedError
from xception_jax.logs.console import Throughput
from xception_jax.logs.goodput import ACTIVITIES, INPUT, STEPS, Stopwatch
from xception_jax.processes import publish, published
from xception_jax.reports.live import mark_stopped
from xception_jax.training.gil_timer import GilTimer
from xception_jax.training.run_directory import RunDirectory

_TICK = 0.5  # seconds
_WATCHED = (STEPS, INPUT)
# A file system that is stuck, which may be the cause of all this, must not keep the process from ending.
_WRITING_SECONDS = 10.0
# The first process to end ends the others. After this time they have written their stacks too.
_OTHERS_SECONDS = 5.0
_ANSWER_SECONDS = 5.0  # of the coordinator, which may be frozen
_CLOSING_SECONDS = 5.0
_AFTER_SECONDS = 3600.0  # what follows takes time of its own
_BUSY = "busy"
_FIRST_STEP = 10  # times as long as later ones: a step of a large batch on a CPU takes half an hour


class Watchdog:
    """Context manager that ends the process with code 75 if no step ends for too long.

    Too long is `config.factor` times the median step, and at least `config.min_seconds`; ten times `config.min_seconds`
    before the first step has ended. Only time in training steps
    and in waiting for input counts, and with several processes only while none of them does anything else. The time is
    a number of wake-ups of a thread, so a process that was stopped or suspended does not count it. It also catches a
    main thread that is blocked in a C extension. If that thread holds the GIL, a kernel timer ends the process.

    Args:
      config: `config.watchdog`.
      stopwatch: knows what the main thread does, and how many steps have ended.
      throughput: knows the median step.
      directory: where `stacks_<process>.txt` is written.
    """

    def __init__(self, config: WatchdogConfig, stopwatch: Stopwatch, throughput: Throughput, directory: RunDirectory):
        self._config, self._stopwatch, self._throughput, self._directory = config, stopwatch, throughput, directory
        self._process, self._count = jax.process_index(), jax.process_count()
        self._stop = threading.Event()
        self._publisher = threading.Thread(target=self._publish, name="activity", daemon=True)

    def __enter__(self) -> Watchdog:
        """Starts the threads, unless it is off."""
        if self._config.factor:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            if self._count > 1:
                self._publisher.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the threads."""
        self._stop.set()
        if self._publisher.is_alive():
            self._publisher.join(_CLOSING_SECONDS)  # as in `_Peers.leave`

    def _watch(self) -> None:
        ended, ticks = 0, 0
        with GilTimer() as timer:
            while not self._stop.wait(_TICK):
                limit = self._limit()
                timer.set(limit)
                if self._stopwatch.ended != ended:
                    ended, ticks = self._stopwatch.ended, 0
                elif self._stopwatch.activity in _WATCHED:
                    ticks += 1
                if ticks * _TICK > limit:
                    timer.set(_AFTER_SECONDS)
                    if not self._others_are_busy():
                        self._end(ticks * _TICK)
                    ticks = 0

    def _limit(self) -> float:
        per_step = self._throughput.seconds_per_step
        if per_step is None:  # nobody knows how long a step takes before one has ended
            return _FIRST_STEP * self._config.min_seconds
        return max(self._config.min_seconds, self._config.factor * per_step)

    def _publish(self) -> None:
        """Tells the other processes when this one does something that they have to wait for."""
        told, count = "", 0
        while not self._stop.wait(_TICK):
            count += 1
            busy = "" if self._stopwatch.activity in _WATCHED else f"{self._stopwatch.activity} {count}"
            if busy != told:
                with contextlib.suppress(Exception):  # without the coordinator, the run ends anyway
                    publish(_BUSY, busy)
                told = busy

    def _others_are_busy(self) -> bool:
        """Returns whether another process is busy, and shows it by counting: it may have been frozen meanwhile."""
        before = self._published() if self._count > 1 else {}
        if not any(before.values()):
            return False
        time.sleep(_ANSWER_SECONDS)
        after = self._published()
        return any(busy and after.get(number) != busy for number, busy in before.items())

    def _published(self) -> dict[int, str]:
        found: dict[int, str] = {}
        ask = threading.Thread(target=lambda: found.update(published(_BUSY)), daemon=True)
        ask.start()
        ask.join(_ANSWER_SECONDS)
        return dict(found)

    def _end(self, seconds: float) -> None:
        guard = threading.Timer(_WRITING_SECONDS, os._exit, [PreemptedError.exit_code])
        guard.daemon = True
        guard.start()
        began = time.monotonic()
        name = f"stacks_{self._process}.txt"
        which = f" (process {self._process} of {self._count})" if self._count > 1 else ""
        fix = "run the same command to resume from the last checkpoint; this file has the stacks of all threads"
        message = f"{PreemptedError(self._describe(seconds) + which, str(self._directory.path(name)), fix)}\n".encode()
        with contextlib.suppress(OSError):
            os.write(2, message)
            faulthandler.dump_traceback(2, all_threads=True)
        with contextlib.suppress(OSError):
            _append(self._directory.files / name, message)
        if self._process == 0:
            with contextlib.suppress(OSError):
                mark_stopped(self._directory.files)
        for worker in multiprocessing.active_children():  # one that is frozen would stay
            worker.kill()
        with contextlib.suppress(Exception):  # the store is away, or another run has taken over
            self._directory.push(name)
        if self._count > 1:
            time.sleep(max(0.0, began + _OTHERS_SECONDS - time.monotonic()))
        os._exit(PreemptedError.exit_code)

    def _describe(self, seconds: float) -> str:
        median = self._throughput.seconds_per_step
        usual = f", {seconds / median:,.0f} times the median" if median else ""
        doing = ACTIVITIES[self._stopwatch.activity]
        return f"no step has ended for {seconds:.0f} s{usual}; after step {self._stopwatch.step:,}, in: {doing}"


def _append(path: Path, message: bytes) -> None:
    """Appends a message and the stacks of all threads to a file. Follows no links, and does not wait for pipes."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        os.write(descriptor, time.strftime("%Y-%m-%d %H:%M:%S ").encode() + message)
        faulthandler.dump_traceback(descriptor, all_threads=True)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
