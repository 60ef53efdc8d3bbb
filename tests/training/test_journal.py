"""Final results if metrics could not be written, and the wall time if work was lost."""

from __future__ import annotations

import json
import re
import resource
import shutil
from statistics import fmean

import pytest

import xception_jax
from tests.tiny_run import TINY
from tests.training.test_changed_fields import config_of
from xception_jax.logs.metrics_log import read_metrics


@pytest.mark.slow
def test_the_final_results_are_those_that_could_not_be_written(run_python, tmp_path):
    """As in a directory with a quota. An earlier end of the run has left a result in the file."""
    run = ["train.py", *TINY, f"--workdir={tmp_path}", "--config.log_every=1 steps"]
    first = run_python(*run, "--config.duration=20 steps")
    assert first.returncode == 0, first.stderr
    metrics = tmp_path / "metrics.jsonl"
    with metrics.open("a") as file:  # all other files of the run are smaller than this one
        file.write(json.dumps({"step": 0, "split": "padding", "values": [0] * 1_000_000}) + "\n")
    limit = metrics.stat().st_size + 1_000

    def limit_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    second = run_python(*run, "--config.duration=40 steps", preexec_fn=limit_size)
    assert second.returncode == 0, second.stderr
    assert re.search(r"metrics.jsonl: \d+ entries could not be written", second.stderr)
    assert "test" not in {entry["split"] for entry in read_metrics(metrics) if entry["step"] > 20}
    measured = re.search(r"step 40  test: top1 (\S+)", second.stderr)[1]
    shown = f"test top-1 accuracy: {measured} (333 images"
    assert shown in second.stdout
    assert shown not in first.stdout
    assert f"{float(measured):.2%}".replace("%", "\N{NO-BREAK SPACE}%") in (tmp_path / "report.html").read_text()


def test_the_wall_time_has_the_work_that_was_lost(tmp_path, shared_environment):
    """The run is killed after the checkpoint of step 7, and had taken 1,000 seconds until then."""
    config = config_of(shared_environment, logs__tensorboard=False)
    xception_jax.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    metrics = tmp_path / "metrics.jsonl"
    *kept, last = map(json.loads, metrics.read_text().splitlines())
    assert last["step"] == 12
    metrics.write_text("".join(json.dumps(entry) + "\n" for entry in [*kept, last | {"seconds": 1_000.0}]))
    xception_jax.train(config, tmp_path)
    after = [entry["seconds"] for entry in read_metrics(metrics) if entry["step"] > 7]
    assert len(after) == len(set(after)) > 1
    assert min(after) > 1_000


def test_an_entry_is_the_mean_of_its_steps(tmp_path, shared_environment):
    found = {}
    for every in (1, 4):
        config = config_of(shared_environment, log_every=f"{every} steps", duration="4 steps", logs__tensorboard=False)
        xception_jax.train(config, tmp_path / str(every))
        entries = read_metrics(tmp_path / str(every) / "metrics.jsonl")
        found[every] = [entry for entry in entries if entry["split"] == "train" and entry["step"] > 0]
    (mean,) = (entry for entry in found[4] if entry["step"] == 4)
    steps = found[1][-4:]
    assert len({entry["loss"] for entry in steps}) == 4
    for name in ("loss", "top1"):
        assert mean[name] == pytest.approx(fmean(entry[name] for entry in steps), rel=1e-5)
