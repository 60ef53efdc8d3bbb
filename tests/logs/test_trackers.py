"""Trackers: TensorBoard and Weights & Biases (offline) get the numbers, images and histograms of a run."""

from __future__ import annotations

import io
import resource
import signal
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from xception_jax.config import override, resolve
from xception_jax.data.prepare.tfrecord import read_tfrecord
from xception_jax.errors import ConfigError
from xception_jax.logs import trackers

CONFIG = override(resolve({}), {"name": "name", "logs.wandb_project": "project"})
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
VALUES = np.random.default_rng(0).normal(size=1000)


def events(workdir) -> list[Event]:
    """Returns the events of a directory; the first one says which format it is."""
    (path,) = (workdir / "tensorboard").iterdir()
    return [Event.FromString(record) for record in read_tfrecord(path)][1:]


def send_everything(tracker) -> None:
    tracker.write(1, "train", {"loss": np.float32(0.5)})
    tracker.images(2, "train/images", IMAGES)
    tracker.histograms(3, {"head/kernel": np.histogram(VALUES, 64)})


def test_tensorboard_gets_numbers_images_and_histograms(tmp_path):
    tracker = trackers.tensorboard(CONFIG, tmp_path)
    send_everything(tracker)
    number, picture, histogram = events(tmp_path)  # what was sent is on the disk before the end
    (value,) = number.summary.value
    assert (number.step, value.tag, value.simple_value) == (1, "train/loss", 0.5)
    (value,) = picture.summary.value
    grid = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
    assert (picture.step, value.tag, grid.shape) == (2, "train/images", (8, 32, 3))
    np.testing.assert_array_equal(grid[:8, :8], IMAGES[0])
    (value,) = histogram.summary.value
    assert (histogram.step, value.tag, value.histo.num) == (3, "head/kernel", 1000)
    assert value.histo.sum / 1000 == pytest.approx(VALUES.mean(), abs=0.01)
    assert value.histo.sum_squares / 1000 == pytest.approx((VALUES**2).mean(), abs=0.01)
    assert (value.histo.min, value.histo.max) == pytest.approx((VALUES.min(), VALUES.max()))
    tracker.close()
    assert len(events(tmp_path)) == 3


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what the writer could not flush
def test_a_full_disk_is_one_warning_and_the_tracker_is_off(tmp_path, caplog):
    tracker = trackers.tensorboard(CONFIG, tmp_path)
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        for step in range(100):
            tracker.write(step, "train", {"loss": 1.0})
        tracker.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoard is off: OSError: [Errno 27] File too large"
    ]


def test_a_directory_that_cannot_be_used_is_one_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").touch()
    tracker = trackers.tensorboard(CONFIG, tmp_path)
    send_everything(tracker)
    tracker.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "TensorBoard is off" in caplog.text


def test_wandb_continues_the_run_of_its_work_directory(tmp_path, monkeypatch):
    pytest.importorskip("wandb")  # not among the packages for tests: it needs thirty others
    monkeypatch.setenv("WANDB_MODE", "offline")
    for _ in range(2):
        tracker = trackers.wandb(CONFIG, tmp_path)
        send_everything(tracker)
        tracker.close()
    name = (tmp_path / "wandb_id").read_text()
    first, again = sorted((tmp_path / "wandb").glob(f"offline-run-*-{name}*/run-{name}.wandb"))
    for path in (first, again):
        for text in (b"train/loss", b"head/kernel", b"num_classes", b"project"):
            assert text in path.read_bytes()
        assert len(list(path.parent.glob("files/media/images/train/*.png"))) == len(IMAGES)


def test_wandb_that_cannot_start_is_one_warning(tmp_path, caplog):
    pytest.importorskip("wandb")
    (tmp_path / "wandb_id").mkdir()
    tracker = trackers.wandb(CONFIG, tmp_path)
    send_everything(tracker)
    tracker.close()
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith("Weights & Biases is off: IsADirectoryError")


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
