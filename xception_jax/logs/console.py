"""What a person sees while a run goes on: what was found at the start, then one line that is kept up to date."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from absl import logging as absl_logging


def format_count(count: float) -> str:
    """Returns a large number with three digits and a prefix: 8357403496 is '8.36 G'."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * factor:
            value = count / factor
            return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f} {prefix}"
    return f"{count:.0f}"


def format_duration(seconds: float) -> str:
    """Returns the two largest units of a duration: '2d 03h', '1h 05m', '12m 09s', '42s'; '?' if not finite."""
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
    """Returns the block that opens a run: a title, then rows of name and value, the values aligned.

    What belongs there is what a mistake would show in: devices and mesh, parameters and multiply-adds, dataset and
    its sizes, steps, the work directory.
    """
    width = max((len(name) for name, _ in rows), default=0)
    lines = (f"  {name:<{width}}  {value}".replace("\n", "\n" + " " * (width + 4)) for name, value in rows)
    return "\n".join([title, *lines])


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is. None is what is not known yet.

    Attributes:
      step, total_steps: steps done and to do.
      epoch: passes over the training data so far.
      loss: of the last step that was read.
      learning_rate: of that step.
      images_per_second: over all devices.
      input_share: share of the time in which the devices wait for the next batch, in [0, 1].
      seconds_left: estimated, with evaluations and saves.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    images_per_second: float | None = None
    input_share: float | None = None
    seconds_left: float | None = None


def format_progress(progress: Progress, width: int | None = None) -> str:
    """Returns the progress as one line, of at most `width` characters: what matters least is left out first."""
    p = progress
    # In the order of the line; the number says how long a part stays when there is little room.
    parts = [(9, f"step {p.step:,}/{p.total_steps:,}"), (4, f"epoch {p.epoch:.2f}"), (8, f"loss {p.loss:.4g}")]
    if p.images_per_second is not None:
        digits = 1 if p.images_per_second < 100 else 0
        parts.append((6, f"{p.images_per_second:,.{digits}f} images/s"))
    if p.input_share is not None:
        parts.append((3, f"input {p.input_share:.0%}"))
    parts.append((2, f"lr {p.learning_rate:.3g}"))
    if p.seconds_left is not None:
        parts.append((7, f"{format_duration(p.seconds_left)} left"))
    while True:
        line = "  ".join(text for _, text in parts)
        if width is None or len(line) <= width:
            return line
        if len(parts) == 1:
            return line[:width]
        parts.remove(min(parts))


class ProgressLine:
    """Shows the progress: a line rewritten in place on a terminal, plain lines elsewhere.

    On a terminal the line is cleared before anything else appears: text given to `message` and records of logging.
    A stream that fails (a closed pipe) is not written to again; it never stops the run.

    Args:
      stream: usually standard error.
    """

    _SECONDS_BETWEEN_UPDATES = 0.1

    def __init__(self, stream: TextIO):
        self._stream: TextIO | None = stream
        self._terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self._last_update = -math.inf
        # absl's own handler passes records on without asking its filters, so the one inside gets the filter too.
        python_handler = absl_logging.get_absl_handler().python_handler
        handlers = [*logging.root.handlers, logging.lastResort, python_handler] if self._terminal else []
        self._handlers = [handler for handler in handlers if handler is not None]
        for handler in self._handlers:
            handler.addFilter(self._clear_before)

    def _clear_before(self, record: logging.LogRecord) -> bool:
        self._clear()
        return True

    def _write(self, text: str) -> None:
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: it was closed
                self._stream = None

    def _clear(self) -> None:
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = False

    def _width(self) -> int:
        try:
            # A line that fills the last column may already have wrapped.
            return max(os.get_terminal_size(self._stream.fileno()).columns, 20) - 1 if self._stream else 79
        except (OSError, ValueError):
            return 79

    def show(self, progress: Progress, *, log_point: bool) -> None:
        """Shows the progress now; where there is no terminal, only at log points."""
        if not self._terminal:
            if log_point:
                self._write(format_progress(progress) + "\n")
            return
        now = time.monotonic()
        if log_point or now - self._last_update >= self._SECONDS_BETWEEN_UPDATES:
            self._last_update = now
            self._write("\r\x1b[K" + format_progress(progress, self._width()))
            self._shown = True

    def message(self, text: str) -> None:
        """Prints lines of their own."""
        self._clear()
        self._write(text + "\n")

    def close(self) -> None:
        """Leaves the last line where it is and the terminal as it was found."""
        if self._shown:
            self._write("\n")
            self._shown = False
        for handler in self._handlers:
            handler.removeFilter(self._clear_before)


class Throughput:
    """The speed of training, from the time between marks, which are set where a step is known to have finished.

    The first mark only starts the clock, so that compiling does not count, and neither does what runs in `paused`.
    The speed is that of the median interval: one in which the process was stopped or the machine was busy changes
    nothing.

    Args:
      batch_size: images per step.
      window: intervals that are remembered.
      clock: seconds, monotonic.
    """

    def __init__(self, batch_size: int, window: int = 20, clock: Callable[[], float] = time.monotonic):
        self._batch_size, self._clock = batch_size, clock
        self._intervals: deque[tuple[float, float]] = deque(maxlen=window)  # seconds per step, input share
        self._step: int | None = None
        self._since = self._waited = 0.0
        self._paused_seconds, self._steps = 0.0, 0

    def mark(self, step: int) -> None:
        """Says that `step` steps have finished by now."""
        now = self._clock()
        if self._step is not None and step > self._step:
            steps, seconds = step - self._step, max(now - self._since, 1e-9)
            self._intervals.append((seconds / steps, min(self._waited / seconds, 1.0)))
            self._steps += steps
        self._step, self._since, self._waited = step, now, 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out what happens within: an evaluation, a save. `seconds_left` expects more of it."""
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
        """Counts what happens within as waiting for input."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    @property
    def _seconds_per_step(self) -> float | None:
        # The lower of two, as the higher is more often a disturbance.
        return statistics.median_low(seconds for seconds, _ in self._intervals) if self._intervals else None

    @property
    def images_per_second(self) -> float | None:
        """Images per second over all devices; None before the second mark."""
        seconds = self._seconds_per_step
        return self._batch_size / seconds if seconds else None

    @property
    def input_share(self) -> float | None:
        """The share of an interval spent in `waiting`, in [0, 1], on average; None before the second mark."""
        # A mean of shares: in a ratio of sums, one interval in which the process was stopped would be all there is.
        return statistics.fmean(share for _, share in self._intervals) if self._intervals else None

    def seconds_left(self, steps: int) -> float | None:
        """The time that `steps` more steps take, with as many pauses per step as there were so far."""
        seconds = self._seconds_per_step
        return steps * (seconds + self._paused_seconds / self._steps) if seconds else None
