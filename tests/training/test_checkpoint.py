"""Real Orbax, real processes, real kill -9: what was reported as saved is there and right, and nothing else is used."""

import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import free_port
from xception_jax.config import resolve
from xception_jax.data.synthetic import SyntheticSource
from xception_jax.errors import BadDataError, InputMissingError, StorageError
from xception_jax.parallel import make_mesh
from xception_jax.training import checkpoint, digest
from xception_jax.training.checkpoint import Checkpoints
from xception_jax.training.experiment import build_experiment
from xception_jax.training.fingerprint import named_leaves, state_fingerprint, tree_signature
from xception_jax.training.preservation import LatestOrBest
from xception_jax.training.run_directory import RunDirectory, open_checkpoints
from xception_jax.training.verification import verify_step

# What the state is after a step, so that every process can tell whether a restored one is right.
STATE = """
    import jax, numpy as np
    from xception_jax.training.checkpoint import Checkpoints
    from xception_jax.training.fingerprint import state_fingerprint

    def state_at(step, size=512):
        noise = np.random.default_rng(step)
        kernel = noise.standard_normal((size, 64), np.float32)
        return {"params": {"kernel": jax.numpy.asarray(kernel)}, "step": jax.numpy.int32(step)}

    def abstract(state, sharding=None):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)

    def say(line):
        print(line, flush=True)
"""
exec(textwrap.dedent(STATE))

# When it fails, Orbax leaves coroutines behind that nobody awaits; the tests collect them before they end.
ORBAX_LEFTOVERS = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


def run(code: str, *arguments: object, devices: int = 1) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(STATE) + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )


def output_of(code: str, *arguments: object, devices: int = 1) -> str:
    process = run(code, *arguments, devices=devices)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def fill(directory, steps, **options) -> None:
    with Checkpoints(directory, keep_latest=10, report=lambda line: None, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step))


def latest(directory, **options):
    """Returns the step that was restored, after a check of its bits, and the lines that were reported."""
    lines = []
    with Checkpoints(directory, keep_latest=10, report=lines.append, **options) as checkpoints:
        restored = checkpoints.restore_latest(abstract(state_at(0)))
    if restored is None:
        return None, lines
    step, state = restored
    assert state_fingerprint(state) == state_fingerprint(state_at(step))
    return step, lines


def largest_file(step_directory):
    return max((path for path in step_directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# --- saving ----------------------------------------------------------------------------------------------------------


def test_saves_in_the_background_what_the_next_step_overwrites(tmp_path):
    step_fn = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = step_fn({"w": jnp.zeros((1000, 1000))})
    with Checkpoints(tmp_path, keep_latest=3, report=lambda line: None) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state)
            for _ in range(3):
                state = step_fn(state)
        for step in (3, 2, 1):  # the first of them is still being written
            restored = checkpoints.restore(step, abstract(state))
            np.testing.assert_array_equal(restored["w"], 3 * step - 2)


def test_step_is_reported_only_with_its_manifest(tmp_path):
    lines = []

    def report(line: str) -> None:
        lines.append((line, (tmp_path / "5" / "manifest.json").exists()))

    with Checkpoints(tmp_path, report=report, identity={"dataset": "d", "config": "c"}) as checkpoints:
        checkpoints.save(5, state_at(5), {"loss": np.float32(0.5)})
        assert lines == []
        deadline = time.monotonic() + 120
        while not lines and time.monotonic() < deadline:
            checkpoints.poll()
            time.sleep(0.005)
        assert lines == [("saved checkpoint 5", True)]
    record = json.loads((tmp_path / "5" / "manifest.json").read_text())["record"]
    assert record["step"] == 5
    assert record["metrics"] == {"loss": 0.5}
    assert record["identity"] == {"dataset": "d", "config": "c"}
    assert record["versions"]["jax"] == jax.__version__


def test_keeps_the_latest_and_the_best_also_of_an_earlier_run(tmp_path):
    scores = {1: 0.9, 2: 0.3, 3: float("nan"), 4: 0.5, 5: 0.1}
    for steps in ((1, 2, 3), (4, 5)):  # two runs
        with Checkpoints(
            tmp_path, keep_latest=2, keep_best=1, best_metric="top1", report=lambda line: None
        ) as checkpoints:
            for step in steps:
                checkpoints.save(step, state_at(step), {"top1": scores[step]})
    assert sorted(os.listdir(tmp_path)) == ["1", "4", "5", "run_id"]


@pytest.mark.parametrize(("decay", "best"), [(0.0, 1), (0.9, 2)])
def test_a_run_keeps_what_is_best_on_the_development_split_of_the_average_if_there_is_one(decay, best, tmp_path):
    small = {"width_multiplier": 0.1, "middle_blocks": 0, "stem": "small", "residual": False}
    fields = {"model": small, "data": {"image_size": 16}, "batch_size": 2, "ema": {"decay": decay}}
    config = resolve(fields | {"checkpoint": {"keep_latest": 1, "keep_best": 1, "every": "100 steps"}})
    sources = {split: SyntheticSource(1000, split) for split in ("train", "dev")}
    experiment = build_experiment(config, sources, make_mesh(config.mesh, jax.devices()[:1]))
    directory = RunDirectory(str(tmp_path), tmp_path)
    with open_checkpoints(experiment, directory, print) as checkpoints:
        for step, (top1, of_average) in enumerate([(0.9, 0.1), (0.2, 0.8), (0.3, 0.3)], 1):
            checkpoints.save(step, state_at(step), {"top1": top1, "ema_top1": of_average, "loss": -step})
    assert {name for name in os.listdir(directory.checkpoints) if name.isdigit()} == {str(best), "3"}


def test_keeps_all_if_more_are_wanted_than_there_are(tmp_path):
    with Checkpoints(tmp_path, keep_latest=1, keep_best=5, best_metric="top1", report=lambda line: None) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state_at(step), {"top1": 0.1 * step})
    assert sorted(os.listdir(tmp_path)) == ["1", "2", "3", "4", "run_id"]


def test_a_step_that_was_saved_without_its_metrics_can_be_ranked(tmp_path):
    with Checkpoints(tmp_path, report=lambda line: None) as checkpoints:
        checkpoints.save(1, state_at(1))  # stopped during the evaluation, or killed before the manifest
    with Checkpoints(tmp_path, keep_latest=2, keep_best=1, best_metric="top1", report=lambda line: None) as checkpoints:
        checkpoints.score(1, {"top1": 0.9})
        for step in (2, 3, 4):
            checkpoints.save(step, state_at(step), {"top1": 0.1})
    assert sorted(os.listdir(tmp_path)) == ["1", "3", "4", "run_id"]


def test_saving_a_step_again(tmp_path):
    with Checkpoints(tmp_path, keep_latest=9, report=lambda line: None) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_at(step))
        checkpoints.wait()
        written = (tmp_path / "3").stat().st_mtime_ns
        checkpoints.save(3, state_at(3))  # a preemption just after the regular save
        checkpoints.wait()
        assert (tmp_path / "3").stat().st_mtime_ns == written
        checkpoints.restore(1, abstract(state_at(0)))
        checkpoints.save(2, state_at(20))  # another branch, below the newest step
        assert state_fingerprint(checkpoints.restore(2, abstract(state_at(0)))) == state_fingerprint(state_at(20))
        assert checkpoints.steps() == [1, 2, 3]


def test_a_whole_training_state(tmp_path):
    params = {"conv": {"kernel": jnp.ones((3, 3), jnp.bfloat16)}, "empty": {}, "list": [jnp.zeros(2), None]}
    optimizer = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9))
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.int32(3)}
    with Checkpoints(tmp_path, report=lambda line: None) as checkpoints:
        assert checkpoints.restore_latest(abstract(state)) is None
        checkpoints.save(3, state)
        step, restored = checkpoints.restore_latest(abstract(state))
    assert step == 3
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert state_fingerprint(restored) == state_fingerprint(state)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_sees_every_bit_name_type_and_shape():
    state = {"a": jnp.zeros(4), "b": [jnp.int32(1)]}
    others = [
        {"a": jnp.zeros(4).at[3].set(-0.0), "b": [jnp.int32(1)]},
        {"c": jnp.zeros(4), "b": [jnp.int32(1)]},
        {"a": jnp.zeros((2, 2)), "b": [jnp.int32(1)]},
        {"a": jnp.zeros(4, jnp.int32), "b": [jnp.int32(1)]},
    ]
    assert list(named_leaves(state)) == ["a", "b/0"]
    assert tree_signature(abstract(state)) == {"a": "float32[4]", "b/0": "int32[]"}
    assert state_fingerprint(state) == state_fingerprint(jax.tree.map(np.asarray, state))
    assert len({state_fingerprint(s) for s in [state, *others]}) == 5
    large = np.zeros(5000, np.float32)
    before = state_fingerprint({"a": large})
    large.view(np.uint32)[2500] = 1  # the lowest bit
    assert state_fingerprint({"a": large}) != before


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(step_directory):
    path = largest_file(step_directory)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(step_directory):
    path = largest_file(step_directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_the_manifest(step_directory):
    path = step_directory / "manifest.json"
    path.write_text(path.read_text().replace('"step": 30', '"step": 31'))


DAMAGES = {
    "truncated": (truncate, "bytes instead of"),
    "bit flipped": (flip_a_bit, "the SHA-256 of default/"),
    "metadata deleted": (lambda d: (d / "default" / "_METADATA").unlink(), "default/_METADATA is missing"),
    "step metadata deleted": (lambda d: (d / "_CHECKPOINT_METADATA").unlink(), "_CHECKPOINT_METADATA is missing"),
    "arrays deleted": (lambda d: shutil.rmtree(d / "default"), "is missing"),
    "manifest changed": (change_the_manifest, "the SHA-256 of manifest.json differs"),
    "manifest cut": (lambda d: os.truncate(d / "manifest.json", 40), "manifest.json is not readable as JSON"),
    "manifest emptied": (lambda d: os.truncate(d / "manifest.json", 0), "manifest.json is not readable as JSON"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_set_aside_and_the_older_one_used(tmp_path, name):
    damage, reason = DAMAGES[name]
    fill(tmp_path, (10, 20, 30))
    damage(tmp_path / "30")
    step, lines = latest(tmp_path)
    assert step == 20
    (line,) = lines
    assert line.startswith("checkpoint 30 is damaged (")
    assert reason in line
    assert line.endswith("; falling back to checkpoint 20")
    (aside,) = tmp_path.glob("30.corrupt-*")
    assert aside.name in line
    assert not (tmp_path / "30").exists()
    # Neither a later run nor Orbax is bothered by what lies there, and the step can be saved again.
    fill(tmp_path, (30,))
    assert latest(tmp_path) == (30, [])
    assert aside.exists()


def test_every_checkpoint_damaged(tmp_path):
    fill(tmp_path, (10, 20))
    truncate(tmp_path / "10")
    flip_a_bit(tmp_path / "20")
    for _ in range(2):  # the second attempt must not start again from step 0
        with pytest.raises(BadDataError, match="every checkpoint is damaged") as caught:
            latest(tmp_path)
        assert caught.value.exit_code == 65
        assert "10.corrupt-" in caught.value.where
        assert "bytes instead of" in caught.value.where
        assert "20.corrupt-" in caught.value.where
        assert "SHA-256" in caught.value.where


@pytest.mark.parametrize("name", ["manifest.json", "_CHECKPOINT_METADATA", "digest/digest.json"])
def test_a_disk_that_fails_to_read_is_not_a_damaged_checkpoint(tmp_path, name):
    """The newest step may be intact: a run that went on from an older one would lose what lies between."""
    fill(tmp_path, (10, 20))
    if name != "manifest.json":
        (tmp_path / "20" / "manifest.json").unlink()
    kept = (tmp_path / "20" / name).rename(tmp_path / "kept")
    (tmp_path / "20" / name).symlink_to("/proc/self/mem")  # a regular file; reading it is an input/output error
    with pytest.raises(StorageError, match="a checkpoint cannot be read: Input/output error") as caught:
        latest(tmp_path)
    assert caught.value.where.endswith(f"20/{name}")
    assert not list(tmp_path.glob("*.corrupt-*"))
    kept.rename(tmp_path / "20" / name)
    assert latest(tmp_path)[0] == 20


def test_without_manifest_the_step_is_verified_by_reading_it(tmp_path):
    with Checkpoints(tmp_path, best_metric="top1", identity={"dataset": "d"}, report=lambda line: None) as checkpoints:
        checkpoints.save(10, state_at(10), {"top1": 0.5})
    manifest = (tmp_path / "10" / "manifest.json").read_text()
    (tmp_path / "10" / "manifest.json").unlink()
    (tmp_path / "10" / "manifest.json.1.tmp").write_text(manifest[:50])  # killed while it was being written
    step, lines = latest(tmp_path)
    assert step == 10
    assert lines == ["checkpoint 10 had no manifest; its content matches its digest, so a manifest is added"]
    assert (tmp_path / "10" / "manifest.json").read_text() == manifest
    assert latest(tmp_path) == (10, [])


@ORBAX_LEFTOVERS
@pytest.mark.parametrize("damage", [truncate, DAMAGES["metadata deleted"][0], DAMAGES["arrays deleted"][0]])
def test_without_manifest_and_damaged(tmp_path, damage):
    fill(tmp_path, (10, 20))
    (tmp_path / "20" / "manifest.json").unlink()
    damage(tmp_path / "20")
    step, lines = latest(tmp_path)
    gc.collect()
    assert step == 10
    assert lines[0].startswith("checkpoint 20 is damaged (")
    assert "falling back to checkpoint 10" in lines[0]


def test_one_step_that_is_damaged_or_missing(tmp_path):
    fill(tmp_path, (10, 20))
    truncate(tmp_path / "20")
    with Checkpoints(tmp_path, report=lambda line: None) as checkpoints:
        with pytest.raises(BadDataError, match="checkpoint 20 is damaged"):
            checkpoints.restore(20, abstract(state_at(0)))
        with pytest.raises(InputMissingError, match="choose among: 10, 20"):
            checkpoints.restore(15, abstract(state_at(0)))
    assert (tmp_path / "20").exists()


@pytest.mark.parametrize("moment", ["before it is verified", "after it is verified"])
def test_a_step_that_a_trainer_deletes_while_it_is_read(tmp_path, monkeypatch, moment):
    """As by `evaluate` beside a run, which has saved a newer step in the meantime."""
    fill(tmp_path, (10, 20))

    def verify(directory, step, *arguments, **options):
        if step == 20 and moment.startswith("after"):
            verified = verify_step(directory, step, *arguments, **options)
        if step == 20:
            shutil.rmtree(directory)
            fill(tmp_path, (30,))
        return (
            verified
            if step == 20 and moment.startswith("after")
            else verify_step(directory, step, *arguments, **options)
        )

    monkeypatch.setattr(checkpoint, "verify_step", verify)
    assert latest(tmp_path, read_only=True) == (30, [])
    shutil.rmtree(tmp_path / "30")
    fill(tmp_path, (20,))
    with (
        Checkpoints(tmp_path, read_only=True, report=lambda line: None) as checkpoints,
        pytest.raises(InputMissingError, match="no checkpoint 20") as caught,
    ):
        checkpoints.restore(20, abstract(state_at(0)))
    assert caught.value.fix == "choose among: 10, 30"


def test_read_only_changes_nothing(tmp_path):
    fill(tmp_path, (10, 20, 30))
    truncate(tmp_path / "30")
    (tmp_path / "20" / "manifest.json").unlink()
    (tmp_path / "40.orbax-checkpoint-tmp").mkdir()  # being written by the trainer
    before = sorted(tmp_path.rglob("*"))
    assert latest(tmp_path, read_only=True)[0] == 20
    assert sorted(tmp_path.rglob("*")) == before
    assert latest(tmp_path / "nothing", read_only=True) == (None, [])
    assert not (tmp_path / "nothing").exists()


# --- another model, another dataset ----------------------------------------------------------------------------------


def test_another_model_is_refused_with_a_table_and_left_in_place(tmp_path):
    fill(tmp_path, (10,))
    wanted = abstract(state_at(0) | {f"new{i:02}": jnp.zeros(1) for i in range(20)})
    wanted["params"]["kernel"] = jax.ShapeDtypeStruct((512, 64), jnp.bfloat16)  # Orbax would convert in silence
    with Checkpoints(tmp_path, report=lambda line: None) as checkpoints:
        with pytest.raises(BadDataError, match="21 of 22 parameters differ") as caught:
            checkpoints.restore_latest(wanted)
    table = caught.value.details
    assert caught.value.exit_code == 65
    assert caught.value.where == str(tmp_path / "10")
    assert [line.split() for line in table[:3]] == [
        ["parameter", "stored", "wanted"],
        ["new00", "-", "float32[1]"],
        ["new01", "-", "float32[1]"],
    ]
    assert table[-1] == "and 11 more"
    assert len(table) == 1 + 10 + 1
    del wanted["step"]
    wanted["params"]["kernel"] = jax.ShapeDtypeStruct((512, 32), jnp.float32)
    with Checkpoints(tmp_path, report=lambda line: None) as checkpoints:
        with pytest.raises(BadDataError, match=r"params/kernel +float32\[512, 64\] +float32\[512, 32\]"):
            checkpoints.restore(10, {"params": wanted["params"]})
    assert latest(tmp_path) == (10, [])


def test_another_dataset_is_refused_unless_allowed(tmp_path):
    fill(tmp_path, (10,), identity={"dataset": "old"})
    for manifest in (True, False):
        if not manifest:
            (tmp_path / "10" / "manifest.json").unlink()
        with pytest.raises(BadDataError, match="fingerprint old, now new"):
            latest(tmp_path, identity={"dataset": "new"})
    assert latest(tmp_path, identity={"dataset": "new"}, allow_dataset_change=True)[0] == 10
    assert latest(tmp_path, identity={"dataset": "old", "config": "another"})[0] == 10


def test_other_classes_are_refused_unless_allowed(tmp_path):
    """The fingerprint of a dataset that an earlier version prepared does not cover them."""
    trained, now = ({"dataset": "same", "classes": json.dumps(names)} for names in (["cat", "emu"], ["ant", "cat"]))
    fill(tmp_path, (10,), identity=trained)
    with pytest.raises(BadDataError, match="class 0 was 'cat', now 'ant'"):
        latest(tmp_path, identity=now)
    assert latest(tmp_path, identity=now, allow_dataset_change=True)[0] == 10
    assert latest(tmp_path, identity=trained)[0] == latest(tmp_path, identity={"dataset": "same"})[0] == 10


# --- kill -9 ---------------------------------------------------------------------------------------------------------

SAVE_FOR_EVER = """
    import sys
    with Checkpoints(sys.argv[1], keep_latest=2, report=say) as checkpoints:
        restored = checkpoints.restore_latest(abstract(state_at(0, 20_000)))
        step, state = restored or (0, state_at(0, 20_000))
        if state_fingerprint(state) != state_fingerprint(state_at(step, 20_000)):
            say("WRONG STATE")
        say(f"start {step}")
        while True:
            step += 1
            checkpoints.save(step, state_at(step, 20_000))
            checkpoints.poll()
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    moments = random.Random(0)
    reported, met_a_save = 0, False
    for _ in range(5):
        process = run(SAVE_FOR_EVER, tmp_path)
        with process:
            lines = [process.stdout.readline()]
            while lines[-1] and not lines[-1].startswith("start"):
                lines.append(process.stdout.readline())
            assert lines[-1].startswith("start"), process.stderr.read()
            assert not any("damaged" in line or "WRONG" in line for line in lines), lines
            assert int(lines[-1].split()[1]) >= reported  # what was reported as saved is not lost
            # Some saves and a part of one, however slow this machine is just now.
            for _ in range(moments.randint(1, 3)):
                lines.append(process.stdout.readline())
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
        assert process.returncode == -signal.SIGKILL
        reported = max(int(line.split()[-1]) for line in lines if line.startswith("saved checkpoint"))
        met_a_save |= any("orbax-checkpoint-tmp" in name for name in os.listdir(tmp_path))
    assert reported >= 5
    assert met_a_save
    assert latest_of(tmp_path)[0] >= reported
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


def latest_of(directory):
    with Checkpoints(directory, report=lambda line: None) as checkpoints:
        step, state = checkpoints.restore_latest(abstract(state_at(0, 20_000)))
    assert state_fingerprint(state) == state_fingerprint(state_at(step, 20_000))
    return step, state


def test_killed_between_commit_and_manifest(tmp_path):
    process = run(
        """
        import os, sys
        from xception_jax.training import manifest
        with Checkpoints(sys.argv[1], report=say) as checkpoints:
            checkpoints.save(1, state_at(1))
            checkpoints.wait()
            manifest.write = lambda *_, **__: os.kill(os.getpid(), 9)
            checkpoints.save(2, state_at(2))
        """,
        tmp_path,
    )
    output, _ = process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    assert output == "saved checkpoint 1\n"
    assert (tmp_path / "2").exists()
    assert latest(tmp_path) == (
        2,
        ["checkpoint 2 had no manifest; its content matches its digest, so a manifest is added"],
    )


# --- storage that fails ----------------------------------------------------------------------------------------------


@pytest.fixture
def limit_file_size():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@ORBAX_LEFTOVERS
@pytest.mark.parametrize("reported_by", ["poll", "save", "wait", "close"])
def test_failed_save_is_reported_by_whatever_comes_next(tmp_path, limit_file_size, reported_by):
    def provoke(checkpoints):
        if reported_by == "poll":
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                checkpoints.poll()
                time.sleep(0.01)
        elif reported_by == "save":
            checkpoints.save(3, state_at(3))
        elif reported_by == "wait":
            checkpoints.wait()

    checkpoints = Checkpoints(tmp_path, report=lambda line: None)
    checkpoints.save(1, state_at(1))
    checkpoints.wait()
    limit_file_size(50_000)
    checkpoints.save(2, state_at(2))
    if reported_by == "close":
        with pytest.raises(StorageError, match="checkpoint 2 could not be written"):
            checkpoints.close()
    else:
        with pytest.raises(StorageError, match="checkpoint 2 could not be written: File too large"):
            provoke(checkpoints)
        checkpoints.close()
    gc.collect()
    assert latest(tmp_path) == (1, [])


def test_no_room_ends_the_process_with_74(tmp_path):
    process = run(
        """
        import resource, sys
        from xception_jax.errors import StorageError
        try:
            with Checkpoints(sys.argv[1], report=say) as checkpoints:
                checkpoints.save(1, state_at(1))
                checkpoints.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
                checkpoints.save(2, state_at(2))
        except StorageError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
        """,
        tmp_path,
    )
    first = process.stdout.readline()
    start = time.monotonic()
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 74, errors
    assert time.monotonic() - start < 60
    output = first + output
    # Before or after our three lines Orbax sometimes prints that its event loop was closed under a pending future.
    lines = errors[errors.index("error: ") :].splitlines()
    assert lines[0] == "error: checkpoint 2 could not be written: File too large"
    assert lines[1].startswith(f"  where: {tmp_path} (needs 131,076 bytes, ")
    assert lines[1].endswith(" bytes free, files limited to 100 bytes)")
    assert lines[2] == "  fix:   free some space and run the same command to resume from step 1"
    assert output == "saved checkpoint 1\n"
    assert sorted(os.listdir(tmp_path)) == ["1", "run_id"]
    assert latest(tmp_path) == (1, [])


@ORBAX_LEFTOVERS
def test_failed_save_does_not_hide_the_error_under_way(tmp_path, limit_file_size):
    lines = []

    def fail_in_the_loop():
        with Checkpoints(tmp_path, report=lines.append) as checkpoints:
            checkpoints.save(1, state_at(1))
            checkpoints.wait()
            limit_file_size(50_000)
            checkpoints.save(2, state_at(2))
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_loop()
    assert lines[0] == "saved checkpoint 1"
    assert lines[1].startswith("error: checkpoint 2 could not be written: File too large")
    gc.collect()


def test_directory_that_cannot_be_created_or_written(tmp_path):
    (tmp_path / "file").write_text("")
    start = time.monotonic()
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/checkpoints"):
        with pytest.raises(StorageError) as caught:
            fill(path, (1,))
        assert caught.value.exit_code == 74
    assert time.monotonic() - start < 10


# --- devices and processes -------------------------------------------------------------------------------------------

SHARDED = """
    import sys
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))

    def sharded(x):
        return NamedSharding(mesh, PartitionSpec("fsdp") if x.ndim else PartitionSpec())

    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharded(x)), state_at(0))
"""
# Indented as much as the parts that follow.
SHARDED = textwrap.dedent(SHARDED)


def test_save_on_eight_devices_restore_on_fewer(tmp_path):
    save = SHARDED + textwrap.dedent("""
        state = jax.tree.map(lambda x: jax.device_put(x, sharded(x)), state_at(7))
        with Checkpoints(sys.argv[1], report=say) as checkpoints:
            checkpoints.save(7, state)
    """)
    output_of(save, tmp_path, devices=8)
    restore = SHARDED + textwrap.dedent("""
        with Checkpoints(sys.argv[1], report=say) as checkpoints:
            step, state = checkpoints.restore_latest(wanted)
        say(f"{step} {len(state['params']['kernel'].sharding.device_set)} {state_fingerprint(state)}")
    """)
    assert latest(tmp_path) == (7, [])  # one device, in this process
    (tmp_path / "7" / "manifest.json").unlink()
    for devices in (4, 2):
        assert output_of(restore, tmp_path, devices=devices).endswith(f"7 {devices} {state_fingerprint(state_at(7))}\n")


def test_two_processes_agree_on_the_step(tmp_path):
    code = textwrap.dedent("""
        import pathlib, sys
        jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
    """)
    code += SHARDED
    code += textwrap.dedent("""
        def put(x):
            return jax.make_array_from_callback(x.shape, sharded(x), lambda index: np.asarray(x)[index])

        with Checkpoints(sys.argv[1], report=say) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, jax.tree.map(put, state_at(step)))
            checkpoints.wait()
            (pathlib.Path(sys.argv[1]) / "2" / "manifest.json").unlink(missing_ok=True)
            if jax.process_index() == 0:
                (pathlib.Path(sys.argv[1]) / "3" / "default" / "_METADATA").unlink()
        with Checkpoints(sys.argv[1], report=say) as checkpoints:
            step, state = checkpoints.restore_latest(wanted)
        say(f"{step} {state_fingerprint(state)}")
    """)
    address = f"localhost:{free_port()}"
    processes = [run(code, tmp_path, address, i, devices=2) for i in range(2)]
    try:
        outcomes = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outcomes
    for output, _ in outcomes:
        # Gloo writes to the same output, at any moment.
        end = f"2 {state_fingerprint(state_at(2))}"
        said = [line for line in output.splitlines() if line.startswith(("checkpoint", end))]
        assert "falling back to checkpoint 2" in said[-3], outcomes
        assert said[-2:] == [
            "checkpoint 2 had no manifest; its content matches its digest, so a manifest is added",
            end,
        ], outcomes
    assert (tmp_path / "2" / "manifest.json").exists()
    assert sorted(os.listdir(tmp_path))[:2] == ["2", "3.corrupt-" + sorted(os.listdir(tmp_path))[1][10:]]
    # Each process has hashed what it holds, and one process verifies the whole.
    assert sorted(digest.read(tmp_path / "2").arrays["params/kernel"]["parts"]) == [
        "0:128,0:64",
        "128:256,0:64",
        "256:384,0:64",
        "384:512,0:64",
    ]
    (tmp_path / "2" / "manifest.json").unlink()
    assert latest(tmp_path) == (
        2,
        ["checkpoint 2 had no manifest; its content matches its digest, so a manifest is added"],
    )


@pytest.mark.parametrize(
    ("steps", "kept"), [([10, 20, 23, 27], {20, 27}), ([3, 7], {7}), ([10, 20], {20}), ([0, 3], {3}), ([], set())]
)
def test_the_newest_regular_step_is_kept(steps, kept):
    """A run that diverges goes back to it."""
    assert LatestOrBest(1, 0, 10, {}).kept(steps) == kept


@pytest.mark.parametrize(("last_good", "kept"), [(7, {5, 30}), (20, {10, 30}), (21, {20, 30}), (31, {30}), (5, {30})])
def test_a_regular_step_before_the_last_good_one_is_kept(last_good, kept):
    """Later ones have the parameters that made the run diverge."""
    assert LatestOrBest(1, 0, 5, {}, last_good).kept([5, 10, 20, 30]) == kept


def test_a_run_that_diverges_restores_no_step_of_the_streak(tmp_path):
    """Steps 21 to 30 are bad, and 20 was the last good one."""
    with Checkpoints(tmp_path, keep_latest=1, regular_every=5, report=lambda line: None) as checkpoints:
        for step, last_good in ((0, 0), (15, 15), (17, 17), (20, 20), (25, 20), (28, 20)):
            checkpoints.save(step, state_at(step), last_good=last_good)
        step, state = checkpoints.restore_latest(abstract(state_at(0)), regular=True, below=20)
        assert step == 15
        assert state_fingerprint(state) == state_fingerprint(state_at(15))
        assert checkpoints.restore_latest(abstract(state_at(0)), regular=True, below=15) is None
        (tmp_path / "5.corrupt-20260101T000000Z").mkdir()  # of an earlier start: not all that there are
        assert checkpoints.restore_latest(abstract(state_at(0)), regular=True, below=15) is None


def test_a_run_that_was_stopped_before_its_first_step_has_no_regular_step(tmp_path):
    """It diverges in the same way as one that was not stopped, which has no step 0."""
    with Checkpoints(tmp_path, regular_every=5, report=lambda line: None) as checkpoints:
        checkpoints.save(0, state_at(0))
        assert checkpoints.restore_latest(abstract(state_at(0)), regular=True) is None
        assert checkpoints.restore_latest(abstract(state_at(0)))[0] == 0
