"""Measures how a run spends its wall time, over all of its starts.

Every entry of metrics.jsonl has the seconds of each activity so far, so a resumed run goes on counting. Nothing here
waits for the devices: an activity is what the main thread does or waits for.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from xception_jax.logs.console import format_duration

STEPS, INPUT, SAVING, EVALUATION, START = "steps", "input", "saving", "evaluation", "start"
LOST, AWAY = "lost", "away"

ACTIVITIES = {
    STEPS: "training steps",
    INPUT: "waiting for input",
    SAVING: "blocked by saving a checkpoint",
    EVALUATION: "evaluation, reports and profiles",
    START: "loading data, restoring, compiling",
    LOST: "steps that had to be done again",
    AWAY: "not running",
}
"""The activities that the time of a run is divided into. `lost` and `away` become known at the next start."""

_PREFIX, _UNIX = "time_", "time"
_REPEATED = (STEPS, INPUT, EVALUATION)  # what a resumed run does again

Seconds = dict[str, float]


class Stopwatch:
    """Adds up the seconds of each activity. Only the main thread changes it; other threads may read the attributes.

    Attributes:
      activity: the current activity.
      step: the last step that has ended.
      ended: number of steps that have ended in this process.

    Args:
      started: `time.monotonic()` at the start of the program.
      before: seconds of each activity in earlier starts.
      clock: returns monotonic time in seconds.
    """

    def __init__(
        self, started: float, before: Mapping[str, float] | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._clock, self._since = clock, started
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0) | dict(before or {})
        self.activity, self.step, self.ended = START, 0, 0

    @contextlib.contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Counts the time spent in this context as `activity`, and the time after it as the activity before it."""
        before = self.activity
        self._switch(activity)
        try:
            yield
        finally:
            self._switch(before)

    def step_ended(self, step: int) -> None:
        """Records that the metrics of a step have arrived."""
        self.step = step
        self.ended += 1

    def lose(self, kept: Mapping[str, float]) -> None:
        """Counts what was done since an earlier time as lost. `kept` are the seconds at that time."""
        self._switch(self.activity)
        self._seconds = _moved(self._seconds, kept)

    def seconds(self) -> Seconds:
        """Returns the seconds of each activity until now, in the order of `ACTIVITIES`."""
        self._switch(self.activity)
        return dict(self._seconds)

    def seconds_of_steps(self) -> float:
        """Returns the seconds of steps and of waiting for their input until now, also of those that were lost."""
        seconds = self.seconds()
        return sum(seconds[name] for name in (STEPS, INPUT, LOST))

    def _switch(self, activity: str) -> None:
        now = self._clock()
        self._seconds[self.activity] += now - self._since
        self.activity, self._since = activity, now


def to_entry(seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns the part of an entry of metrics.jsonl that `from_entry` reads: the seconds, and the time of day."""
    found = {f"{_PREFIX}{name}": round(value, 3) for name, value in seconds.items()}
    return {_UNIX: round(time.time(), 3), **found}


def from_entry(entry: Mapping[str, Any]) -> Seconds | None:
    """Returns the seconds of each activity that an entry records, or None if it was written without them."""
    if _UNIX not in entry:
        return None
    return {name: _number(entry.get(_PREFIX + name)) for name in ACTIVITIES}


def at_step(entries: Sequence[Mapping[str, Any]], step: int) -> Seconds:
    """Returns the seconds when the state of `step` was reached, by the last entry up to that step."""
    found = [entry for entry in entries if entry["step"] <= step and _UNIX in entry]
    return (from_entry(found[-1]) if found else None) or dict.fromkeys(ACTIVITIES, 0.0)


def carried_over(entries: Sequence[Mapping[str, Any]], step: int, started: float) -> Seconds:
    """Returns the seconds of all earlier starts, for a run that goes on at `step`.

    Steps and evaluations after `step` have to be done again: their time is lost. The time between the last entry and
    this start is away. It includes what the last start did after its last entry.

    Args:
      entries: all entries of metrics.jsonl, before those after `step` are dropped.
      step: the step that the run resumes from.
      started: when this start began, in seconds since 1970.
    """
    found = [entry for entry in entries if _UNIX in entry]
    if not found:
        return dict.fromkeys(ACTIVITIES, 0.0)
    last = found[-1]
    seconds = _moved(from_entry(last) or {}, at_step(entries, step))
    seconds[AWAY] += max(0.0, started - _number(last[_UNIX]))
    return seconds


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns the share of each activity. They sum to one. The share of `steps` is called goodput."""
    total = sum(seconds.values())
    return {name: value / total if total else 0.0 for name, value in seconds.items()}


def describe(seconds: Mapping[str, float]) -> str:
    """Returns one line with the total and all activities that take at least 0.5 % of it."""
    listed = [f"{name} {share:.0%}" for name, share in shares(seconds).items() if share >= 0.005]
    return f"{format_duration(sum(seconds.values()))} since the first start: " + ", ".join(listed)


def _moved(seconds: Mapping[str, float], kept: Mapping[str, float]) -> Seconds:
    """Returns the seconds with what exceeds `kept` counted as lost."""
    lost = {name: max(0.0, seconds[name] - kept[name]) for name in _REPEATED}
    rest = {name: value - lost.get(name, 0.0) for name, value in seconds.items()}
    return rest | {LOST: rest[LOST] + sum(lost.values())}


def _number(value: Any) -> float:
    """Returns a number of an entry; 0 for what is not a duration, because the file may be damaged."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value >= 0 else 0.0
