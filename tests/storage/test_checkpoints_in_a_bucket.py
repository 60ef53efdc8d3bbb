"""Checkpoints of a run in gs://, killed after each write, damaged, and on a store that fails."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import json
import threading
import time

import jax
import numpy as np
import pytest

from tests.storage.conftest import BUCKET
from tests.storage.gcs_objects import Mutation, Objects
from tests.storage.gcs_requests import Fault
from tests.storage.test_orbax_replay import STEPS, state_of
from xception_jax.errors import BadDataError, StorageError, UserError, WorkdirError
from xception_jax.storage import Mirror, hold, open_store
from xception_jax.training import save_errors
from xception_jax.training.checkpoint import Checkpoints
from xception_jax.training.run_directory import LEASE, Bucket

DIRECTORY = f"gs://{BUCKET}/run/checkpoints"
ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state_of(0))

# When a restore fails, Orbax closes its event loop with tasks in it. Python notices when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


@dataclasses.dataclass
class Recording:
    mutations: list[Mutation]
    reported: dict[int, int]


@pytest.fixture(scope="module")
def recording(gcs_process) -> Recording:
    gcs_process.objects = Objects([BUCKET])
    gcs_process.control = lambda request: None
    reported = {}
    with gcs_process.as_default(), Checkpoints(DIRECTORY, keep_latest=2, report=lambda line: None) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state_of(step))
            checkpoints.wait()
            reported[step] = len(gcs_process.mutations)
    return Recording(list(gcs_process.mutations), reported)


def check_prefix(gcs, recording: Recording, count: int) -> None:
    """Resumes after the first `count` writes, as a reader and as the next run."""
    saved = max((step for step, position in recording.reported.items() if position <= count), default=0)
    for read_only in (True, False):
        gcs.objects = Objects([BUCKET], recording.mutations[:count])
        with Checkpoints(DIRECTORY, keep_latest=2, read_only=read_only, report=lambda line: None) as checkpoints:
            restored = checkpoints.restore_latest(ABSTRACT)
            step, state = restored or (0, None)
            assert step >= saved
            if restored:
                jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
            if not read_only:
                checkpoints.save(40, state_of(40))
                checkpoints.wait()
                assert checkpoints.steps()[-1] == 40


@pytest.mark.slow
def test_a_sample_of_the_prefixes(gcs, recording):
    around = [position + offset for position in recording.reported.values() for offset in (-1, 0)]
    for count in sorted({0, 1, *around, *range(9, len(recording.mutations), 29)}):
        check_prefix(gcs, recording, count)


@pytest.mark.faults
def test_every_prefix(gcs, recording):
    for count in range(len(recording.mutations) + 1):
        check_prefix(gcs, recording, count)


def damage(gcs, recording: Recording, step: int, end: str) -> None:
    """Flips a bit in the last object of a step whose name ends as given."""
    names = [mutation.name for mutation in recording.mutations if mutation.stored is not None]
    name = [name for name in names if name.startswith(f"run/checkpoints/{step}/") and name.endswith(end)][-1]
    content = gcs.objects.get(BUCKET, name, {}).content
    gcs.objects.put(BUCKET, name, bytes([content[0] ^ 1]) + content[1:], {})


def names_in(gcs) -> set[str]:
    return {item["name"].split("/")[2] for item in gcs.objects.list(BUCKET, {})["items"]}


ENDS = ["_METADATA", "digest.json", "manifest.json", "manifest.ocdbt", "commit_success.txt", "_CHECKPOINT_METADATA"]


@pytest.mark.parametrize("end", ENDS)
def test_a_damaged_step_is_set_aside_and_an_older_one_is_used(gcs, recording, end):
    gcs.objects = Objects([BUCKET], recording.mutations)
    damage(gcs, recording, 30, f"/{end}")
    lines: list[str] = []
    with Checkpoints(DIRECTORY, keep_latest=2, report=lines.append) as checkpoints:
        restored = checkpoints.restore_latest(ABSTRACT)
        assert restored is not None
        assert restored[0] == 20
        assert checkpoints.steps() == [20]
    (line,) = lines
    assert "checkpoint 30 is damaged" in line
    assert "30" not in names_in(gcs)
    assert any(name.startswith("30.corrupt-") for name in names_in(gcs))


def test_if_all_are_damaged_each_is_named(gcs, recording):
    gcs.objects = Objects([BUCKET], recording.mutations)
    for step in (20, 30):
        damage(gcs, recording, step, "/_METADATA")
    for _ in range(2):
        with Checkpoints(DIRECTORY, keep_latest=2, report=lambda line: None) as checkpoints:
            with pytest.raises(BadDataError) as error:
                checkpoints.restore_latest(ABSTRACT)
        assert error.value.where.count(".corrupt-") == 2
        assert error.value.where.count("_METADATA differs") == 2


def restore_from_failing_store(gcs, recording: Recording, status: int, after: int) -> int:
    """Restores from a store that fails after some requests, and returns the exit code."""
    gcs.objects = Objects([BUCKET], recording.mutations)
    count = itertools.count()
    gcs.control = lambda request: Fault(status=status) if next(count) >= after else None
    code = 0
    try:
        with Checkpoints(DIRECTORY, keep_latest=2, report=lambda line: None) as checkpoints:
            restored = checkpoints.restore_latest(ABSTRACT)
            assert restored is not None
            assert restored[0] == 30
    except UserError as error:
        code = error.exit_code
    gcs.control = lambda request: None
    assert len(gcs.mutations) == len(recording.mutations)  # nothing was renamed or deleted
    return code


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("after", [0, 10, 30])
def test_a_store_that_fails_is_not_taken_for_damage(gcs, recording, status, after):
    assert restore_from_failing_store(gcs, recording, status, after) in (73, 74)


@pytest.mark.faults
def test_a_store_that_fails_after_any_request_is_not_taken_for_damage(gcs, recording):
    for after in itertools.count(step=2):
        code = restore_from_failing_store(gcs, recording, 403, after)
        if not code:  # it needs no more requests than these
            break
        assert code in (73, 74)
    assert after > 100


@pytest.mark.faults
@pytest.mark.parametrize("after", [0, 20, 40])
def test_a_store_that_is_away_is_not_taken_for_damage(gcs, recording, after):
    assert restore_from_failing_store(gcs, recording, 503, after) == 74


def test_a_deletion_begins_with_what_makes_a_step_look_complete(recording):
    later = recording.mutations[recording.reported[20] :]
    deleted = [mutation.name for mutation in later if mutation.stored is None]
    of_step = [name for name in deleted if name.startswith("run/checkpoints/10/")]
    assert of_step[0] == "run/checkpoints/10/commit_success.txt"
    assert "run/checkpoints/10/manifest.json" in of_step


def test_a_save_waits_for_no_answer_of_the_store(gcs):
    """Training goes on as soon as the state has been copied."""
    with Checkpoints(DIRECTORY, report=lambda line: None) as checkpoints:
        for step in (10, 20):
            answers, kept_waiting = threading.Event(), []
            gcs.control = lambda request, answers=answers, late=kept_waiting: late.append(not answers.wait(30)) or None
            checkpoints.save(step, state_of(step))
            assert not kept_waiting
            answers.set()
            checkpoints.wait()
            assert not any(kept_waiting)
        gcs.control = lambda request: None
        assert checkpoints.steps() == [10, 20]


def test_a_save_that_hangs_fails_in_time(gcs, monkeypatch):
    monkeypatch.setattr(save_errors, "IN_BUCKET_SECONDS", 1.0)
    checkpoints = Checkpoints(DIRECTORY, report=lambda line: None)
    gcs.control = lambda request: Fault(status=503) if request.changes and is_of_an_array(request) else None
    checkpoints.save(10, state_of(10))
    with pytest.raises(StorageError, match="took too long"):
        poll_for_ever(checkpoints)
    checkpoints.close()  # does not wait either
    gcs.control = lambda request: None
    checkpoints._background.shutdown()  # what is still written must not reach the next test


def poll_for_ever(checkpoints: Checkpoints) -> None:
    while True:
        checkpoints.poll()
        time.sleep(0.05)


def is_of_an_array(request) -> bool:
    return "/default/ocdbt.process_0/" in request.path + request.query.get("name", "")


def open_bucket(stack: contextlib.ExitStack) -> tuple[Bucket, Mirror]:
    store = open_store(f"gs://{BUCKET}/run", "--workdir")
    lease = stack.enter_context(hold(store, LEASE))
    mirror = stack.enter_context(Mirror(store, permit=lease.prove))
    return Bucket(lease, mirror), mirror


def test_files_are_pushed_before_a_step_is_committed(gcs):
    with contextlib.ExitStack() as stack:
        bucket, mirror = open_bucket(stack)
        checkpoints = stack.enter_context(Checkpoints(DIRECTORY, bucket=bucket, report=lambda line: None))
        (mirror.directory / "metrics.jsonl").write_text("step 10\n")
        checkpoints.save(10, state_of(10))
        checkpoints.wait()
        names = [mutation.name for mutation in gcs.mutations]
        committed = names.index("run/checkpoints/10/commit_success.txt")
        assert names.index("run/metrics.jsonl") < committed
        assert f"run/{LEASE}" in names[committed - 2 : committed + 1]  # the metadata of the step may come after it
        assert names.index("run/checkpoints/10/digest/digest.json") < committed - 2
        manifest = json.loads(gcs.objects.get(BUCKET, "run/checkpoints/10/manifest.json", {}).content)
        assert manifest["record"]["lease"] == bucket.owner


@pytest.mark.parametrize("moment", ["10/digest/process_0.json", "10/default/_METADATA", "10/commit_success.txt"])
def test_a_run_that_was_taken_over_writes_no_more(gcs, moment):
    other = json.dumps({"nonce": "other", "pid": 7, "host": "elsewhere"}).encode()
    taken = []

    def control(request):
        if request.changes and moment in request.path + request.query.get("name", "") and not taken:
            gcs.objects.put(BUCKET, f"run/{LEASE}", other, {})
            taken.append(len(gcs.mutations))

    with contextlib.ExitStack() as stack:
        bucket, mirror = open_bucket(stack)
        checkpoints = Checkpoints(DIRECTORY, bucket=bucket, report=lambda line: None)
        (mirror.directory / "metrics.jsonl").write_text("step 10\n")
        gcs.control = control
        checkpoints.save(10, state_of(10))
        with pytest.raises(WorkdirError, match="has taken over"):
            checkpoints.wait()
        with pytest.raises(WorkdirError, match="has taken over"):
            checkpoints.poll()
        with pytest.raises(WorkdirError, match="has taken over"):
            stack.close()
    names = [mutation.name for mutation in gcs.mutations[taken[0] :]]
    assert "run/checkpoints/10/manifest.json" not in names
    assert (moment == "10/commit_success.txt") == ("run/checkpoints/10/commit_success.txt" in names)
    assert gcs.objects.get(BUCKET, f"run/{LEASE}", {}).content == other
