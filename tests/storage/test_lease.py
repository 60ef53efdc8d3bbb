"""The lease, held by real processes that are killed, frozen and cut off from the store."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from tests.conftest import ROOT
from tests.storage.conftest import BRISK, BUCKET
from tests.storage.gcs_objects import Objects
from tests.storage.gcs_requests import Fault
from xception_jax.errors import StorageError, WorkdirError
from xception_jax.storage import hold, open_store
from xception_jax.storage import lease as lease_module

TAKE_OVER = 1.5
PATIENT = 10  # a busy machine may keep a process from renewing for seconds
BUCKETS = ["gs", "s3"]


class Holder:
    """A process of lease_program.py."""

    def __init__(self, place: str, take_over_after: float = TAKE_OVER) -> None:
        command = [sys.executable, "-m", "tests.storage.lease_program", place, str(take_over_after)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def say(self) -> None:
        """Lets it go on: to acquire, and then to renew."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def line(self) -> str:
        """Returns the next line that it prints; '' at its end."""
        return self.process.stdout.readline().rstrip("\n")

    def acquire(self) -> str:
        """Lets it acquire, and returns the last line: 'held ...', or ''."""
        assert self.line() == "ready", self.process.stderr.read()
        self.say()
        line = self.line()
        while line and not line.startswith("held"):
            line = self.line()
        return line

    def end(self) -> tuple[int, str]:
        """Returns exit code and standard error."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        return self.process.wait(60), self.process.stderr.read()


@pytest.fixture
def start():
    """Returns a function that starts holders, which are killed at the end."""
    holders = []

    def begin(*arguments) -> Holder:
        holders.append(Holder(*arguments))
        return holders[-1]

    yield begin
    for holder in holders:
        holder.process.kill()
        for stream in (holder.process.stdin, holder.process.stdout, holder.process.stderr):
            with contextlib.suppress(OSError):
                stream.close()
        holder.process.wait()


@pytest.fixture(params=BUCKETS)
def bucket_place(request) -> str:
    return request.getfixturevalue(f"{request.param}_place")


def test_of_eight_runs_one_wins_and_the_others_name_it(bucket_place, start):
    holders = [start(bucket_place, PATIENT) for _ in range(8)]
    for holder in holders:
        assert holder.line() == "ready"
    for holder in holders:
        holder.say()
    losers = []
    end = time.monotonic() + 60
    while len(losers) < 7 and time.monotonic() < end:
        losers = [holder for holder in holders if holder.process.poll() is not None]
        time.sleep(0.05)
    (winner,) = set(holders) - set(losers)
    for holder in losers:
        code, text = holder.end()
        assert code == 73
        assert f"process {winner.process.pid} on " in text
        assert text[text.index("error: ") :].count("\n") == 3
    assert winner.line().startswith("held")
    winner.say()
    assert winner.line() == "renewed"
    assert winner.end()[0] == 0


def test_a_frozen_owner_is_taken_over_and_refuses_its_next_commit(bucket_place, start):
    first, second = start(bucket_place), start(bucket_place)
    assert first.acquire()
    first.process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert second.acquire()
    assert time.monotonic() - begin >= TAKE_OVER
    first.process.send_signal(signal.SIGCONT)
    first.say()
    code, text = first.end()
    assert code == 73
    assert "has taken over" in text
    assert f"process {second.process.pid} on " in text
    for _ in range(2):
        second.say()
        assert second.line() == "renewed"
    assert second.end()[0] == 0


def test_of_several_runs_one_takes_over(gs_place, start):
    first = start(gs_place)
    assert first.acquire()
    first.process.kill()
    first.process.wait()
    others = [start(gs_place, 100) for _ in range(4)]  # a process of this machine that has ended is not waited for
    assert [other.line() for other in others] == ["ready"] * 4
    for other in others:
        other.say()
    held = [any(line.startswith("held") for line in iter(other.line, "")) for other in others]
    assert held.count(True) == 1
    codes = [other.end()[0] for other in others]
    assert sorted(codes) == [0, 73, 73, 73]


def test_an_owner_that_is_frozen_for_a_moment_keeps_its_lease(gs_place, start):
    first, second = start(gs_place), start(gs_place, PATIENT)
    assert first.acquire()
    first.process.send_signal(signal.SIGSTOP)
    assert second.line() == "ready"
    second.say()
    time.sleep(1)
    first.process.send_signal(signal.SIGCONT)
    assert second.end()[0] == 73
    first.say()
    assert first.line() == "renewed"
    assert first.end()[0] == 0


def test_a_released_lease_is_taken_at_once(bucket_place, start):
    for _ in range(2):
        store = open_store(bucket_place, "--workdir", patience=BRISK)
        begin = time.monotonic()
        with hold(store, "lease") as lease:
            lease.renew()
        assert time.monotonic() - begin < 20  # and not 45 s
    assert json.loads(store.read("lease"))["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"host": "\\u001b[31m\\n"}', "\xff"])
def test_a_lease_that_nobody_can_read_stands_still_and_is_taken_over(gs_store, content):
    gs_store.put("lease", content.encode("latin-1"))
    lines = []
    with hold(gs_store, "lease", renew_every=0.05, take_over_after=0.2, report=lines.append):
        assert len(lines) == 2
        assert all(line.isprintable() for line in lines)


def test_a_lease_that_is_deleted_is_lost(gs_store):
    with hold(gs_store, "lease", renew_every=60) as lease:
        gs_store.delete("lease")
        for _ in range(2):
            with pytest.raises(WorkdirError):
                lease.renew()
    assert gs_store.read("lease") is None


def test_a_write_that_arrives_after_its_time_costs_no_lease(gcs, gs_place):
    store = open_store(gs_place, "--workdir", patience=dataclasses.replace(BRISK, total=2))
    with hold(store, "lease", renew_every=60) as lease:
        before = store.entry("lease").generation
        gcs.control = writes(1, Fault(delay=4))
        with pytest.raises(StorageError, match="took too long"):
            lease.renew()
        until(lambda: store.entry("lease").generation != before)
        lease.renew()


def test_a_store_that_ignores_conditions_is_refused(gcs, gs_store):
    class Careless(Objects):
        def _find(self, bucket, name, query, prefix, status):
            return super()._find(bucket, name, {}, prefix, status)

    gcs.objects = Careless([BUCKET])
    with pytest.raises(WorkdirError, match="ignores the conditions"):
        with hold(gs_store, "lease"):
            pass


def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def writes(count: int, fault: Fault):
    """Lets the first writes meet a fault."""
    faults = iter([fault] * count)
    return lambda request: next(faults, None) if request.method == "POST" else None


def test_answers_that_are_lost_cost_no_lease(gcs, gs_store):
    gcs.control = writes(1, Fault(lost=True))
    with hold(gs_store, "lease", renew_every=60) as lease:
        for _ in range(3):
            gcs.control = writes(2, Fault(lost=True))
            lease.renew()
        gcs.control = writes(1, Fault(lost=True))
    assert json.loads(gs_store.read("lease"))["released"]


def test_a_store_that_is_away_for_a_while_costs_no_lease_but_no_commit_is_made(gcs, gs_store, caplog):
    caplog.set_level(logging.WARNING)
    with hold(gs_store, "lease", renew_every=0.05) as lease:
        gcs.control = lambda request: Fault(status=503)
        with pytest.raises(StorageError):
            lease.renew()
        until(lambda: "could not be renewed" in caplog.text)
        assert not lease.lost
        gcs.control = lambda request: None
        lease.renew()
    assert caplog.text.count("could not be renewed") == 1


@pytest.mark.parametrize(("place", "released"), [("{root}/checkpoints/1", False), ("/local/disk", True)])
def test_a_store_that_has_just_failed_is_not_asked_to_release(gcs, gs_store, place, released):
    """It would take as long again."""
    with pytest.raises(StorageError, match="no answer"), hold(gs_store, "lease"):
        raise StorageError("no answer", place.format(root=gs_store.root), "run it again")
    assert json.loads(gs_store.read("lease"))["released"] == released


def test_a_lost_lease_is_known_without_a_request(gs_store):
    with hold(gs_store, "lease", renew_every=0.05) as lease:
        assert not lease.lost
        gs_store.put("lease", "taken")
        end = time.monotonic() + 5
        while not lease.lost and time.monotonic() < end:
            time.sleep(0.05)
        assert lease.lost
        with pytest.raises(WorkdirError):
            lease.renew()
    assert gs_store.read("lease") == b"taken"


def test_renewals_from_several_threads_do_not_lose_the_lease(gs_store):
    with hold(gs_store, "lease", renew_every=0.01) as lease:
        threads = [threading.Thread(target=lambda: [lease.renew() for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lease.renew()


def test_no_renewal_follows_the_release(gcs, gs_store):
    with hold(gs_store, "lease", renew_every=0.05):
        gcs.control = writes(1, Fault(delay=0.3))
        time.sleep(0.1)  # a renewal is on its way, and would arrive after the release
    time.sleep(0.5)
    assert json.loads(gs_store.read("lease"))["released"]


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(gs_place, start):
    """Its number in the system proves that it has ended; a process that is frozen is watched."""
    first = start(gs_place, 100)
    assert first.acquire()
    first.process.kill()
    first.process.wait()
    second = start(gs_place, 100)
    assert second.line() == "ready"
    second.say()
    assert "which has ended" in second.line()
    assert second.line().startswith("held")
    assert second.end()[0] == 0


def test_a_process_that_proc_does_not_show_is_watched(gs_store, monkeypatch):
    """With the option hidepid, /proc hides the processes of other users."""
    with hold(gs_store, "lease") as lease:
        owner = dataclasses.asdict(lease.owner) | {"nonce": "other"}
    gs_store.put("lease", json.dumps(owner))
    monkeypatch.setattr(lease_module.pathlib.Path, "read_text", raising(lease_module.pathlib.Path.read_text, "/stat"))
    lines: list[str] = []
    with hold(gs_store, "lease", renew_every=0.1, take_over_after=0.3, report=lines.append):
        assert "there is a sign of life" in lines[0]


def raising(read_text, suffix):
    def read(path, *arguments, **options):
        if str(path).endswith(suffix):
            raise FileNotFoundError(path)
        return read_text(path, *arguments, **options)

    return read


@pytest.mark.parametrize("field", ["machine", "started", "pid"])
def test_a_process_of_another_machine_is_watched(gs_store, field):
    """Not even the same number in a container of the same name says anything about it."""
    ended = {"nonce": "other", "host": "here", "machine": "", "started": "1", "pid": 1 << 30}
    with hold(gs_store, "lease") as lease:
        ended["machine"] = lease.owner.machine
    others = {"machine": "another boot", "started": "", "pid": "1"}
    gs_store.put("lease", json.dumps(ended | {field: others[field]}))
    lines: list[str] = []
    with hold(gs_store, "lease", renew_every=0.1, take_over_after=0.3, report=lines.append):
        assert "there is a sign of life" in lines[0]
    gs_store.put("lease", json.dumps(ended))
    with hold(gs_store, "lease", renew_every=0.1, take_over_after=100, report=lines.append):
        assert "which has ended" in lines[-1]


def test_a_lease_that_is_renewed_at_the_last_moment_is_not_taken_over(gs_store):
    gs_store.put("lease", '{"pid": 7}')
    before = gs_store.entry("lease")
    gs_store.put("lease", '{"pid": 7, "renewals": 1}')
    with pytest.raises(WorkdirError, match="holds the work directory"):
        lease_module._watch(gs_store, "lease", before, 0.0, 0.0)
