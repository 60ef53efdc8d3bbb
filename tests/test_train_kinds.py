"""Runs of other kinds than the one that test_train.py interrupts: one that diverges, many labels, ImageNet."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.small_imagenet import jpeg, photograph, write_small_imagenet
from tests.tiny_run import TINY, three_lines
from xception_jax.data.prepare.writer import Dataset, write_dataset
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.metrics.predictions import load_predictions


@pytest.mark.slow
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(run_python, tmp_path):
    process = run_python(
        "train.py",
        *TINY,
        f"--workdir={tmp_path}",
        "--config.schedule.learning_rate=1e9",
        "--config.schedule.warmup=15 steps",
        "--config.checkpoint.every=1 step",
        "--config.max_bad_steps=3",
        "--config.optimizer.weight_decay=0",
    )
    assert process.returncode == 70, process.stderr
    assert "went back to the checkpoint of step" in process.stderr
    three_lines(process)
    assert list((tmp_path / "checkpoints").glob("*/manifest.json"))


@pytest.mark.slow
def test_many_labels_an_image(run_python, tmp_path):
    process = run_python(
        "train.py",
        "--config=configs/multilabel.py",
        "--config.evaluation.heat_maps=0",
        f"--workdir={tmp_path}",
        "--config.model.width_multiplier=0.05",
        "--config.model.middle_blocks=0",
        "--config.data.train_split=train[:128]",
        "--config.data.eval_split=train[128:200]",
        "--config.data.test_split=test[:77]",
        "--config.batch_size=32",
        "--config.duration=4 steps",
    )
    assert process.returncode == 0, process.stderr
    test = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert test["count"] == 77
    assert 0 < test["map_at_k"] <= 1
    assert test["map_at_k_all"] == pytest.approx(test["map_at_k"])  # with 10 classes no ranking is too short
    assert re.search(r"test\[:77\] MAP|test MAP", process.stdout)
    assert re.search(r"learning rate \S+ after a warm-up of \d+ steps: the run ends before", process.stderr)
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_a_run_goes_on_where_more_damage_is_allowed(run_python, tmp_path):
    """The default ends a run at one damaged image in a thousand; `data.max_bad_fraction` is how it goes on."""
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=10)}
    )
    images = [jpeg(photograph(number)) for number in range(19)] + [b"no image"]
    examples = [(str(n), {"image": image, "label": n % 10}) for n, image in enumerate(images)]
    splits = {"train": examples, "test": examples}
    write_dataset(Dataset("mended", features, splits, "Test images."), tmp_path, progress=False)
    process = run_python(
        "train.py",
        *TINY,
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={tmp_path}",
        "--config.data.name=mended",
        "--config.data.train_split=train",
        "--config.data.eval_split=",
        "--config.data.test_split=test",
        "--config.data.max_bad_fraction=0.06",
        "--config.batch_size=10",
        "--config.duration=4 steps",
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("image 19 of train is damaged and is replaced by the next image") == 1
    assert process.stderr.count("image 19 of test is damaged and is left out") == 1
    tested = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (tested["split"], tested["count"], tested["damaged"]) == ("test", 19, 1)
    assert load_predictions(tmp_path / "run" / "predictions_test.npz").index.tolist() == list(range(19))


@pytest.mark.slow
def test_a_small_imagenet_trains_the_whole_network_at_299(run_python, tmp_path):
    """Two archives of real photographs, in the layout of ILSVRC 2012, through every stage to an evaluation."""
    write_small_imagenet(tmp_path / "archives", classes=5, train_per_class=4, validation=7)
    data_dir = tmp_path / "tfds"
    arguments = [
        "train.py",
        "--config=configs/imagenet.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.data_dir={data_dir}",
        "--config.model.dtype=float32",
        "--config.ema.decay=0",
        "--config.data.train_split=train",
        "--config.data.eval_split=",
        "--config.batch_size=2",
        "--config.evaluation.batch_size=4",
        "--config.data.threads=2",
    ]
    missing = run_python(*arguments)
    assert missing.returncode == 66
    assert "python -m xception_jax prepare imagenet2012" in three_lines(missing)[2]

    prepared = run_python(
        "-m", "xception_jax", "prepare", "imagenet2012", "--source", tmp_path / "archives", "--data_dir", data_dir
    )
    assert prepared.returncode == 0, prepared.stderr
    trained = run_python(*arguments, "--config.duration=2 steps", "--config.log_every=1 step")
    assert trained.returncode == 0, trained.stderr
    assert "22,855,952 parameters" in trained.stderr
    assert "8.36 G multiply-adds per image at 299" in trained.stderr
    assert "staircase, learning rate 0.045\n" in trained.stderr
    entries = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(entry["step"], entry["split"]) for entry in entries if entry["split"] == "train"] == [
        (1, "train"),
        (2, "train"),
    ]
    assert entries[-1]["count"] == 7
    assert np.isfinite(entries[-1]["loss"])
