"""Whole runs in gs://, in this process: the same bits as on a disk, after any of their writes, and with one owner."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from importlib import import_module

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from orbax.checkpoint._src.path import gcs_utils

from configs.fashion_mnist import get_config
from tests.storage.conftest import BUCKET
from tests.storage.gcs_objects import Mutation, Objects
from tests.storage.gcs_requests import Fault
from xception_jax.api import train
from xception_jax.cli import parse
from xception_jax.config import ExperimentConfig, override, resolve
from xception_jax.errors import InputMissingError, UserError, WorkdirError
from xception_jax.storage import hold, open_store
from xception_jax.training import restore
from xception_jax.training.run_directory import LEASE, RunDirectory, metrics_of_run
from xception_jax.training.summary import Summary

RUN = f"gs://{BUCKET}/runs/first"

# When a request fails, gcsfs and Orbax close event loops with tasks in them. Python notices when it collects them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def config(shared_environment) -> ExperimentConfig:
    fields = {
        "model.width_multiplier": 0.05,
        "model.middle_blocks": 0,
        "data.data_dir": shared_environment["TFDS_DATA_DIR"],
        "data.train_split": "train[:64]",
        "data.eval_split": "",
        "data.test_split": "test[:16]",
        "batch_size": 8,
        "evaluation.batch_size": 16,
        "duration": "6 steps",
        "evaluation.heat_maps": 0,
        "ema.decay": 0.0,
        "checkpoint.every": "2 steps",
        "log_every": "1 step",
    }
    return override(resolve(get_config()), fields)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Keeps what these runs compile: they compile the same programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


@dataclasses.dataclass
class Recording:
    """A run in gs:// that was not disturbed: its writes and its result."""

    mutations: list[Mutation]
    summary: Summary


@pytest.fixture(scope="module")
def recording(gcs_process, config) -> Recording:
    gcs_process.objects = Objects([BUCKET])
    gcs_process.control = lambda request: None
    with gcs_process.as_default():
        summary = train(config, RUN)
    return Recording(list(gcs_process.mutations), summary)


@pytest.fixture
def finished(gcs, recording):
    """Returns the server after the run has finished."""
    gcs.objects = Objects([BUCKET], recording.mutations)
    return gcs


def names_in(gcs) -> set[str]:
    return {item["name"].removeprefix("runs/first/") for item in gcs.objects.list(BUCKET, {})["items"]}


def without_times(entries: list[dict]) -> list[dict]:
    """Returns what a run has measured of the network, which is the same after any number of starts."""
    measured = ("seconds", "images_per_second", "input_share", "time")
    return [
        {name: value for name, value in entry.items() if not name.startswith(measured)}
        for entry in entries
        if entry["split"] not in ("start", "interval")
    ]


def test_a_run_has_the_bits_and_files_of_one_on_a_disk(finished, recording, config, tmp_path):
    on_disk = train(config, str(tmp_path / "run"))
    assert recording.summary.state_sha256 == on_disk.state_sha256
    assert str(recording.summary.report) == f"{RUN}/report.html"
    assert str(recording.summary.checkpoint) == f"{RUN}/checkpoints/6"
    files = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {name.split("/")[0] for name in files} - {"lock"} == {name.split("/")[0] for name in names_in(finished)} - {
        LEASE
    }
    assert without_times(metrics_of_run(RUN)) == without_times(metrics_of_run(str(tmp_path / "run")))
    assert restore.open_run(RUN).step == 6
    assert json.loads(finished.objects.get(BUCKET, f"runs/first/{LEASE}", {}).content)["released"]


@pytest.mark.faults
def test_the_finished_run_is_not_trained_again(finished, recording, config):
    before = metrics_of_run(RUN)
    assert train(config, RUN).state_sha256 == recording.summary.state_sha256
    assert without_times(metrics_of_run(RUN)) == without_times(before)


def check_what_was_committed(gcs, recording: Recording, count: int) -> None:
    """Checks that the state and the metrics after some writes belong together."""
    gcs.objects = Objects([BUCKET], recording.mutations[:count])
    try:
        step = restore.open_run(RUN).step
    except InputMissingError:
        step = 0
    complete = without_times(metrics_of(recording))
    pushed = without_times(metrics_of_run(RUN))
    assert [entry for entry in pushed if entry["step"] <= step and entry["split"] == "train"] == [
        entry for entry in complete if entry["step"] <= step and entry["split"] == "train"
    ]


def metrics_of(recording: Recording) -> list[dict]:
    """Returns the metrics of the whole run."""
    contents = [
        mutation.stored.content
        for mutation in recording.mutations
        if mutation.name == "runs/first/metrics.jsonl" and mutation.stored
    ]
    return [json.loads(line) for line in contents[-1].splitlines()]


def test_a_committed_step_has_its_metrics_after_a_sample_of_the_writes(gcs, recording):
    commits = [
        number
        for number, mutation in enumerate(recording.mutations, 1)
        if mutation.stored and mutation.name.count("/") == 4 and mutation.name.endswith("/commit_success.txt")
    ]
    assert len(commits) == 3
    for count in (0, commits[0], commits[-1] - 1, len(recording.mutations)):
        check_what_was_committed(gcs, recording, count)


@pytest.mark.faults
def test_a_committed_step_has_its_metrics_after_each_write(gcs, recording):
    for count in range(len(recording.mutations) + 1):
        check_what_was_committed(gcs, recording, count)


def resume(gcs, recording: Recording, config: ExperimentConfig, count: int) -> None:
    """Goes on with a run that was killed after some writes."""
    gcs.objects = Objects([BUCKET], recording.mutations[:count])
    store = open_store(RUN, "--workdir")
    if store.read(LEASE):  # of this process, which lives
        owner = json.loads(store.read(LEASE) or b"") | {"released": True}
        store.put(LEASE, json.dumps(owner))
    summary = train(config, RUN)
    assert summary.state_sha256 == recording.summary.state_sha256
    assert without_times(metrics_of_run(RUN)) == without_times(metrics_of(recording))


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits_and_metrics(gcs, recording, config):
    resume(gcs, recording, config, len(recording.mutations) // 2)


@pytest.mark.faults
def test_a_run_that_was_killed_after_any_write_ends_with_the_same_bits_and_metrics(gcs, recording, config):
    for count in range(0, len(recording.mutations) + 1, 3):
        resume(gcs, recording, config, count)


def test_a_second_run_is_refused_and_names_the_holder(gcs, config, capsys):
    store = open_store(RUN, "--workdir")
    with hold(store, LEASE, renew_every=0.5), pytest.raises(WorkdirError, match="another run holds") as error:
        train(config, RUN)
    assert f"process {os.getpid()} on" in error.value.where
    assert error.value.where.startswith(RUN)
    assert names_in(gcs) == {LEASE}


def test_checkpoints_of_another_program_are_not_deleted(gcs, config):
    store = open_store(RUN, "--workdir")
    store.put("checkpoints/1000/model.pt", "precious")
    store.put("checkpoints/1000/_CHECKPOINT_METADATA", "{}")
    with pytest.raises(WorkdirError, match=r"they include 1000/model\.pt"):
        train(config, RUN)
    assert store.read("checkpoints/1000/model.pt") == b"precious"


def test_another_process_that_hangs_leaves_its_stacks_in_the_bucket(gcs, tmp_path):
    (tmp_path / "stacks_1.txt").write_text("the stacks")
    store = open_store(RUN, "--workdir")
    RunDirectory(RUN, tmp_path, store).push("stacks_1.txt")
    assert store.read("stacks_1.txt") == b"the stacks"


def taken_over(gcs, config, name: str) -> WorkdirError:
    """Lets another run take over when an object is about to be written, and returns the error of the first run."""
    other = json.dumps({"nonce": "other", "pid": 7, "host": "elsewhere", "since": "now", "command": "train"}).encode()
    taken = threading.Event()

    def control(request):
        if request.changes and name in request.path + request.query.get("name", "") and not taken.is_set():
            taken.set()
            gcs.objects.put(BUCKET, f"runs/first/{LEASE}", other, {})
        return None

    gcs.control = control
    with pytest.raises(WorkdirError, match="has taken over") as error:
        train(config, RUN)
    assert "process 7 on elsewhere" in error.value.where
    assert gcs.objects.get(BUCKET, f"runs/first/{LEASE}", {}).content == other
    return error.value


@pytest.mark.faults
def test_a_run_that_was_taken_over_commits_nothing(gcs, config):
    taken_over(gcs, config, "checkpoints/2/digest/process_0.json")
    assert "checkpoints/2/commit_success.txt" not in names_in(gcs)
    assert "report.html" not in names_in(gcs)


def refusal(command: str, *arguments: str) -> UserError:
    """Returns the error of a command."""
    args = parse([command, *arguments])
    with pytest.raises(UserError) as error:
        import_module(f"xception_jax.cli.{command}").run(args)
    return error.value


@pytest.mark.parametrize(
    ("workdir", "code", "reason"),
    [
        ("s3://bucket/run", 73, "Orbax does not support it"),
        ("gs://no-such-bucket/run", 73, "the bucket no-such-bucket does not exist"),
        ("gs:/bucket/run", 78, "write gs://bucket/run"),
        ("gs://bucket/a?b", 78, "character with a special meaning"),
        ("az://bucket/run", 78, "not the address of a supported object store"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_before_anything_is_created(
    gcs, monkeypatch, tmp_path, workdir, code, reason
):
    monkeypatch.chdir(tmp_path)
    error = refusal("train", "--config=fashion_mnist", f"--workdir={workdir}")
    assert error.exit_code == code
    assert reason in str(error)
    assert not gcs.mutations
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "reason"), [(403, "no permission"), (401, "credentials")])
def test_an_account_without_permission_is_refused(gcs, status, reason):
    gcs.control = lambda request: Fault(status=status)
    error = refusal("train", "--config=fashion_mnist", f"--workdir={RUN}")
    assert error.exit_code == 73
    assert reason in error.what


@pytest.fixture
def unknown_bucket():
    """Lets Orbax forget the bucket, which it looks up once in a process."""
    gcs_utils.get_bucket.cache_clear()
    yield
    gcs_utils.get_bucket.cache_clear()


def test_an_account_that_may_not_look_up_the_bucket_is_told_the_role(gcs, config, unknown_bucket):
    """As with the role Storage Object User alone. Orbax looks up the bucket."""
    gcs.control = lambda request: Fault(status=403) if request.path == f"/storage/v1/b/{BUCKET}" else None
    with pytest.raises(WorkdirError, match="no permission") as error:
        train(config, RUN)
    assert "Storage Legacy Bucket Reader" in error.value.fix


def test_credentials_without_a_project_are_told_the_variable(gcs, config, monkeypatch, unknown_bucket):
    def client(*args, **kwargs):
        raise OSError("Project was not passed and could not be determined from the environment.")

    monkeypatch.setattr("google.cloud.storage.Client", client)
    with pytest.raises(WorkdirError) as error:
        train(config, RUN)
    assert "GOOGLE_CLOUD_PROJECT" in error.value.fix


@pytest.mark.parametrize(
    ("command", "arguments", "code"),
    [("train", ("--config=fashion_mnist", f"--workdir={RUN}"), 73), ("evaluate", (RUN,), 66)],
)
def test_without_the_packages_the_extra_is_named(monkeypatch, command, arguments, code):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    error = refusal(command, *arguments)
    assert error.exit_code == code
    assert "pip install '.[cloud]'" in error.fix
