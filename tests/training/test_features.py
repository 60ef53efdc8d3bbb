"""From a folder to a classifier on stored features: the same head as on images, resumed and unfrozen."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs.finetune import get_config
from tests.data.small_imagenet import jpeg, photograph
from tests.models.random_weights import random_variables
from xception_jax.cli import evaluate
from xception_jax.config import from_json, override, resolve
from xception_jax.data.datasets import open_dataset
from xception_jax.data.prepare.image_folder import Skipped, image_folder
from xception_jax.data.prepare.writer import write_dataset
from xception_jax.errors import ConfigError
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.metrics.predictions import load_predictions
from xception_jax.models import create_model
from xception_jax.runs import open_network, open_run
from xception_jax.training import features
from xception_jax.training.experiment import make_experiment
from xception_jax.training.initial_weights import complete_config, first_state
from xception_jax.training.train import train
from xception_jax.weights import Network, Preprocessing, load_network, save_network

SIZE = 32
SMALL = {"width_multiplier": 0.05, "middle_blocks": 0, "stem": "small", "num_classes": 1}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Returns a directory with the dataset 'scans': 36 dark and 24 bright images, three of each patient."""
    directory = tmp_path_factory.mktemp("scans")
    for label, count, brightness in (("bright", 24, 1.0), ("dark", 36, 0.4)):
        for number in range(count):
            path = directory / "folder" / label / f"patient{number // 3}{label}_{number % 3}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg((photograph(number, 40) * brightness).astype(np.uint8)))
    shares = {"train": 0.6, "validation": 0.2, "test": 0.2}
    dataset = image_folder(directory / "folder", "scans", Skipped(), shares=shares, groups="(patient.*)_")
    write_dataset(dataset, directory, progress=False)
    return directory


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Returns a file of a small network with a single logit."""
    model = create_model({"dropout_rate": 0.3, **SMALL})
    variables = random_variables(model, jnp.zeros((1, SIZE, SIZE, 3)))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_network(
        path, Network(model.config, jax.tree.map(np.asarray, variables), Preprocessing(size=SIZE), None, "", "")
    )
    return path


@pytest.fixture(scope="module")
def config(data_dir, weights):
    """Returns the config of docs/howto/finetune.md for a machine without a GPU; no field describes the network."""
    fields = {
        "init.weights": str(weights),
        "data.name": "scans",
        "data.data_dir": str(data_dir),
        "data.image_size": SIZE,
        "data.threads": 2,
        "loss.class_weights": "balanced",
        "batch_size": 8,
        "duration": "20 steps",
        "schedule.warmup": "2 steps",
        "schedule.learning_rate": 0.02,
        "checkpoint.every": "10 steps",
        "evaluation.every": "10 steps",
        "evaluation.batch_size": 5,
        "log_every": "5 steps",
    }
    return override(resolve(get_config("head")), fields)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """Returns the work directory of a finished run, and its summary."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(config, str(workdir))


def leaves(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}


@pytest.mark.slow
def test_a_head_is_trained_and_judged_without_any_field_of_the_network(run, weights, data_dir):
    workdir, summary = run
    saved = from_json((workdir / "config.json").read_text())
    assert {name: getattr(saved.model, name) for name in SMALL} == SMALL
    entries = read_metrics(workdir / "metrics.jsonl")
    assert [entry["step"] for entry in entries if entry["split"] == "dev"] == [10, 20]
    trained = [entry for entry in entries if entry["split"] == "train"]
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert all(entry["weighted_loss"] != entry["loss"] for entry in trained)
    assert summary.metrics["split"] == "test"
    assert {"top1", "roc_auc", "loss"} <= summary.metrics.keys()
    predictions = load_predictions(workdir / "predictions_test.npz")
    np.testing.assert_allclose(predictions.probabilities.sum(1), 1, rtol=1e-6)  # of both classes
    assert len(list((data_dir / "features").glob("*.npz"))) >= 3

    before, after = load_network(weights), open_run(str(workdir))
    for variables in after.variables.values():
        old, new = leaves(before.variables["params"]), leaves(variables["params"])
        for name, leaf in old.items():
            assert np.array_equal(leaf, new[name]) == (not name.startswith("head/")), name
        jax.tree.map(np.testing.assert_array_equal, before.variables["batch_stats"], variables["batch_stats"])
    assert open_network(str(workdir)).classes == ("bright", "dark")


def test_evaluate_finds_on_images_what_the_run_found_on_features(run, capsys):
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    assert evaluate.run(parser.parse_args([str(run[0]), "--json"])) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("count", "top1", "ema_top1", "ema_roc_auc", "loss", "ema_loss"):
        assert found[name] == pytest.approx(run[1].metrics[name], rel=1e-4), name


@pytest.mark.slow
def test_features_train_the_head_that_images_train(run, config, tmp_path):
    on_images = override(config, {"data.cache_features": False})
    train(on_images, str(tmp_path / "images"))
    ours, theirs = (
        leaves(open_run(str(workdir)).variables["ema_"]["params"]["head"]) for workdir in (run[0], tmp_path / "images")
    )
    for name, leaf in theirs.items():
        np.testing.assert_allclose(ours[name], leaf, rtol=1e-3, atol=1e-4, err_msg=name)


def test_features_are_read_again_unless_they_are_damaged(run, config, data_dir, tmp_path, capfd):
    paths = sorted((data_dir / "features").glob("*.npz"))
    damaged = bytearray(paths[0].read_bytes())
    damaged[len(damaged) // 3] ^= 1
    paths[0].write_bytes(damaged)
    again = train(config, str(tmp_path / "again"))
    printed = capfd.readouterr().err
    assert printed.count(": read from ") == 2
    assert len(re.findall("computing the features of .*, once", printed)) == 1
    assert again.state_sha256 == run[1].state_sha256


def test_a_run_resumes_with_the_same_bits_and_without_the_file(run, config, weights, tmp_path):
    workdir = tmp_path / "resumed"
    shutil.copytree(run[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    moved = weights.rename(weights.with_suffix(".moved"))
    try:
        assert train(config, str(workdir)).state_sha256 == run[1].state_sha256
    finally:
        moved.rename(weights)


def test_all_layers_go_on_from_the_work_directory(run, config):
    fields = {"data.name": "scans", "data.data_dir": config.data.data_dir, "data.image_size": SIZE, "batch_size": 8}
    unfrozen = override(resolve(get_config()), fields | {"init.weights": str(run[0])})
    whole, network = complete_config(unfrozen, Path("none"))
    assert {name: getattr(whole.model, name) for name in SMALL} == SMALL
    lines: list[str] = []
    state = first_state(make_experiment(whole), lines.append, network)
    assert "new:" not in lines[0]
    average = leaves(open_run(str(run[0])).variables["ema_"]["params"])
    for name, leaf in leaves(state.params).items():
        np.testing.assert_array_equal(leaf, average[name])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer.frozen": "^block"}, None),
        ({"optimizer.frozen": "^block1_"}, "frozen does not match block"),
        ({"data.augmentation": "inception"}, "augmentation is 'inception'"),
    ],
)
def test_features_that_would_change_are_refused(config, fields, words):
    config = override(config, {**fields, **{f"model.{name}": value for name, value in SMALL.items()}})
    params = jax.eval_shape(create_model(config.model).init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    if words is None:
        features.check_features(config, params)
        return
    with pytest.raises(ConfigError, match=words) as error:
        features.check_features(config, params)
    assert error.value.where == "config.data.cache_features"


def test_the_digest_covers_images_weights_and_view(config, data_dir):
    source = open_dataset(config.data, "train")
    config = override(config, {f"model.{name}": value for name, value in SMALL.items()})
    first = features._digest(config, source, "weights")
    assert first == features._digest(override(config, {"model.dropout_rate": 0.9}), source, "weights")
    others = [
        features._digest(config, source, "others"),
        features._digest(config, open_dataset(config.data, "test"), "weights"),
        features._digest(override(config, {"data.eval_crop": 0.5}), source, "weights"),
        features._digest(override(config, {"data.turn": "free"}), source, "weights"),
        features._digest(override(config, {"data.turn": "free", "data.turn_angle": 0.5}), source, "weights"),
        features._digest(override(config, {"data.turn": "free", "data.turn_seed": 3}), source, "weights"),
        features._digest(override(config, {"model.dtype": "bfloat16"}), source, "weights"),
    ]
    record = next(source.directory.glob("*.array_record*"))
    content = record.read_bytes()
    record.write_bytes(content)
    others.append(features._digest(config, source, "weights"))
    assert len({first, *others}) == 9
