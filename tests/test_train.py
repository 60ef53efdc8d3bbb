"""The whole program as a user runs it: real processes, real data, real signals."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import NEWER_CODE, ROOT, free_port
from tests.tiny_run import TINY, three_lines
from xception_jax.logs import goodput
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.metrics.predictions import load_predictions

STEPS = 60


def sha256(output: str) -> str:
    return re.search("state sha256: ([0-9a-f]{64})", output)[1]


@pytest.fixture(scope="module")
def uninterrupted(run_python, tmp_path_factory):
    """(work directory, standard output) of a run that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    process = run_python("train.py", *TINY, f"--workdir={workdir}")
    assert process.returncode == 0, process.stderr
    return workdir, process


def test_a_run_leaves_what_it_promises(uninterrupted):
    workdir, process = uninterrupted
    for pattern in ("test top-1 accuracy.*: 0\\.\\d{4} \\(333 images", f"report: {workdir}", f"checkpoint: {workdir}"):
        assert re.search(pattern, process.stdout), process.stdout
    for words in ("parameters", "multiply-adds", "fashion_mnist_subset, 10 classes", "test[:333] 333", "steps    60"):
        assert words in process.stderr
    assert re.search(
        r"step 60/60  loss [\d.]+  0s left  [\d,.]+ images/s  epoch 3\.00  lr \S+  input \d+%", process.stderr
    )
    assert not re.search("[\x1b\r]", process.stderr)  # plain lines where there is no terminal

    entries = read_metrics(workdir / "metrics.jsonl")
    steps = {
        split: [entry["step"] for entry in entries if entry["split"] == split] for split in ("train", "dev", "test")
    }
    assert steps == {"train": list(range(5, 61, 5)), "dev": [30, 60], "test": [60]}
    test = entries[-1]
    assert test["count"] == 333
    assert 0 <= test["top1"] <= test["top5"] <= 1
    predictions = load_predictions(workdir / "predictions_test.npz")
    np.testing.assert_array_equal(predictions.index, np.arange(333))
    assert predictions.right.mean() == pytest.approx(test["ema_top1"])

    report = (workdir / "report.html").read_text()
    assert "Ankle boot" in report
    assert "data:image/png;base64" in report
    assert not re.search(r"""(src|href)=["']https?://""", report)
    saved = json.loads((workdir / "config.json").read_text())
    assert (saved["batch_size"], saved["model"]["width_multiplier"]) == (32, 0.05)
    assert int(max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name)).name) == STEPS


def test_evaluate_gives_what_the_run_measured(uninterrupted, run_python, tmp_path):
    workdir, _ = uninterrupted
    file = tmp_path / "predictions.npz"
    # Another batch size, which does not divide 333: exact all the same.
    process = run_python(
        "-m", "xception_jax", "evaluate", workdir, "--batch_size=64", "--json", f"--predictions={file}"
    )
    assert process.returncode == 0, process.stderr
    got, test = json.loads(process.stdout), read_metrics(workdir / "metrics.jsonl")[-1]
    for name in ("top1", "top5", "ema_top1", "ema_top5", "count", "step", "split"):
        assert got[name] == (test[name] if name != "split" else "test[:333]")
    assert got["loss"] == pytest.approx(test["loss"], rel=1e-4)
    saved, original = load_predictions(file), load_predictions(workdir / "predictions_test.npz")
    np.testing.assert_array_equal(saved.label, original.label)
    np.testing.assert_allclose(saved.probabilities, original.probabilities, atol=1e-5)

    missing = run_python("-m", "xception_jax", "evaluate", tmp_path)
    assert missing.returncode == 66
    three_lines(missing)


def test_a_finished_run_says_the_same_again(uninterrupted, run_python):
    workdir, process = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run_python("train.py", *TINY, f"--workdir={workdir}")
    assert again.returncode == 0, again.stderr
    assert sha256(again.stdout) == sha256(process.stdout)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def start(environment, workdir, *arguments):
    return subprocess.Popen(
        [sys.executable, "train.py", *TINY, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, step):
    """Reads the progress of a run until it has taken `step` steps."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        found = re.match(r"step (\d+)/", line)
        if found and int(found[1]) >= step:
            return
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_kill_minus_9_and_sigterm_and_the_same_command_end_with_the_same_bits(
    uninterrupted, run_python, shared_environment, tmp_path
):
    rng = random.Random(0)

    def kill_near(step):
        process = start(shared_environment, tmp_path)
        wait_for_step(process, step)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()

    kill_near(rng.randrange(5, 20))

    process = start(shared_environment, tmp_path)
    wait_for_step(process, 25)
    process.send_signal(signal.SIGSTOP)  # so that it does not end before the second is refused
    second = run_python("train.py", *TINY, f"--workdir={tmp_path}")
    process.send_signal(signal.SIGCONT)
    assert second.returncode == 73
    assert str(process.pid) in " ".join(three_lines(second))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    step = int(re.search(r"after step (\d+), which is saved", errors)[1])
    assert (tmp_path / "checkpoints" / str(step) / "manifest.json").exists()

    kill_near(rng.randrange(step, STEPS))
    process = run_python("train.py", *TINY, f"--workdir={tmp_path}")
    assert process.returncode == 0, process.stderr
    assert sha256(process.stdout) == sha256(uninterrupted[1].stdout)

    def journal(workdir):
        names = ("step", "split", "loss", "ema_top1", "learning_rate")
        entries = [e for e in read_metrics(workdir / "metrics.jsonl") if e["split"] not in ("interval", "start")]
        return [tuple(e.get(name) for name in names) for e in entries]

    assert journal(tmp_path) == journal(uninterrupted[0])  # each entry once, none lost

    # Every second since the first start belongs to an activity, also in the steps that were done twice.
    entries = read_metrics(tmp_path / "metrics.jsonl")
    starts = [entry for entry in entries if entry["split"] == "start"]
    began = starts[0]["time"] - starts[0]["time_start"]
    for entry in entries:
        assert sum(goodput.from_entry(entry).values()) == pytest.approx(entry["time"] - began, abs=0.1)
    spent = goodput.from_entry(entries[-1])
    assert sum(goodput.shares(spent).values()) == pytest.approx(1)
    assert min(spent[name] for name in goodput.ACTIVITIES) > 0
    assert "since the first start: steps" in process.stderr


@pytest.mark.slow
def test_two_processes_learn_what_one_does(uninterrupted, shared_environment, tmp_path):
    coordinator = f"--config.distributed.coordinator=localhost:{free_port()}"
    environment = shared_environment | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {NEWER_CODE}"}
    pair = [
        start(
            environment,
            tmp_path,
            coordinator,
            "--config.distributed.num_processes=2",
            f"--config.distributed.process_id={number}",
        )
        for number in (0, 1)
    ]
    wait_for_step(pair[0], 5)
    for process in pair:
        process.kill()
        process.communicate()

    def first(workdir):
        return next(entry for entry in read_metrics(workdir / "metrics.jsonl") if entry["split"] == "train")

    assert first(tmp_path)["step"] == 5
    assert first(tmp_path)["loss"] == pytest.approx(first(uninterrupted[0])["loss"], rel=1e-3)
