import sys
import types

import numpy as np
import pytest

from xception_jax.config import override, resolve
from xception_jax.errors import ConfigError
from xception_jax.logs import trackers

CONFIG = override(resolve({}), {"name": "name", "logs.wandb_project": "project"})

instances = []


class FakeWriter:
    """Stands for tensorboardX.SummaryWriter, which is optional; fails at step 3."""

    def __init__(self, directory):
        self.directory, self.scalars, self.closed = directory, [], False
        instances.append(self)

    def add_scalar(self, name, value, step):
        if step == 3:
            raise OSError(28, "No space left on device")
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


@pytest.fixture
def tensorboard_module(monkeypatch):
    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = FakeWriter
    instances.clear()
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return module


def test_tensorboard_gets_numbers_by_split_and_name(tensorboard_module, tmp_path):
    tracker = trackers.tensorboard(CONFIG, tmp_path)
    tracker.write(1, "train", {"loss": np.float32(0.5), "note": "text"})
    tracker.write(2, "dev", {"top1": 0.25})
    tracker.close()
    (writer,) = instances
    assert writer.directory == str(tmp_path / "tensorboard")
    assert writer.scalars == [("train/loss", 0.5, 1), ("dev/top1", 0.25, 2)]
    assert writer.closed


def test_a_failure_is_one_warning_and_the_tracker_is_off(tensorboard_module, tmp_path, caplog):
    tracker = trackers.tensorboard(CONFIG, tmp_path)
    for step in (2, 3, 3, 4):
        tracker.write(step, "train", {"loss": 1.0})
    tracker.close()
    assert instances[0].scalars == [("train/loss", 1.0, 2)]
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard is off: OSError: [Errno 28] No space left on device"
    ]


def test_a_directory_that_cannot_be_used_is_one_warning(tensorboard_module, tmp_path, caplog, monkeypatch):
    def refuse(directory):
        raise PermissionError(13, "Permission denied", directory)

    monkeypatch.setattr(tensorboard_module, "SummaryWriter", refuse)
    tracker = trackers.tensorboard(CONFIG, tmp_path)
    tracker.write(1, "train", {"loss": 1.0})
    tracker.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Permission denied" in caplog.text


@pytest.fixture
def wandb_module(monkeypatch):
    module = types.ModuleType("wandb")
    module.started, module.logged, module.finished = [], [], []

    def init(**arguments):
        module.started.append(arguments)
        return types.SimpleNamespace(
            log=lambda numbers, step: module.logged.append((step, numbers)), finish=lambda: module.finished.append(True)
        )

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_continues_the_run_of_its_work_directory(wandb_module, tmp_path):
    for directory in ("a", "a", "b"):
        (tmp_path / directory).mkdir(exist_ok=True)
        tracker = trackers.wandb(CONFIG, tmp_path / directory)
        tracker.write(1, "train", {"loss": 0.5})
        tracker.close()
    first, again, other = wandb_module.started
    assert first["id"] == again["id"] != other["id"]
    assert (first["project"], first["name"], first["resume"]) == ("project", "name", "allow")
    assert first["config"]["model"]["num_classes"] == 1000
    assert wandb_module.logged == [(1, {"train/loss": 0.5})] * 3
    assert wandb_module.finished == [True] * 3


def test_wandb_without_a_network_is_one_warning(wandb_module, tmp_path, caplog, monkeypatch):
    def fail(**arguments):
        raise RuntimeError("no network\nand a long story")

    monkeypatch.setattr(wandb_module, "init", fail)
    tracker = trackers.wandb(CONFIG, tmp_path)
    tracker.write(1, "train", {"loss": 0.5})
    assert [record.getMessage() for record in caplog.records] == ["Weights & Biases is off: RuntimeError: no network"]


@pytest.mark.parametrize(
    ("package", "field", "value"), [("tensorboardX", "tensorboard", True), ("wandb", "wandb_project", "project")]
)
def test_a_missing_package_is_an_error_of_the_config(package, field, value, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert trackers.open_trackers(resolve({}), tmp_path) == []
    with pytest.raises(ConfigError) as error:
        trackers.open_trackers(override(resolve({}), {f"logs.{field}": value}), tmp_path)
    assert f"pip install {package}" in error.value.fix
    assert error.value.exit_code == 78
