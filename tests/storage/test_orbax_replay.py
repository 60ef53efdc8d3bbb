"""Orbax on gs://, killed after each of its writes: every prefix of the writes of three saves is opened again.

No step that is only partly written or partly deleted may be taken for whole, and no step that was reported as saved
may be lost.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from tests.storage.conftest import BUCKET
from tests.storage.gcs_objects import Mutation, Objects
from tests.storage.gcs_requests import Fault
from xception_jax.errors import WorkdirError
from xception_jax.storage import checkpoint_directory, translate

# When a restore fails, Orbax closes its event loop with tasks in it. Python notices when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = (10, 20, 30)
KEPT = 2
DIRECTORY = f"gs://{BUCKET}/run/checkpoints"


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()  # not in a test of another file


@dataclasses.dataclass
class Recording:
    """The writes of a run, and after how many of them each step was reported as saved."""

    mutations: list[Mutation]
    reported: dict[int, int]


def state_of(step: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(step)
    return {
        "kernel": jnp.asarray(rng.standard_normal((37, 11), np.float32)),
        "bias": jnp.asarray(rng.standard_normal(11, np.float32)),
        "step": jnp.int32(step),
    }


def save(manager: ocp.CheckpointManager, step: int) -> None:
    """Saves a step, and returns when Orbax reports it as saved."""
    manager.save(step, args=ocp.args.StandardSave(state_of(step)))
    manager.wait_until_finished()


def open_manager(read_only: bool = False) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        read_only=read_only,
        max_to_keep=KEPT,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    directory = checkpoint_directory(DIRECTORY, "--workdir")
    return ocp.CheckpointManager(directory, options=options, item_handlers=ocp.StandardCheckpointHandler())


@pytest.fixture(scope="module")
def recording(gcs_process) -> Recording:
    """Saves three steps, of which the first is deleted again, and records all writes."""
    gcs_process.objects = Objects([BUCKET])
    gcs_process.control = lambda request: None
    reported = {}
    with gcs_process.as_default(), open_manager() as manager:
        for step in STEPS:
            save(manager, step)
            reported[step] = len(gcs_process.mutations)
    return Recording(list(gcs_process.mutations), reported)


def check_prefix(gcs, recording: Recording, count: int) -> None:
    """Opens what a run that was killed after `count` writes has left, as a reader and as the next run."""
    saved = [step for step, position in recording.reported.items() if position <= count]
    for read_only in (True, False):
        gcs.objects = Objects([BUCKET], recording.mutations[:count])
        with open_manager(read_only) as manager:
            steps = sorted(manager.all_steps())
            assert set(steps) <= set(STEPS)
            # Every step that is listed can be restored to the last bit: none is torn.
            for step in steps:
                expected = state_of(step)
                restored = manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(np.zeros_like, expected)))
                jax.tree.map(np.testing.assert_array_equal, restored, expected)
            # The newest step that was reported is there. Those before it may have been deleted.
            assert not saved or max(saved) in steps, (count, saved, steps)
            if not read_only:  # the next run goes on, and its save is whole
                save(manager, 40)
                assert max(manager.all_steps()) == 40


def deletions(recording: Recording) -> list[Mutation]:
    return [mutation for mutation in recording.mutations if mutation.stored is None]


def refuses_torn_deletion(gcs, recording: Recording, gone: list[Mutation]) -> bool:
    """Opens a directory in which some objects of the first step have been deleted.

    Returns whether the step is listed and cannot be restored. If it can be restored, it is checked to the last bit.
    """
    refused = False
    written = [mutation for mutation in recording.mutations if mutation.stored is not None]
    gcs.objects = Objects([BUCKET], [*written, *gone])
    with open_manager(read_only=True) as manager:
        for step in manager.all_steps():
            expected = state_of(step)
            try:
                restored = manager.restore(step, args=ocp.args.StandardRestore(jax.tree.map(np.zeros_like, expected)))
            except Exception:  # of several kinds. A step that cannot be restored is not taken for whole
                assert step == STEPS[0]
                refused = True
            else:
                jax.tree.map(np.testing.assert_array_equal, restored, expected)
    return refused


def live_names(gcs) -> list[str]:
    return [item["name"] for item in gcs.objects.list(BUCKET, {})["items"]]


def test_a_reader_that_polls_sees_no_listing_of_the_past(gcs, recording):
    """gcsfs caches listings by default."""
    step_30 = recording.reported[20]
    gcs.objects = Objects([BUCKET], recording.mutations[:step_30])
    with open_manager(read_only=True) as reader:
        assert sorted(reader.all_steps()) == [10, 20]
        for count in (step_30 + 5, recording.reported[30], recording.reported[10]):
            gcs.objects = Objects([BUCKET], recording.mutations[:count])
            reader.reload()
            with open_manager(read_only=True) as fresh:
                assert sorted(reader.all_steps()) == sorted(fresh.all_steps())
            names = {name.split("/")[2] for name in live_names(gcs)}
            assert {path.name for path in epath.Path(DIRECTORY).iterdir()} == names


def test_a_commit_is_one_object_written_last(recording):
    """Otherwise the replay below would prove less than it seems to."""
    names = [mutation.name for mutation in recording.mutations if mutation.stored is not None]
    for step in STEPS:
        of_step = [name for name in names if name.startswith(f"run/checkpoints/{step}/")]
        assert of_step[-1] == f"run/checkpoints/{step}/commit_success.txt"
    assert len(recording.mutations) > 40
    assert {mutation.name.split("/")[2] for mutation in deletions(recording)} == {str(STEPS[0])}


@pytest.mark.slow
def test_a_sample_of_the_prefixes(gcs, recording):
    around = [position + offset for position in recording.reported.values() for offset in (-1, 0)]
    for count in sorted({0, *around, *range(7, len(recording.mutations), 23)}):
        check_prefix(gcs, recording, count)


def test_a_deletion_in_any_order_is_never_taken_for_whole(gcs, recording):
    """gcsfs deletes many objects at once. Here, what says that the step is whole is deleted last."""
    gone = sorted(deletions(recording), key=lambda mutation: "commit_success" in mutation.name)
    assert any([refuses_torn_deletion(gcs, recording, gone[:count]) for count in range(1, len(gone), 3)])


@pytest.mark.faults
def test_a_deletion_of_one_object_or_all_but_one_is_never_taken_for_whole(gcs, recording):
    gone = deletions(recording)
    assert any([refuses_torn_deletion(gcs, recording, [mutation]) for mutation in gone])
    for mutation in gone:
        refuses_torn_deletion(gcs, recording, [other for other in gone if other is not mutation])


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(3))
def test_saves_survive_a_store_that_fails_now_and_then(gcs, seed):
    rng = random.Random(seed)
    kinds = [Fault(status=503), Fault(status=429), Fault(cut=True), Fault(lost=True), Fault(delay=2)]
    gcs.control = lambda request: rng.choice(kinds) if rng.random() < 0.03 else None
    with open_manager() as manager:
        for step in STEPS:
            save(manager, step)
    gcs.control = lambda request: None
    check_prefix(gcs, Recording(list(gcs.mutations), dict.fromkeys(STEPS, 0)), len(gcs.mutations))


@pytest.mark.faults
@pytest.mark.parametrize("status", [503, 403])
def test_a_store_that_is_away_ends_the_save_and_loses_nothing(gcs, recording, status):
    """Orbax raises the errors of gcsfs, after its own repetitions."""
    gcs.objects = Objects([BUCKET], recording.mutations[: recording.reported[20]])
    with open_manager() as manager:
        gcs.control = lambda request: Fault(status=status)
        begin = time.monotonic()
        with pytest.raises(Exception, match="injected") as error:
            save(manager, 30)
        assert time.monotonic() - begin < 120
        failure = translate(error.value, DIRECTORY, "saving", WorkdirError)
        assert failure.exit_code == 74
        gcs.control = lambda request: None
    check_prefix(gcs, Recording(list(gcs.mutations), {10: 0, 20: 0}), len(gcs.mutations))


@pytest.mark.faults
def test_every_prefix(gcs, recording):
    for count in range(len(recording.mutations) + 1):
        check_prefix(gcs, recording, count)
