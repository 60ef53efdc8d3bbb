"""Waiting for batches: what is polled while the next one is not there."""

import time

from xception_jax.training.feed import polled


def slow(count):
    for number in range(count):
        time.sleep(0.7)  # longer than the time between two polls
        yield {"number": number}
    time.sleep(0.7)  # ending takes long, too
    raise AssertionError("nobody needs to know that there are no more")


def test_an_evaluation_is_polled_while_it_waits_and_not_after_its_last_batch():
    polls, seen = [], []
    for batch in polled(slow(2), 2, lambda: polls.append(len(seen))):
        seen.append(batch["number"])
    assert seen == [0, 1]
    assert set(polls) == {0, 1}  # none after both had come
