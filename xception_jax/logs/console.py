"""Prints the console output of a run (header, messages and progress line), and measures its throughput."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from absl import logging as absl_logging
from tqdm import tqdm

from xception_jax.names import LINE_LENGTH, printable

_SILENT_SECONDS = 2.0


def format_count(count: float) -> str:
    """Formats a large number with three digits and a prefix: 8357403496 is '8.36 G'."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * factor:
            value = count / factor
            return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {prefix}"
    return f"{count:.0f}"


def format_duration(seconds: float) -> str:
    """Formats a duration by its two largest units: '2d 03h', '1h 05m', '12m 09s', '42s'; '?' if not finite."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}h"
    if hours:
        return f"{hours}h {minute:02}m"
    return f"{minutes}m {second:02}s" if minutes else f"{second}s"


def format_header(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Formats a title followed by rows of names and values, with the values aligned."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = (f"  {name:<{width}}  {value}".replace("\n", "\n" + " " * (width + 4)) for name, value in rows)
    return "\n".join([title, *lines])


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run. None means not known yet.

    Attributes:
      step: number of finished steps.
      total_steps: number of steps of the whole run.
      epoch: number of passes over the training data so far.
      loss: loss of the last finished step.
      learning_rate: learning rate of that step.
      images_per_second: speed of training, over all devices.
      input_share: share of the time that the devices wait for input, in [0, 1].
      seconds_left: estimated remaining time, including evaluations and saves.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    images_per_second: float | None = None
    input_share: float | None = None
    seconds_left: float | None = None

    def __str__(self) -> str:
        """Formats everything except the step, the most important first, because narrow terminals cut off the end."""
        parts = [f"loss {self.loss:.4g}"]
        if self.seconds_left is not None:
            parts.append(f"{format_duration(self.seconds_left)} left")
        if self.images_per_second is not None:
            digits = 1 if self.images_per_second < 100 else 0
            parts.append(f"{self.images_per_second:,.{digits}f} images/s")
        parts += [f"epoch {self.epoch:.2f}", f"lr {self.learning_rate:.3g}"]
        if self.input_share is not None:
            parts.append(f"input {self.input_share:.0%}")
        return "  ".join(parts)


# Creates the lock that all lines share. A timer thread must not be the first to do so: tqdm would import from
# multiprocessing there, while TensorFlow Datasets makes imports lazy during its own, and the program would hang.
tqdm.get_lock()


def say(line: str) -> None:
    """Prints one line to standard error, above the progress bar if there is one. Errors of the stream are ignored.

    A line break or a control character in it, which can only be part of a name, is shown escaped.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError if the stream is closed
        tqdm.write(printable(line, LINE_LENGTH), file=sys.stderr)


@contextlib.contextmanager
def announce(phase: str, report: Callable[[str], None] = say) -> Iterator[None]:
    """Reports what the program is doing if that takes longer than two seconds, so that it is never silent for long."""
    timer = threading.Timer(_SILENT_SECONDS, report, [f"{phase} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class ProgressLine:
    """Context manager that shows the progress: a bar in a terminal, otherwise one line per log point.

    Lines printed by `say` and log records appear above the bar.

    Args:
      total_steps: number of steps of the whole run.
      step: the step that the run starts from.
    """

    def __init__(self, total_steps: int, step: int):
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            file=sys.stderr,
            disable=not terminal,
            dynamic_ncols=True,
            position=0,  # the only bar, even if an earlier one was not closed
            bar_format="{percentage:3.0f}%  step {n_fmt}/{total_fmt}  {desc}",
        )
        # The handler of absl ignores its own filters, so the filter is also added to the handler inside it.
        handlers = [*logging.root.handlers, logging.lastResort, absl_logging.get_absl_handler().python_handler]
        self._handlers = [handler for handler in handlers if handler is not None and terminal]
        for handler in self._handlers:
            handler.addFilter(self._clear)

    def __enter__(self) -> ProgressLine:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the bar, which leaves its last line on the terminal, and removes the logging filters."""
        for handler in self._handlers:
            handler.removeFilter(self._clear)
        with contextlib.suppress(OSError, ValueError):
            self._bar.close()

    def _clear(self, record: logging.LogRecord) -> bool:
        with contextlib.suppress(OSError, ValueError):
            self._bar.clear()
        return True

    def show(self, progress: Progress, *, log_point: bool) -> None:
        """Shows the progress. Without a terminal, only at log points."""
        if self._bar.disable:
            if log_point:
                say(f"step {progress.step:,}/{progress.total_steps:,}  {progress}")
            return
        with contextlib.suppress(OSError, ValueError):
            self._bar.set_description_str(str(progress), refresh=False)
            self._bar.update(progress.step - self._bar.n)
            if log_point:
                self._bar.refresh()


class Throughput:
    """Measures the speed of training from the intervals between marks, which are set when a step has finished.

    The first mark only starts the clock, so compilation does not count. Time spent in `paused` does not count either.
    The speed is that of the median interval, so a disturbed interval has no effect.

    Args:
      batch_size: images per step.
      window: number of intervals to keep.
      clock: returns monotonic time in seconds.
    """

    def __init__(self, batch_size: int, window: int = 20, clock: Callable[[], float] = time.monotonic):
        self._batch_size, self._clock = batch_size, clock
        self._intervals: deque[tuple[float, float]] = deque(maxlen=window)  # seconds per step, input share
        self._step: int | None = None
        self._since = self._waited = 0.0
        self._paused_seconds, self._steps = 0.0, 0

    def mark(self, step: int) -> None:
        """Records that `step` steps have finished."""
        now = self._clock()
        if self._step is not None and step > self._step:
            steps, seconds = step - self._step, max(now - self._since, 1e-9)
            self._intervals.append((seconds / steps, min(self._waited / seconds, 1.0)))
            self._steps += steps
        self._step, self._since, self._waited = step, now, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes an evaluation or a save from the speed. `seconds_left` assumes that more of them will follow."""
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._since += seconds
            if self._step is not None:
                self._paused_seconds += seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent in this context as waiting for input."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    @property
    def seconds_per_step(self) -> float | None:
        """The median time of a step, or None before the second mark."""
        # The lower median, because a slow interval is more likely to be disturbed. A copy, for other threads.
        intervals = list(self._intervals)
        return statistics.median_low(seconds for seconds, _ in intervals) if intervals else None

    @property
    def images_per_second(self) -> float | None:
        """Images per second over all devices, or None before the second mark."""
        seconds = self.seconds_per_step
        return self._batch_size / seconds if seconds else None

    @property
    def input_share(self) -> float | None:
        """Average share of an interval spent in `waiting`, in [0, 1], or None before the second mark."""
        # A mean of shares, because a single very long interval would dominate a ratio of sums.
        return statistics.fmean(share for _, share in self._intervals) if self._intervals else None

    def seconds_left(self, steps: int) -> float | None:
        """Estimates the seconds for `steps` more steps, with as much pause time per step as so far."""
        seconds = self.seconds_per_step
        return steps * (seconds + self._paused_seconds / self._steps) if seconds else None
