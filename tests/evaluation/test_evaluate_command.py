"""`evaluate` of a weight file and of a run, beside plain NumPy, scikit-learn and SciPy."""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, log_loss, top_k_accuracy_score

from tests.data.conftest import write_images
from tests.data.small_imagenet import jpeg, photograph
from xception_jax.cli import evaluate as command
from xception_jax.config import DataConfig, resolve_model
from xception_jax.data.datasets import open_dataset
from xception_jax.data.images import Preprocessing, decode
from xception_jax.errors import BadDataError, ConfigError, InputMissingError, StorageError, UsageError
from xception_jax.evaluation import tables
from xception_jax.evaluation.real import real_accuracy
from xception_jax.metrics.judgement import judge
from xception_jax.metrics.predictions import Predictions, load_predictions
from xception_jax.models import create_model
from xception_jax.runs import open_network, open_run
from xception_jax.training import restore
from xception_jax.weights import save_network


def run(*arguments, out: io.StringIO | None = None) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = out or io.StringIO()
    with contextlib.redirect_stdout(out):
        assert command.run(parser.parse_args([*map(str, arguments)])) == 0
    return out.getvalue()


def examples(data_dir, name="imagenet2012", split="validation"):
    source = open_dataset(DataConfig(name=name, data_dir=str(data_dir)), split)
    return source, [source[index] for index in range(len(source))]


def validation_number(name):
    return int(name.split("_")[2][:8])


@pytest.fixture(scope="module")
def real_json(imagenet_dir, tmp_path_factory):
    """Labels for each image by the number in its name: every third has none, others two or one, not the usual ones."""
    source, _ = examples(imagenet_dir)
    labels = [[999]] * 50_000
    for number in map(validation_number, source.column("file_name")):
        labels[number - 1] = [[], [0, 1, 2], [3]][number % 3]
    path = tmp_path_factory.mktemp("real") / "real.json"
    path.write_text(json.dumps(labels))
    return path, labels


@pytest.fixture(scope="module")
def evaluated(weights, imagenet_dir, real_json, tmp_path_factory):
    """Returns the metrics, and the directory of the files, of a weight file at a batch size that does not divide 30."""
    directory = tmp_path_factory.mktemp("evaluated")
    files = ["--predictions", directory / "p.npz", "--per_class", directory / "classes.csv"]
    which = ["--dataset", "imagenet2012", "--split", "validation", "--data_dir", imagenet_dir, "--real", real_json[0]]
    return json.loads(run(weights, *which, *files, "--batch_size", 8, "--json")), directory


@pytest.fixture(scope="module")
def by_hand(network, imagenet_dir):
    """Labels and logits of the same images, without the pipeline."""
    _, found = examples(imagenet_dir)
    view = Preprocessing(71, 0.9, "antialiased_bicubic", network.preprocessing.mean, network.preprocessing.std)
    pixels = np.zeros((len(found), 71, 71, 3), np.float32)
    for out, example in zip(pixels, found, strict=True):
        view(decode(example["image"]), out)
    forward = jax.jit(lambda variables, x: create_model(network.model).apply(variables, x, train=False)[0])
    return np.array([example["label"] for example in found]), np.asarray(forward(network.variables, pixels))


def test_accuracy_loss_and_intervals_are_scikit_learns_and_scipys(evaluated, by_hand):
    metrics, _ = evaluated
    label, logits = by_hand
    assert metrics["count"] == 30
    for k in (1, 5):
        assert metrics[f"top{k}"] == top_k_accuracy_score(label, logits, k=k, labels=range(1000))
    assert 0.1 < metrics["top1"] < 0.9  # something to measure
    reference = binomtest(round(30 * metrics["top1"]), 30).proportion_ci(method="wilson")
    assert metrics["top1_interval"] == pytest.approx([reference.low, reference.high], abs=1e-6)
    probabilities = np.exp(log_softmax(logits.astype(np.float64), axis=1))
    assert metrics["loss"] == pytest.approx(log_loss(label, probabilities, labels=range(1000)), rel=1e-4)
    temperature = metrics["temperature"]

    def loss(t):
        return -log_softmax(logits.astype(np.float64) / t, axis=1)[np.arange(30), label].mean()

    assert loss(temperature) <= min(loss(temperature * 1.02), loss(temperature / 1.02))
    assert 0 <= metrics["calibration_error"] <= 1
    assert 0 <= metrics["calibration_error_after"] <= 1


def test_an_image_without_finite_probabilities_is_wrong_by_real_labels():
    classes, probabilities = np.tile(np.arange(5), (2, 1)), np.array([[0.5, 0.2, 0.1, 0.1, 0.1], [np.nan] * 5])
    predictions = Predictions(np.arange(2), np.zeros(2, int), classes, probabilities)
    found = real_accuracy(predictions, [1, 2], [frozenset({0}), frozenset({0})])
    assert (found["real_count"], found["real_top1"], found["real_top5"]) == (2, 0.5, 0.5)


def test_real_labels_go_by_the_number_in_the_file_name(evaluated, by_hand, imagenet_dir, real_json):
    metrics, _ = evaluated
    source, _ = examples(imagenet_dir)
    accepted = [real_json[1][validation_number(name) - 1] for name in source.column("file_name")]
    best = np.argsort(-by_hand[1], axis=1)[:, :5]
    right = np.array([np.isin(five, list(labels)) for five, labels in zip(best, accepted, strict=True) if labels])
    assert metrics["real_count"] == len(right) == sum(bool(labels) for labels in accepted) < 30
    assert metrics["real_top1"] == pytest.approx(right[:, 0].mean())
    assert metrics["real_top5"] == pytest.approx(right.any(axis=1).mean())
    assert 0 < metrics["real_top1"] < metrics["real_top5"]


def test_the_table_of_classes_and_the_predictions_add_up(evaluated, by_hand):
    metrics, directory = evaluated
    label, logits = by_hand
    saved = load_predictions(directory / "p.npz")
    np.testing.assert_array_equal(saved.label, label)
    np.testing.assert_array_equal(saved.classes[:, 0], logits.argmax(axis=1))
    rows = metrics["per_class"]
    assert [row["images"] for row in rows] == np.bincount(label, minlength=1000).tolist()
    assert sum(row["right"] for row in rows) == round(30 * metrics["top1"])
    assert rows[5]["accuracy"] is None
    worst = max(rows, key=lambda row: row["confused"])
    wrong = np.bincount(logits.argmax(axis=1)[(label == worst["class"]) & (logits.argmax(axis=1) != label)])
    assert worst["confused"] == wrong.max()
    with open(directory / "classes.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 1000
    assert table[worst["class"]]["confused_with"] == worst["confused_with"]
    assert float(table[0]["accuracy"]) == rows[0]["accuracy"]


def test_a_run_with_many_labels_and_its_average(multilabel_run):
    metrics = json.loads(run(multilabel_run, "--json", "--batch_size", 16))
    assert (metrics["step"], metrics["split"], metrics["count"]) == (7, "test", 41)
    assert 0 < metrics["map_at_k"] <= 1
    _, found = examples(multilabel_run / "tfds", "few_scenes", "test")
    label = np.zeros((41, 10), int)
    for row, example in zip(label, found, strict=True):
        row[list(example["label"])] = 1
    # The average knows nothing, and ties are broken against it: its labels come last.
    worst = [average_precision_score(row, 1 - np.linspace(0, 0.1, 10)) for row in np.sort(label, axis=1)]
    assert metrics["ema_map_at_k"] == pytest.approx(np.mean(worst), rel=1e-5)
    assert metrics["ema_loss"] == pytest.approx(10 * np.log(2), rel=1e-5)
    assert [row["images"] for row in metrics["per_class"]] == label.sum(axis=0).tolist()
    assert "temperature" not in metrics
    text = run(multilabel_run, "--step", 7, "--split", "test[:5]", "--batch_size", 16)
    assert "5 images" in text
    assert "Polyak average" in text
    assert "MAP@100" in text


def test_open_network_takes_the_average_and_what_the_data_tell(multilabel_run, weights, network, tmp_path):
    opened = open_network(str(multilabel_run))
    assert not opened.variables["params"]["head"]["predictions"]["kernel"].any()
    assert (opened.preprocessing.size, opened.preprocessing.crop) == (64, 1.0)
    assert opened.classes[0] == "T-shirt/top"
    assert len(opened.sha256) == 64
    # The images need not be there, and neither any other part of the run.
    copied = tmp_path / "run"
    shutil.copytree(multilabel_run / "checkpoints", copied / "checkpoints")
    shutil.copy(multilabel_run / "config.json", copied)
    config = json.loads((copied / "config.json").read_text())
    config["data"] |= {"name": "photographs_of_mine", "data_dir": str(tmp_path)}
    (copied / "config.json").write_text(json.dumps(config))
    assert open_network(str(copied), 7).classes == opened.classes
    with pytest.raises(InputMissingError, match="no checkpoint 8"):
        open_network(str(copied), 8)
    with pytest.raises(InputMissingError, match="no run"):
        open_network(str(tmp_path))
    with pytest.raises(UsageError):
        open_network(str(weights), 7)
    assert open_network(str(weights)).classes == network.classes


def test_names_of_classes_are_those_of_the_training_whatever_the_dataset_is_now(multilabel_run, monkeypatch):
    monkeypatch.setattr(restore, "find_class_names", lambda data: tuple("abcdefghij"))
    assert open_network(str(multilabel_run)).classes[0] == "T-shirt/top"
    # Earlier versions recorded no names: then those of the dataset, if they can be right.
    config = open_run(str(multilabel_run)).config
    assert restore._class_names(config, None) == tuple("abcdefghij")
    monkeypatch.setattr(restore, "find_class_names", lambda data: tuple("abcde"))
    assert restore._class_names(config, None) is None


@pytest.mark.parametrize(
    "option", ["--predictions=p.npz", "--per_class=c.csv", "--dataset=d", "--thresholds=s", "--max_scans=9"]
)
def test_a_comparison_refuses_what_it_does_not_read(option):
    with pytest.raises(UsageError, match=f"does not read {option.partition('=')[0]}"):
        run("--compare", "a.npz", "b.npz", option)


def test_a_table_that_cannot_be_written_does_not_cost_the_results(weights, imagenet_dir, tmp_path, monkeypatch):
    def fails(*arguments):
        raise StorageError("the disk is full", "here", "free some space")

    monkeypatch.setattr(tables, "write_csv", fails)
    on_imagenet = ["--dataset", "imagenet2012", "--split", "validation", "--data_dir", imagenet_dir]
    out = io.StringIO()
    with pytest.raises(StorageError):
        run(weights, *on_imagenet, "--per_class", tmp_path / "c.csv", out=out)
    assert "top-1" in out.getvalue()


def test_what_does_not_fit_is_refused_before_anything_is_computed(
    weights, network, multilabel_run, imagenet_dir, real_json, tmp_path
):
    on_imagenet = ["--dataset", "imagenet2012", "--split", "validation", "--data_dir", imagenet_dir]
    with pytest.raises(UsageError, match="the dataset or the split is missing"):
        run(weights)
    with pytest.raises(ConfigError, match="10 classes"):
        run(multilabel_run, *on_imagenet)
    with pytest.raises(InputMissingError, match="no directory"):
        run(weights, *on_imagenet, "--predictions", tmp_path / "nowhere" / "p.npz")
    no_labels = tmp_path / "none.json"
    no_labels.write_text("[]")
    with pytest.raises(UsageError, match="ReaL"):
        run(multilabel_run, "--real", no_labels)
    with pytest.raises(BadDataError, match="labels of 0 images"):
        run(weights, *on_imagenet, "--real", no_labels, "--batch_size", 8)
    (tmp_path / "real.json").write_text("[[0], [1000]]")
    with pytest.raises(BadDataError, match=r"\[1000\]"):
        run(weights, *on_imagenet, "--real", tmp_path / "real.json")
    (tmp_path / "real.json").write_text('{"a": 1')
    with pytest.raises(BadDataError, match="list of lists"):
        run(weights, *on_imagenet, "--real", tmp_path / "real.json")
    turned = dataclasses.replace(network, classes=network.classes[::-1])
    save_network(tmp_path / "turned.safetensors", turned)
    with pytest.raises(ConfigError, match="another order"):
        run(tmp_path / "turned.safetensors", *on_imagenet)


def test_limits_of_images_are_options_and_those_of_a_run_its_config(weights, multilabel_run, tmp_path):
    sizes = [64, 32, 32, 32]
    write_images(tmp_path, "sizes", [jpeg(photograph(n, size)) for n, size in enumerate(sizes)], classes=1000)
    on_sizes = ["--dataset", "sizes", "--split", "train", "--data_dir", tmp_path]
    with pytest.raises(BadDataError, match="1 of 4 images are damaged") as error:
        run(weights, *on_sizes, "--max_pixels", 32 * 32)
    assert "--max_pixels" in error.value.fix
    assert "max_bad_fraction" not in error.value.fix
    run(weights, *on_sizes)
    shutil.copytree(multilabel_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["max_pixels"] = 50
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadDataError, match="images in a row cannot be decoded") as error:
        run(tmp_path / "run", "--split", "test")
    assert "raise max_pixels" in error.value.fix
    assert "damaged" not in json.loads(run(tmp_path / "run", "--split", "test", "--max_pixels", 10_000, "--json"))


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_confident_network_has_one_area_under_roc(network, multilabel_run, tmp_path, multi_label):
    num_classes = 10 if multi_label else 2
    model = resolve_model({"width_multiplier": 0.05, "middle_blocks": 0, "num_classes": num_classes})
    head = {"kernel": network.variables["params"]["head"]["predictions"]["kernel"][:, -num_classes:] * 3000}
    head["bias"] = np.full(num_classes, 100, np.float32) * np.arange(num_classes)
    params = network.variables["params"] | {"head": {"predictions": head}}
    variables = network.variables | {"params": params}
    confident = dataclasses.replace(network, model=model, variables=variables, classes=None, multi_label=multi_label)
    save_network(tmp_path / "confident.safetensors", confident)
    write_images(tmp_path, "two", [jpeg(photograph(n)) for n in range(40)], classes=2)
    on_split = ["--dataset", "two", "--split", "train", "--data_dir", tmp_path]
    if multi_label:
        on_split = ["--dataset", "few_scenes", "--split", "test", "--data_dir", multilabel_run / "tfds"]
    found = json.loads(
        run(tmp_path / "confident.safetensors", *on_split, "--predictions", tmp_path / "p.npz", "--json")
    )
    saved = load_predictions(tmp_path / "p.npz")
    assert np.mean(saved.all_probabilities == 1) > 0.2
    assert judge(saved, num_classes, draws=0).overall["roc_auc"].value != pytest.approx(found["roc_auc"], abs=1e-3)
    assert found["judgement"]["roc_auc"] == pytest.approx(found["roc_auc"], abs=1e-6)
