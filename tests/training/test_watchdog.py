"""A run in which no step ends any more ends itself with 75 and its stacks, and no other run does."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, free_port
from tests.test_train_faults import Run
from tests.tiny_run import TINY
from xception_jax.config import resolve
from xception_jax.errors import ConfigError
from xception_jax.training.watchdog import _append

LIMIT = 2  # of watchdog_program.py


@pytest.fixture
def start(shared_environment, tmp_path):
    """Returns a function that starts the program, which goes through all that takes longer than the limit first."""
    with contextlib.ExitStack() as stack:

        def start(moment):
            command = [sys.executable, "tests/training/watchdog_program.py", str(tmp_path), moment]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=shared_environment, **pipes))
            stack.callback(process.kill)
            return process

        yield start


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


@pytest.mark.slow
def test_only_a_step_that_does_not_end_ends_the_process(start, tmp_path):
    process = start("stopped")
    while not is_stopped(process.pid):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(2 * LIMIT)  # the time that must not count
    process.send_signal(signal.SIGCONT)
    assert process.stdout.readline() == "goes on\n"
    assert process.stdout.readline() == "stuck\n"
    continued = time.monotonic()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert time.monotonic() - continued > LIMIT - 0.5
    what, where, following = errors.splitlines()[:3]
    assert re.fullmatch(r"no step has ended for \d s, \d\d times the median; after step 2, in: waiting for input", what)
    assert where == f"  where: {tmp_path / 'stacks_0.txt'}"
    assert following.startswith("  next:  run the same command to resume")
    for text in (errors, (tmp_path / "stacks_0.txt").read_text()):
        assert re.search(r"Thread 0x\w+ \(most recent call first\):\n.*watchdog_program.py", text)
        assert what in text


@pytest.mark.slow
def test_the_first_step_may_take_longer(start):
    process = start("first")
    assert process.stdout.readline() == "stuck\n"
    stuck = time.monotonic()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75, errors
    assert time.monotonic() - stuck > 5 * LIMIT


def test_a_file_in_the_place_of_the_stacks_is_not_followed(tmp_path):
    (tmp_path / "precious").touch()
    (tmp_path / "stacks_0.txt").symlink_to("precious")
    os.mkfifo(tmp_path / "stacks_1.txt")
    for number in (0, 1):
        with pytest.raises(OSError, match=r"Too many levels|No such device"):
            _append(tmp_path / f"stacks_{number}.txt", b"message\n")
    assert (tmp_path / "precious").read_bytes() == b""


def test_it_can_be_turned_off():
    assert resolve({"watchdog": {"factor": 0}}).watchdog.factor == 0
    with pytest.raises(ConfigError, match="has no effect"):
        resolve({"watchdog": {"factor": 0, "min_seconds": 5}})


@pytest.mark.faults
def test_a_thread_that_holds_the_global_lock_is_no_obstacle(start):
    process = start("holding")
    assert process.stdout.readline() == "stuck\n"
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "watchdog_program.py" in errors


@pytest.mark.faults
def test_a_process_waits_for_the_save_of_another_one_but_not_for_ever(shared_environment, tmp_path):
    address = f"localhost:{free_port()}"
    with contextlib.ExitStack() as stack:
        pair = []
        for number in (0, 1):
            command = [sys.executable, "tests/training/watched_pair_program.py", address, str(number), str(tmp_path)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            pair.append(stack.enter_context(subprocess.Popen(command, cwd=ROOT, env=shared_environment, **pipes)))
            stack.callback(pair[-1].kill)
        for process in pair:
            assert any(line == "working\n" for line in process.stdout), process.communicate()
        pair[1].send_signal(signal.SIGSTOP)
        _, errors = pair[0].communicate(timeout=600)
        pair[1].send_signal(signal.SIGCONT)
        assert pair[0].returncode == 75, errors
        assert re.search(r"no step has ended for .* in: training steps \(process 0 of 2\)", errors)
        assert "watched_pair_program.py" in (tmp_path / "stacks_0.txt").read_text()
        _, errors = pair[1].communicate(timeout=600)
        assert pair[1].returncode == 75, errors
        assert "lost process 0 of 2" in errors


WATCHED = ("--config.watchdog.min_seconds=4", "--config.duration=1000 epochs", "--config.checkpoint.every=10 steps")


@pytest.mark.faults
def test_a_run_whose_data_workers_are_frozen(shared_environment, run_python, tmp_path):
    arguments = ("--config.data.workers=2", "--config.log_every=1 steps", *WATCHED)
    run = Run(shared_environment, tmp_path / "run", tmp_path / "log", *arguments)
    workers = []
    try:
        run.wait_for("saved checkpoint")
        workers = run.workers()
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        text = run.end(75, 120)
    finally:
        run.process.kill()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
    assert re.search(r"no step has ended for .* in: waiting for input", text)
    while any(os.path.exists(f"/proc/{worker}/exe") for worker in workers):  # frozen ones would never end
        time.sleep(0.05)
    assert "feed.py" in (tmp_path / "run" / "stacks_0.txt").read_text()
    step = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*") if path.name.isdigit())
    again = run_python("train.py", *TINY, f"--config.duration={step + 20} steps", f"--workdir={tmp_path / 'run'}")
    assert again.returncode == 0, again.stderr
    assert "resumed at" in again.stderr
