"""A lost process ends the others within the heartbeat, with code 75 and its name. Real processes, real signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, free_port
from xception_jax.errors import PreemptedError, StorageError

HEARTBEAT = 10


@pytest.fixture
def start(shared_environment):
    """Returns a function that starts processes by number, of three that know each other or of `count`."""
    address = f"localhost:{free_port()}"
    with contextlib.ExitStack() as stack:

        def start(
            *numbers: int, count: int = 3, timeout: int = 60, coordinator: str = address
        ) -> list[subprocess.Popen]:
            processes = []
            for number in numbers:
                fields = [coordinator, *map(str, (count, number, timeout, HEARTBEAT))]
                process = subprocess.Popen(
                    [sys.executable, "tests/processes/peer_program.py", *fields],
                    cwd=ROOT,
                    env=shared_environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                stack.enter_context(process)
                stack.callback(process.kill)
                processes.append(process)
            return processes

        yield start


def wait_until_they_work(processes):
    for process in processes:
        assert any(line == "working\n" for line in process.stdout)  # after lines of the library for collectives


@pytest.mark.parametrize(
    ("number", "signum"),
    [
        (0, signal.SIGKILL),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.faults),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.faults),
        pytest.param(2, signal.SIGSTOP, marks=pytest.mark.faults),
    ],
)
def test_the_others_end_resumable_and_name_it(start, number, signum):
    processes = start(0, 1, 2)
    wait_until_they_work(processes)
    os.kill(processes[number].pid, signum)
    began = time.monotonic()
    for process in processes[:number] + processes[number + 1 :]:
        _, errors = process.communicate(timeout=10 * HEARTBEAT)
        assert process.returncode == PreemptedError.exit_code, errors
        assert f"lost process {number} of 3" in errors
        assert "resumes from the last checkpoint" in errors
    assert time.monotonic() - began < 3 * HEARTBEAT


@pytest.mark.faults
def test_process_0_does_not_take_itself_for_lost(start):
    """While it is stopped, it hears of nobody, and nobody of it."""
    processes = start(0, 1, 2)
    wait_until_they_work(processes)
    os.kill(processes[0].pid, signal.SIGSTOP)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert processes[2].wait(timeout=10 * HEARTBEAT) == PreemptedError.exit_code
    os.kill(processes[0].pid, signal.SIGCONT)
    _, errors = processes[0].communicate(timeout=10 * HEARTBEAT)
    assert processes[0].returncode == PreemptedError.exit_code, errors
    assert "lost processes 1, 2 of 3; this is process 0" in errors


@pytest.mark.parametrize("alone", [{"coordinator": ""}, {}], ids=["off", "one process"])
def test_a_process_without_others_that_aborts_has_crashed(start, alone):
    """It must not end with 75, after which launchers start the same command again."""
    (process,) = start(0, count=1, **alone)
    wait_until_they_work([process])
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT, errors
    assert "connect" not in errors


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_aborts_blames_no_other(start, number):
    processes = start(0, 1, 2)
    wait_until_they_work(processes)
    processes[number].send_signal(signal.SIGUSR1)
    _, errors = processes[number].communicate(timeout=60)
    assert processes[number].returncode == PreemptedError.exit_code, errors
    assert f"or this process aborted (see above); this is process {number} of 3" in errors
    assert "lost process" not in errors


def test_a_disk_that_fails_in_one_process_ends_all_with_its_code(start):
    processes = start(0, 1, 2)
    wait_until_they_work(processes)
    processes[1].send_signal(signal.SIGUSR2)
    outcomes = [(*process.communicate(timeout=10 * HEARTBEAT), process.returncode) for process in processes]
    assert [code for *_, code in outcomes] == [StorageError.exit_code] * 3, outcomes
    assert "a file cannot be read or written" in outcomes[1][1]
    for number in (0, 2):
        assert f"process 1 has ended with code {StorageError.exit_code}" in outcomes[number][1]


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_ends_a_process_that_has_just_connected(start, count):
    """JAX replaces the handler of SIGTERM while it connects, before a run installs one of its own."""
    processes = start(*range(count), count=count)
    wait_until_they_work(processes)
    processes[0].terminate()
    _, errors = processes[0].communicate(timeout=30)
    assert processes[0].returncode == PreemptedError.exit_code, errors
    assert errors.endswith(
        "stopped by SIGTERM; no trained step is lost\n  where: the start of the program\n"
        "  next:  run the same command to resume\n"
    )


def assert_named_as_missing(processes, missing):
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == PreemptedError.exit_code, errors
        assert f"\n{missing} did not connect within 3 s\n" in errors


def test_a_process_that_never_starts_is_named(start):
    """The one that waits, the coordinator or another, ends within its timeout."""
    assert_named_as_missing(start(0, timeout=3), "processes 1, 2")


@pytest.mark.faults
@pytest.mark.parametrize(("started", "missing"), [((0, 2), "process 1"), ((1, 2), "process 0"), ((1,), "process 0")])
def test_all_that_wait_name_those_that_never_start(start, started, missing):
    assert_named_as_missing(start(*started, timeout=3), missing)
