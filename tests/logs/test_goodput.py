"""Every second of a run belongs to one activity, also over several starts."""

from __future__ import annotations

import contextlib
import math

import pytest

from xception_jax.logs import goodput
from xception_jax.logs.goodput import AWAY, EVALUATION, INPUT, LOST, SAVING, START, STEPS, Stopwatch


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def entry(step, time, **seconds):
    return {"step": step, "split": "train", "time": time} | {f"time_{name}": value for name, value in seconds.items()}


def test_nested_activities_add_up():
    clock = Clock()
    stopwatch = Stopwatch(-5.0, clock=clock)
    with stopwatch.during(STEPS):
        clock.now = 1.0
        with stopwatch.during(INPUT):
            clock.now = 3.0
        with contextlib.suppress(ValueError), stopwatch.during(SAVING):
            clock.now = 4.0
            raise ValueError("a save failed")
        clock.now = 10.0
        assert stopwatch.activity == STEPS
        spent = stopwatch.seconds()
    expected = {START: 5.0, STEPS: 7.0, INPUT: 2.0, SAVING: 1.0}
    assert spent == dict.fromkeys(goodput.ACTIVITIES, 0.0) | expected
    assert goodput.shares(spent)[STEPS] == pytest.approx(7 / 15)
    assert goodput.describe(spent) == "15s since the first start: steps 47%, input 13%, saving 7%, start 33%"


def test_steps_after_the_checkpoint_are_lost_and_the_gap_is_away():
    entries = [
        entry(0, 100.0, start=10.0),
        entry(10, 130.0, start=10.0, steps=25.0, input=5.0),
        entry(10, 135.0, start=10.0, steps=25.0, input=5.0, evaluation=5.0),
        entry(20, 160.0, start=10.0, steps=45.0, input=9.0, evaluation=5.0, saving=1.0),
    ]
    spent = goodput.carried_over(entries, 10, 200.0)
    assert spent == {
        **{STEPS: 25.0, INPUT: 5.0, EVALUATION: 5.0, SAVING: 1.0},
        **{START: 10.0, LOST: 24.0, AWAY: 40.0},
    }
    # The second start gets to step 15, and the third falls back to step 0.
    entries = [*entries[:3], entry(10, 200.0, **spent), entry(15, 230.0, **spent | {STEPS: 35.0, START: 30.0})]
    spent = goodput.carried_over(entries, 0, 230.0)
    assert spent == {
        **{STEPS: 0.0, INPUT: 0.0, EVALUATION: 0.0, SAVING: 1.0},
        **{START: 30.0, LOST: 69.0, AWAY: 40.0},
    }


def test_a_rollback_loses_what_follows_the_checkpoint():
    clock = Clock()
    stopwatch = Stopwatch(0.0, clock=clock)
    with stopwatch.during(STEPS):
        clock.now = 7.0
        stopwatch.lose(goodput.at_step([entry(4, 1.0, steps=4.0), entry(6, 2.0, steps=6.0)], 5))
        assert (stopwatch.seconds()[STEPS], stopwatch.seconds()[LOST]) == (4.0, 3.0)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{"step": 1, "split": "train", "loss": 1.0}],  # of an earlier version
        [{"step": 1, "split": "train", "time": [1, 2], "time_steps": math.nan, "time_lost": -5}],
        [entry(1, 1e9, steps=math.inf)],  # and the clock was set back
    ],
)
def test_entries_without_usable_seconds_count_as_nothing(entries):
    spent = goodput.carried_over(entries, 1, 100.0)
    assert sum(value for name, value in spent.items() if name != AWAY) == 0
    assert 0 <= spent[AWAY] <= 100
    assert set(goodput.shares(dict.fromkeys(spent, 0.0)).values()) == {0.0}


def test_an_entry_has_what_is_read_again():
    spent = dict(zip(goodput.ACTIVITIES, range(7), strict=True))
    assert goodput.from_entry(goodput.to_entry(spent)) == spent
    assert goodput.from_entry({"step": 1}) is None
