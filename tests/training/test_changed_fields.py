"""A run that resumes with other fields: what it keeps, and what it refuses."""

import json
import shutil
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event

import xception_jax
from xception_jax.config import default_config
from xception_jax.data.prepare.tfrecord import read_tfrecord
from xception_jax.errors import ConfigError
from xception_jax.logs.metrics_log import read_metrics

SMALL = {
    "stem": "small", "width_multiplier": 0.05, "middle_blocks": 0, "num_classes": 10, "dropout_rate": 0.0,
}  # fmt: skip


def config_of(environment, **fields):
    config = default_config()
    config.model.update(SMALL)
    config.data.name, config.data.data_dir = "fashion_mnist_subset", environment["TFDS_DATA_DIR"]
    config.data.image_size, config.data.augmentation = 28, "none"
    config.data.train_split, config.data.eval_split, config.data.test_split = "train[:64]", "train[64:80]", ""
    config.batch_size, config.evaluation.batch_size, config.duration = 8, 8, "12 steps"
    config.evaluation.every, config.checkpoint.every, config.log_every = "4 steps", "7 steps", "5 steps"
    config.evaluation.heat_maps, config.checkpoint.keep_latest, config.checkpoint.keep_best = 0, 5, 1
    config.logs.tensorboard, config.logs.images = True, 0
    for name, value in fields.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section) if field else config, field or name, value)
    return config


def test_a_run_resumes_with_what_may_change_and_refuses_the_rest(tmp_path, shared_environment, capsys, monkeypatch):
    weighted = config_of(shared_environment, loss__class_weights="balanced", logs__histograms=True)
    xception_jax.train(weighted, tmp_path)
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = [value for record in read_tfrecord(path) for value in Event.FromString(record).summary.value]
    assert any(value.HasField("histo") for value in values)
    assert not any(value.HasField("image") for value in values)
    assert "TensorBoard is off" not in capsys.readouterr().out

    # A kill after step 7, between two log points: the first steps of the interval have another loss.
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    xception_jax.train(config_of(shared_environment, loss__class_weights=""), tmp_path)
    (entry,) = [
        entry for entry in read_metrics(tmp_path / "metrics.jsonl") if (entry["step"], entry["split"]) == (10, "train")
    ]
    assert "loss" in entry
    assert "weighted_loss" not in entry

    # Only step 12 has metrics of its own state: 7 was saved three steps after an evaluation.
    records = {
        step: json.loads((tmp_path / "checkpoints" / step / "manifest.json").read_text())["record"]["metrics"]
        for step in ("7", "12")
    }
    assert (bool(records["7"]), bool(records["12"])) == (False, True)

    files = ("config.json", "metrics.jsonl")
    stored = [(tmp_path / name).read_text() for name in files]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        xception_jax.train(config_of(shared_environment, duration="24 steps", logs__wandb_project="w"), tmp_path)
    with pytest.raises(ConfigError, match="features cannot be kept"):
        xception_jax.train(config_of(shared_environment, data__cache_features=True), tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()
    with pytest.raises(ConfigError, match="the run is at step 12, after the 8 steps"):
        xception_jax.train(config_of(shared_environment, duration="8 steps"), tmp_path)
    with pytest.raises(ConfigError, match="share images"):
        xception_jax.train(config_of(shared_environment, data__test_split="train[:8]"), tmp_path)
    assert [(tmp_path / name).read_text() for name in files] == stored
