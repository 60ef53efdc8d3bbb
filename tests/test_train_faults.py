"""A run that is disturbed from outside at every moment of its life ends with a promised code, and soon."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tiny_run import TINY

SOON = 20.0  # seconds; alone on a machine it is less than two


class Run:
    """A training process whose messages go to a file, so that nobody who inherits it keeps a reader waiting."""

    def __init__(self, environment, workdir, log, *arguments, **options):
        self.log, self.workdir = log, workdir
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "train.py", *TINY, f"--workdir={workdir}", *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                **options,
            )

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + 120
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait_for_handlers(self) -> None:
        """Waits until the process handles SIGTERM, which it does before its first slow import."""
        caught, deadline = 0, time.monotonic() + 120
        while not caught & 1 << (signal.SIGTERM - 1):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        assert "libjax" not in Path(f"/proc/{self.process.pid}/maps").read_text()

    def end(self, code: int, seconds: float = SOON) -> str:
        """Waits for the end, and returns what the run printed."""
        try:
            self.process.wait(timeout=seconds)
        finally:
            self.process.kill()
        text = self.log.read_text()
        assert self.process.returncode == code, text
        assert "Traceback" not in text
        assert "Exception ignored" not in text
        return text

    def workers(self) -> list[int]:
        lists = Path(f"/proc/{self.process.pid}/task").glob("*/children")  # of each thread that has started some
        children = [child for path in lists for child in path.read_text().split()]
        found = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        assert found
        return found


@pytest.fixture
def start(shared_environment, tmp_path):
    runs = []

    def start(*arguments, **options):
        runs.append(Run(shared_environment, tmp_path / "run", tmp_path / f"{len(runs)}.log", *arguments, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


def has_state(text: str) -> bool:
    return re.search(r"after step \d+, which is saved", text) is not None


EVERY_STEP = "--config.log_every=1 steps"


@pytest.mark.parametrize("seconds", [0.0, 0.7, pytest.param(1.5, marks=pytest.mark.faults)])
def test_a_signal_before_training_ends_it_with_75(seconds, start):
    run = start()
    run.wait_for_handlers()
    time.sleep(seconds)  # imports
    run.process.send_signal(signal.SIGTERM if seconds < 0.5 else signal.SIGINT)
    text = run.end(75)
    assert "no trained step is lost" in text
    assert not has_state(text)


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["workdir", "compiling the training step", "writing the report"])
def test_a_signal_where_nothing_can_be_lost(moment, start):
    run = start()
    run.wait_for({"writing the report": "test: top1", "workdir": "  workdir "}.get(moment, moment))
    run.process.send_signal(signal.SIGTERM)
    assert "no trained step is lost" in run.end(75)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("step 30/", marks=pytest.mark.faults),  # an evaluation follows
        "step 60/",  # an evaluation and the last save follow
    ],
)
def test_a_signal_in_an_evaluation_and_in_the_last_save(moment, start):
    run = start(EVERY_STEP)
    run.wait_for(moment)
    run.process.send_signal(signal.SIGTERM)
    text = run.end(75)
    step = int(re.search(r"after step (\d+), which is saved", text)[1]) if has_state(text) else 60
    assert (run.workdir / "checkpoints" / str(step)).is_dir()


@pytest.mark.faults
def test_a_signal_while_all_workers_are_stuck(start):
    run = start("--config.data.workers=2", "--config.duration=1000 epochs")
    run.wait_for("step 10/")
    workers = run.workers()
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        time.sleep(1)
        run.process.send_signal(signal.SIGTERM)
        assert has_state(run.end(75))
    finally:
        for worker in workers:
            try:
                os.kill(worker, signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.mark.faults
def test_killed_workers_end_a_run_with_74_within_half_a_minute(start):
    run = start("--config.data.workers=2", "--config.duration=1000 epochs")
    run.wait_for("step 10/")
    for worker in run.workers():
        os.kill(worker, signal.SIGKILL)
    assert "loading data failed" in run.end(74, 30)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["report.html", "predictions_test.npz"])
def test_a_result_that_cannot_be_written_is_74(name, start):
    run = start()
    run.workdir.mkdir()
    (run.workdir / name).mkdir()
    assert re.search(rf"cannot be written: .*\n  where: .*{name}", run.end(74, 120))


@pytest.mark.faults
def test_trackers_and_profiles_that_cannot_be_written_cost_one_line(start):
    run = start("--config.profile=3", "--config.logs.tensorboard=True")
    run.workdir.mkdir()
    (run.workdir / "profile").touch()
    (run.workdir / "tensorboard").touch()
    text = run.end(0, 120)
    assert text.count("no profile, training goes on") == 1
    assert text.count("TensorBoard is off") == 1


@pytest.mark.faults
def test_files_that_may_not_grow_are_74(start):
    limit = 100_000  # a checkpoint is larger, and everything before it smaller
    run = start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    text = run.end(74, 120)
    assert len(text[text.index("error: ") :].splitlines()) == 3
