"""A signal to one of two hosts ends both with 75 after the same step, whatever they are doing. Real signals."""

from __future__ import annotations

import re
import signal
import time

import pytest

from tests.processes.conftest import ended
from xception_jax.logs.metrics_log import read_metrics

EVALUATION = ["--config.evaluation.every=4 steps", "--config.evaluation.batch_size=20"]
STALLING = "tests/processes/stalling_train.py"


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


def stop_stalled(train_pair, *stalls, victim, arguments=(), ready=lambda: True):
    """Starts two hosts that stall, and signals one of them when those that do have stalled, and `ready` is true."""
    pair = train_pair(*([*EVALUATION, *arguments, stall] for stall in stalls), program=STALLING)
    for process, stall in zip(pair, stalls, strict=True):
        if stall != "never":
            read_until(process, "stalled")
    while not ready():
        assert all(process.poll() is None for process in pair), ended(pair)
        time.sleep(0.05)
    pair[victim].send_signal(signal.SIGTERM)
    return pair


def assert_stopped_alike(pair, victim):
    """Returns the step after which both have stopped."""
    outcomes = ended(pair)
    assert [code for *_, code in outcomes] == [75, 75], outcomes
    messages = [re.search(r"stopped by (.*) after step (\d+), which is saved", errors) for _, errors, _ in outcomes]
    assert None not in messages, outcomes
    assert messages[victim][1] == "SIGTERM"
    assert messages[1 - victim][1] == "a signal to another process"
    assert messages[0][2] == messages[1][2]
    return int(messages[0][2])


@pytest.mark.slow
def test_in_an_evaluation_whose_input_does_not_come(train_pair, tmp_path):
    pair = stop_stalled(train_pair, "evaluation:5", "evaluation:5", victim=1)
    assert assert_stopped_alike(pair, 1) == 4
    assert (tmp_path / "run/checkpoints/4/manifest.json").exists()
    assert "dev" not in {entry["split"] for entry in read_metrics(tmp_path / "run/metrics.jsonl")}


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_in_a_wait_for_input(train_pair, tmp_path, victim):
    metrics = tmp_path / "run/metrics.jsonl"
    pair = stop_stalled(
        train_pair,
        "train:7",
        "train:7",
        victim=victim,
        arguments=["--config.log_every=1 steps"],
        ready=lambda: any(entry["step"] == 5 for entry in read_metrics(metrics)),  # recorded when step 6 is under way
    )
    assert assert_stopped_alike(pair, victim) == 6
    assert (tmp_path / "run/checkpoints/6/manifest.json").exists()


@pytest.mark.faults
@pytest.mark.parametrize("stalls", [("train:7", "never"), ("evaluation:5", "never"), ("never", "evaluation:5")])
@pytest.mark.parametrize("victim", [0, 1])
def test_while_one_waits_for_input_and_the_other_for_that_one(train_pair, tmp_path, stalls, victim):
    pair = stop_stalled(train_pair, *stalls, victim=victim)
    (tmp_path / "go").touch()
    step = assert_stopped_alike(pair, victim)
    assert (tmp_path / f"run/checkpoints/{step}/manifest.json").exists()


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("stalls", [("report", "report"), ("report", "never")])
def test_in_the_report(train_pair, tmp_path, stalls, victim):
    pair = stop_stalled(train_pair, *stalls, victim=victim, arguments=["--config.duration=8 steps"])
    outcomes = ended(pair)
    assert [code for *_, code in outcomes] == [75, 75], outcomes
    assert "no trained step is lost" in outcomes[victim][1]
    assert (tmp_path / "run/checkpoints/8/manifest.json").exists()


@pytest.mark.faults
def test_before_the_first_step(train_pair, tmp_path):
    pair = stop_stalled(train_pair, "train:1", "train:1", victim=1)
    outcomes = ended(pair)
    assert [code for *_, code in outcomes] == [75, 75], outcomes
    assert "no trained step is lost" in outcomes[1][1]
