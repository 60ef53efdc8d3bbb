"""The lock, the config and the directory itself, against real second processes and a file system that refuses."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from xception_jax.config import default_config, from_json, override, resolve
from xception_jax.errors import ConfigError, WorkdirError
from xception_jax.training import workdir as workdir_module
from xception_jax.training.workdir import check_workdir, open_workdir, write_config

HOLDER = """
    import sys, time
    from xception_jax.config import default_config, resolve
    from xception_jax.training.workdir import open_workdir, write_config
    config = resolve(default_config())
    with open_workdir(sys.argv[1], config) as path:
        write_config(path, config)
        print("held", flush=True)
        time.sleep(60)
"""


def config_with(**changes):
    return override(resolve(default_config()), {name.replace("__", "."): value for name, value in changes.items()})


@contextlib.contextmanager
def opened(path, config, **options):
    """Opens a work directory as a run does that nothing refuses."""
    with open_workdir(path, config, **options) as workdir:
        write_config(workdir, config)
        yield workdir


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_fresh_directory_gets_the_config(tmp_path):
    config = config_with(batch_size=64)
    with opened(tmp_path / "a" / "b", config) as workdir:
        assert workdir == tmp_path / "a" / "b"
        assert from_json((workdir / "config.json").read_text()) == config
    assert sorted(os.listdir(workdir)) == ["config.json", "lock"]


def test_second_run_is_refused_and_told_who_holds_it(tmp_path, holder):
    start = time.monotonic()
    with pytest.raises(WorkdirError, match="another run holds") as caught, open_workdir(tmp_path, config_with(seed=1)):
        pass
    assert time.monotonic() - start < 3
    assert caught.value.exit_code == 73
    assert f"process {holder.pid} on {os.uname().nodename} since 20" in caught.value.where
    assert "python" in caught.value.where
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0  # that of the first run, untouched


def test_lock_of_a_killed_run_is_stale(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == holder.pid
    with open_workdir(tmp_path, config_with()):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("is_released", [True, False])
def test_a_lock_of_another_host_is_waited_for(tmp_path, holder, monkeypatch, capsys, is_released):
    """A file server may keep the lock of a host that was lost, and the run is started again at once."""
    data = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(data | {"host": "lost"}))
    check_workdir(tmp_path, alone=True)  # does not wait, and leaves it to `open_workdir`
    monkeypatch.setattr(workdir_module, "LOCK_OF_LOST_HOST", 1.0 if not is_released else 100.0)
    if is_released:
        threading.Timer(1.0, holder.kill).start()
        with open_workdir(tmp_path, config_with()):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    else:
        with pytest.raises(WorkdirError, match="another run holds"), open_workdir(tmp_path, config_with()):
            pass
    assert "s for the lock of process" in capsys.readouterr().err


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    (tmp_path / "lock").touch()
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(WorkdirError, match="the file system has no locks"), open_workdir(tmp_path, config_with()):
        pass
    with pytest.raises(WorkdirError, match="the file system has no locks"):
        check_workdir(tmp_path, alone=True)


def test_lock_is_released_when_the_context_ends(tmp_path):
    for _ in range(2):
        with open_workdir(tmp_path, config_with()):
            with pytest.raises(WorkdirError, match="another run"), open_workdir(tmp_path, config_with()):
                pass


def test_other_processes_of_a_run_neither_lock_nor_write(tmp_path):
    with open_workdir(tmp_path, config_with()):
        with open_workdir(tmp_path, config_with(), primary=False) as workdir:
            assert workdir == tmp_path
    with open_workdir(tmp_path / "none", config_with(), primary=False):
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("below", ["", "directory"])
def test_a_file_in_its_place(tmp_path, below):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / below
    with pytest.raises(WorkdirError, match="there is a file in its place") as caught, open_workdir(path, config_with()):
        pass
    assert caught.value.exit_code == 73


# Permission bits do not bind root, but no one creates a file in /proc.
@pytest.mark.parametrize("path", ["/proc/run", "/proc"])
def test_directory_that_cannot_be_written(path):
    with pytest.raises(WorkdirError, match="cannot be used"), open_workdir(path, config_with()):
        pass


def test_same_config_again_is_silent(tmp_path):
    lines = []
    for _ in range(2):
        with opened(tmp_path, config_with(data__crop_area=(0.1, 1.0)), report=lines.append):
            pass
    assert lines == []


def test_extending_a_run_is_noted_and_stored(tmp_path):
    lines = []
    with opened(tmp_path, config_with()):
        (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    config = config_with(duration="200 epochs", data__threads=4)
    with opened(tmp_path, config, report=lines.append):
        pass
    assert lines == [
        "changed since the last run in this directory: config.data.threads: 0 -> 4",
        "changed since the last run in this directory: config.duration: '169 epochs' -> '200 epochs'",
    ]
    assert from_json((tmp_path / "config.json").read_text()) == config


@pytest.mark.parametrize("checkpoint", ["100", "100.corrupt-20260101T000000Z"])
def test_another_experiment_is_refused(tmp_path, checkpoint):
    with opened(tmp_path, config_with()):
        (tmp_path / "checkpoints" / checkpoint).mkdir(parents=True)
    before = (tmp_path / "config.json").read_text()
    other = config_with(model__num_classes=10, model__group_width=8, data__name="a", seed=3, duration="1 epoch")
    with pytest.raises(ConfigError, match="4 of its fields differ") as caught, open_workdir(tmp_path, other):
        pass
    assert caught.value.exit_code == 78
    assert caught.value.details == (
        "seed: 0 -> 3",
        "model.num_classes: 1000 -> 10",
        "model.group_width: None -> 8",
        "data.name: 'imagenet2012' -> 'a'",
    )
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ({"optimizer__weight_decay": 1e-4}, {"optimizer__weight_decay": 0.0}, "optimizer.weight_decay: 0.0001 -> 0.0"),
        ({"optimizer__weight_decay": 1e-4}, {"optimizer__weight_decay": 1e-5}, ""),
        ({}, {"optimizer__clip_norm": 1.0}, "optimizer.clip_norm: 0.0 -> 1.0"),
        ({}, {"ema__decay": 0.0}, "ema.decay: 0.9999 -> 0.0"),
        ({}, {"ema__decay": 0.99}, ""),
        ({}, {"optimizer__multipliers": (("^head/", 10.0),)}, "optimizer.multipliers: [] -> [['^head/', 10.0]]"),
        ({}, {"optimizer__name": "adamw"}, "optimizer.name: 'sgd' -> 'adamw'"),
        ({"optimizer__name": "adamw", "optimizer__weight_decay": 0.1}, {"optimizer__weight_decay": 0.0}, ""),
        ({"data__test_split": "a"}, {"data__test_split": "b"}, "data.test_split: 'a' -> 'b'"),
        ({"data__test_split": ""}, {"data__test_split": "b"}, ""),
        ({"data__test_split": "a"}, {"data__test_split": ""}, ""),
        ({}, {"evaluation__map_at": 5}, "evaluation.map_at: 100 -> 5"),
    ],
)
def test_what_would_change_the_state_or_its_metrics_is_refused(tmp_path, before, after, refused):
    with opened(tmp_path, config_with(**before)):
        (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    stored = (tmp_path / "config.json").read_text()
    other = config_with(**before | after)
    if not refused:
        with opened(tmp_path, other, report=lambda line: None):
            return
    with pytest.raises(ConfigError) as caught, open_workdir(tmp_path, other):
        pass
    assert refused in caught.value.details
    assert (tmp_path / "config.json").read_text() == stored


def test_a_test_split_is_not_added_to_the_test_result_of_another(tmp_path):
    for split in ("a", ""):
        with opened(tmp_path, config_with(data__test_split=split)):
            (tmp_path / "checkpoints" / "100").mkdir(parents=True, exist_ok=True)
            (tmp_path / "metrics.jsonl").write_text('{"step": 100, "split": "test", "top1": 0.5, "count": 10}\n')
    with (
        pytest.raises(ConfigError, match="may be of another test split") as caught,
        open_workdir(tmp_path, config_with(data__test_split="b")),
    ):
        pass
    assert "config.data.test_split: '' -> 'b'" in caught.value.where
    (tmp_path / "checkpoints" / "100").rmdir()  # the run begins again
    with opened(tmp_path, config_with(data__test_split="b")):
        pass


def test_before_the_first_checkpoint_a_mistake_is_corrected_in_place(tmp_path):
    lines = []
    with opened(tmp_path, config_with()):
        (tmp_path / "checkpoints" / "100.orbax-checkpoint-tmp").mkdir(parents=True)
    with opened(tmp_path, config_with(model__num_classes=10), report=lines.append):
        assert json.loads((tmp_path / "config.json").read_text())["model"]["num_classes"] == 10
    assert lines == ["changed since the last run in this directory: config.model.num_classes: 1000 -> 10"]


def test_field_that_the_stored_config_does_not_know(tmp_path):
    with opened(tmp_path, config_with()):
        (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["model"]["padding"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with opened(tmp_path, config_with()):
        pass
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with (
        pytest.raises(ConfigError, match="1 of its fields"),
        open_workdir(tmp_path, config_with(model__padding="symmetric")),
    ):
        pass


def test_damaged_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config of the run cannot be read"), open_workdir(tmp_path, config_with()):
        pass


def test_a_config_of_something_else_is_not_replaced(tmp_path):
    """As that of weights of the Hugging Face Hub."""
    (tmp_path / "config.json").write_text('{"architecture": "xception41"}')
    with pytest.raises(WorkdirError, match="not that of a run"), open_workdir(str(tmp_path), config_with()):
        pass
    assert (tmp_path / "config.json").read_text() == '{"architecture": "xception41"}'
