"""Checkpoints of a run in gs://, killed after each write, damaged, and on a store that fails."""

from __future__ import annotations

import dataclasses
import gc
import itertools

import jax
import numpy as np
import pytest

from tests.storage.conftest import BUCKET
from tests.storage.gcs_objects import Mutation, Objects
from tests.storage.gcs_requests import Fault
from tests.storage.test_orbax_replay import STEPS, state_of
from xception_jax.errors import BadDataError, UserError
from xception_jax.training.checkpoint import Checkpoints

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


def test_a_sample_of_the_prefixes(gcs, recording):
    around = [position + offset for position in recording.reported.values() for offset in (-1, 0)]
    for count in sorted({0, 1, *around, *range(9, len(recording.mutations), 17)}):
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
