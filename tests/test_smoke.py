"""A training run of three steps, and the pieces of it marked `smoke` in other files: see `make smoke`."""

from __future__ import annotations

import math

import pytest

from tests.tiny_run import TINY
from xception_jax.logs.metrics_log import read_metrics

pytestmark = pytest.mark.smoke


def test_a_run_of_three_steps_resumes(run_python, tmp_path):
    arguments = [
        "train.py",
        *TINY,
        f"--workdir={tmp_path}",
        "--config.data.eval_split=",
        "--config.data.test_split=test[:50]",
        "--config.evaluation.batch_size=50",
        "--config.log_every=1 step",
    ]
    first = run_python(*arguments, "--config.duration=1 step")
    assert first.returncode == 0, first.stderr
    second = run_python(*arguments, "--config.duration=3 steps")
    assert second.returncode == 0, second.stderr
    assert "resumed at 1" in second.stderr
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries if entry["split"] == "train"] == [1, 2, 3]
    assert all(math.isfinite(entry["loss"]) for entry in entries if entry["split"] in ("train", "test"))
    assert entries[-1]["count"] == 50
