"""Two hosts that cannot train together say so before they train: the same code on both, three lines once."""

from __future__ import annotations

import os
import signal

import pytest

from tests.processes.conftest import ended


def assert_told_once(outcomes, code):
    assert [outcome[-1] for outcome in outcomes] == [code, code], outcomes
    errors = "".join(errors for _, errors, _ in outcomes)
    assert errors.count("error: ") == 1, errors
    assert "Traceback" not in errors
    return errors


def test_different_configs(train_pair, tmp_path):
    errors = assert_told_once(ended(train_pair([], ["--config.seed=5"])), 78)
    assert "processes 0 and 1 have different configs: config.seed is 0 and 5" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_work_directories_that_are_not_shared(train_pair, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    errors = assert_told_once(ended(train_pair([], [f"--workdir={tmp_path / 'elsewhere'}"])), 73)
    assert "the work directory is not shared: this host does not see what process 0 wrote (process 1 of 2)" in errors


@pytest.fixture
def other_data(run_python, tmp_path):
    """Returns dataset_info.json of a second copy of the dataset, and the field that makes a host read it."""
    prepared = run_python("-m", "xception_jax", "prepare", "fashion_mnist_subset", "--data_dir", tmp_path / "tfds")
    assert prepared.returncode == 0, prepared.stderr
    (info,) = (tmp_path / "tfds").glob("*/*/dataset_info.json")
    return info, f"--config.data.data_dir={tmp_path / 'tfds'}"


@pytest.mark.faults
def test_data_that_are_damaged_on_one_host(train_pair, other_data):
    info, field = other_data
    info.write_text("{")
    assert "(process 1 of 2)" in assert_told_once(ended(train_pair([], [field])), 65)


@pytest.mark.faults
def test_data_that_are_others(train_pair, other_data):
    info, field = other_data
    info.write_text(info.read_text().replace("The first images", "Other images"))
    assert "different datasets" in assert_told_once(ended(train_pair([], [field])), 66)


@pytest.mark.faults
def test_a_work_directory_with_a_damaged_config(train_pair, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("no JSON")
    errors = assert_told_once(ended(train_pair([], [])), 78)
    assert "(process 0 of 2)" in errors


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_is_lost_while_training(train_pair, tmp_path, victim):
    pair = train_pair(["--config.duration=500 epochs"], ["--config.duration=500 epochs"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert all(process.poll() is None for process in pair), ended(pair)
    os.kill(pair[victim].pid, signal.SIGKILL)
    (_, errors, code) = ended(pair)[1 - victim]
    assert code == 75, errors
    assert f"lost process {victim} of 2" in errors


@pytest.mark.faults
def test_one_host_writes_profile_trackers_and_compiled_programs(train_pair, tmp_path):
    compiled = tmp_path / "compiled"
    fields = ["--config.profile=3", "--config.logs.tensorboard=True", f"--config.compilation_cache={compiled}"]
    outcomes = ended(train_pair(fields, fields))
    assert [code for _, _, code in outcomes] == [0, 0], outcomes
    for pattern in ("profile/**/*.xplane.pb", "tensorboard/*", "metrics.jsonl"):
        assert len(list((tmp_path / "run").glob(pattern))) == 1, pattern
    assert "profile of 3 steps" in outcomes[0][1]
    assert "profile of 3 steps" not in outcomes[1][1]
    assert not any("cache" in errors for _, errors, _ in outcomes)  # no warning of JAX
    assert len(list(compiled.glob("*-cache"))) > 0


@pytest.mark.faults
def test_a_collective_that_waits_for_ever(train_pair, tmp_path):
    """One process is frozen, and the heartbeat is so long that only the watchdog of the other one notices it."""
    fields = ["--config.duration=5000 epochs", "--config.watchdog.min_seconds=2", "--config.distributed.heartbeat=600"]
    pair = train_pair(fields, fields)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert all(process.poll() is None for process in pair), ended(pair)
    os.kill(pair[1].pid, signal.SIGSTOP)
    try:
        _, errors = pair[0].communicate(timeout=100)
        assert pair[0].returncode == 75, errors
        assert "no step has ended for" in errors
        assert "(process 0 of 2)" in errors
        assert "loop.py" in (tmp_path / "run" / "stacks_0.txt").read_text()
    finally:
        os.kill(pair[1].pid, signal.SIGCONT)
    _, errors = pair[1].communicate(timeout=100)
    assert pair[1].returncode == 75, errors
    assert "lost process 0 of 2" in errors
