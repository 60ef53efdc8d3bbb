"""Kills a run repeatedly at random moments, and compares its final state with that of an undisturbed run."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.tiny_run import TINY

KILLS = 30


@pytest.fixture
def start(shared_environment, tmp_path):
    """Returns a function that starts the run, whose messages go to a file."""

    def start(**environment):
        with (tmp_path / "messages").open("w") as file:
            command = [sys.executable, "train.py", *TINY, f"--workdir={tmp_path / 'run'}"]
            return subprocess.Popen(
                command, cwd=ROOT, env=shared_environment | environment, stdout=subprocess.DEVNULL, stderr=file
            )

    return start


def finish(run_python, workdir):
    process = run_python("train.py", *TINY, f"--workdir={workdir}")
    assert process.returncode == 0, process.stderr
    return re.search("state sha256: ([0-9a-f]{64})", process.stdout)[1]


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.faults
def test_killed_while_compiling(start, run_python, tmp_path):
    empty = tmp_path / "compiled"
    process = start(JAX_COMPILATION_CACHE_DIR=str(empty))
    while "compiling the training step" not in (tmp_path / "messages").read_text():
        assert process.poll() is None, (tmp_path / "messages").read_text()
        time.sleep(0.02)
    kill(process)
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert finish(run_python, tmp_path / "run") == finish(run_python, tmp_path / "other")


@pytest.mark.faults
def test_thirty_kills_end_with_the_same_hash(start, run_python, tmp_path):
    """The moments are drawn from the time that a whole run takes, so some fall into imports and the report."""
    began = time.monotonic()
    expected = finish(run_python, tmp_path / "other")
    seconds = time.monotonic() - began
    moments = random.Random(0)
    killed = 0
    for _ in range(10 * KILLS):
        process = start()
        try:
            process.wait(timeout=moments.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)  # it may have ended at just this moment
        assert process.wait() in (0, -signal.SIGKILL), (tmp_path / "messages").read_text()
        killed += process.returncode == -signal.SIGKILL
        if killed == KILLS:
            break
    assert finish(run_python, tmp_path / "run") == expected
    assert killed == KILLS
