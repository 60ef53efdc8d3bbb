"""Real processes that train in gs://: killed, stopped, in pairs, two at once, and on a store that fails."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import NEWER_CODE, ROOT, free_port
from tests.storage.conftest import BUCKET
from tests.storage.gcs_requests import Fault
from tests.tiny_run import TINY

pytestmark = pytest.mark.faults

RUN = f"gs://{BUCKET}/run"
KILLS = 30


@pytest.fixture
def start(shared_environment, gcs, tmp_path):
    """Returns a function that starts a run in gs://. Its messages go to a file, and it is killed at the end."""
    started = []

    def start(*arguments: str, name: str = "messages", **environment: str) -> subprocess.Popen:
        with (tmp_path / name).open("w") as file:
            command = [sys.executable, "train.py", *TINY, f"--workdir={RUN}", *arguments]
            variables = shared_environment | gcs.environment() | environment
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def messages(tmp_path):
    """Returns a function that returns what a run has printed."""
    return lambda name="messages": (tmp_path / name).read_text()


@pytest.fixture
def on_disk(run_python, tmp_path):
    """Returns a function that trains in a local directory, and returns the SHA-256 of the final state."""

    def train(*arguments: str, **options) -> str:
        process = run_python("train.py", *TINY, f"--workdir={tmp_path / 'local'}", *arguments, **options)
        assert process.returncode == 0, process.stderr
        return sha256(process.stdout)

    return train


def sha256(text: str) -> str:
    return re.search("state sha256: ([0-9a-f]{64})", text)[1]


def names_in(gcs) -> set[str]:
    return {item["name"].removeprefix("run/") for item in gcs.objects.list(BUCKET, {})["items"]}


def wait_for(condition, process: subprocess.Popen, messages) -> None:
    while not condition():
        assert process.poll() is None, messages()
        time.sleep(0.02)


def committed(gcs, step: int):
    return lambda: f"checkpoints/{step}/commit_success.txt" in names_in(gcs)


def test_a_run_that_is_killed_is_resumed_at_once_on_the_same_machine(start, messages, gcs, on_disk):
    process = start()
    wait_for(committed(gcs, 20), process, messages)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert start().wait(200) == 0, messages()
    assert "which has ended" in messages()  # instead of watching the lease for 45 seconds
    assert sha256(messages()) == on_disk()


def test_thirty_kills_in_a_bucket_end_with_the_same_hash(start, messages, gcs, on_disk):
    """The moments are drawn from the time that a whole run takes, so some fall into imports and the report."""
    expected = on_disk()
    began = time.monotonic()
    assert start(f"--workdir=gs://{BUCKET}/other").wait(200) == 0
    seconds = time.monotonic() - began
    moments, killed = random.Random(0), 0
    for _ in range(10 * KILLS):
        process = start()
        try:
            assert process.wait(moments.uniform(0, seconds)) == 0, messages()
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        if killed == KILLS:
            break
    assert start().wait(200) == 0, messages()
    assert sha256(messages()) == expected
    assert killed == KILLS


def test_sigterm_saves_and_releases_the_lease(start, messages, gcs):
    process = start("--config.duration=200 epochs")
    wait_for(committed(gcs, 20), process, messages)
    process.terminate()
    assert process.wait(100) == 75, messages()
    step = int(
        re.search(r"stopped by SIGTERM after step (\d+), which is saved\n  where: gs://bucket/run\n", messages())[1]
    )
    assert f"checkpoints/{step}/manifest.json" in names_in(gcs)
    lease = json.loads(gcs.objects.get(BUCKET, "run/lease", {}).content)
    assert lease["released"]


def test_a_frozen_run_that_was_taken_over_completes_no_further_step(start, messages, gcs):
    frozen = start("--config.duration=200 epochs")
    wait_for(committed(gcs, 20), frozen, messages)
    os.kill(frozen.pid, signal.SIGSTOP)
    second = start(name="second")
    assert second.wait(300) == 0, messages("second")
    assert "taking over from" in messages("second")
    before = names_in(gcs)
    os.kill(frozen.pid, signal.SIGCONT)
    assert frozen.wait(100) == 73, messages()
    assert "has taken over the work directory" in messages()
    # If it was frozen after the renewal of a commit, the commit still ends. Without its manifest, the step is not used.
    assert not {name for name in names_in(gcs) - before if name.endswith("manifest.json")}
    third = start(name="third")
    assert third.wait(300) == 0, messages("third")
    assert sha256(messages("third")) == sha256(messages("second"))


def test_two_runs_race_for_one_directory(start, messages, gcs):
    pair = [start(name="first"), start(name="second")]
    codes = sorted(process.wait(200) for process in pair)
    assert codes == [0, 73], messages("first") + messages("second")
    (loser,) = [name for name in ("first", "second") if "error: " in messages(name)]
    assert "another run holds the work directory" in messages(loser)
    assert f"where: {RUN}: process " in messages(loser)


def test_two_processes_have_the_bits_of_two_on_a_disk(start, messages, gcs, tmp_path):
    def train_pair(workdir: str) -> str:
        address = f"localhost:{free_port()}"
        flags = f"{os.environ['XLA_FLAGS']} {NEWER_CODE}"
        pair = []
        for number in (0, 1):
            distributed = {"coordinator": address, "num_processes": 2, "process_id": number}
            fields = [f"--config.distributed.{name}={value}" for name, value in distributed.items()]
            pair.append(start(f"--workdir={workdir}", *fields, name=f"process{number}", XLA_FLAGS=flags))
        assert [process.wait(300) for process in pair] == [0, 0], messages("process0") + messages("process1")
        ends = [
            re.search("test top-1 accuracy(.*\n)+?report: .*", messages(name))[0] for name in ("process0", "process1")
        ]
        assert ends[0] == ends[1]
        return sha256(messages("process0"))

    assert train_pair(RUN) == train_pair(str(tmp_path / "pair"))
    assert "checkpoints/60/manifest.json" in names_in(gcs)


@pytest.mark.parametrize("seed", range(2))
def test_a_store_that_fails_now_and_then_costs_only_time(start, messages, gcs, on_disk, seed):
    rng = random.Random(seed)
    kinds = [Fault(status=503), Fault(status=429), Fault(cut=True), Fault(lost=True), Fault(delay=2)]
    gcs.control = lambda request: rng.choice(kinds) if rng.random() < 0.03 else None
    assert start().wait(400) == 0, messages()
    assert sha256(messages()) == on_disk()


@pytest.mark.parametrize("status", [503, 403])
def test_a_store_that_goes_away_ends_the_run_and_the_next_resumes(start, messages, gcs, on_disk, status):
    gone = {"yes": False}
    gcs.control = lambda request: Fault(status=status) if gone["yes"] else None
    process = start()
    wait_for(committed(gcs, 20), process, messages)
    gone["yes"] = True
    assert process.wait(400) in (73, 74), messages()
    assert "Traceback" not in messages()
    gone["yes"] = False
    assert start().wait(200) == 0, messages()
    assert sha256(messages()) == on_disk()
