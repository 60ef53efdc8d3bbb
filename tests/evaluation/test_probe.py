"""`embed` and `probe`: the features of the network, and what simple classifiers make of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from tests.conftest import run_command as run
from tests.data.conftest import write_images
from tests.data.small_imagenet import jpeg, photograph
from xception_jax.cli import embed, probe
from xception_jax.data import images
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.evaluation.features import Features, load_features, save_features
from xception_jax.evaluation.probe import NEIGHBOURS, count_shared, fit_neighbours, fit_ridge, hold_out
from xception_jax.models import create_model
from xception_jax.weights import save_network


@pytest.fixture
def photos(tmp_path) -> Path:
    for name in ("cat/1.png", "dog/2.png", "dog/3.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(int(name[4]))).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def expected_features(network, path: Path) -> np.ndarray:
    view = network.preprocessing
    pixels = np.zeros((1, view.size, view.size, 3), np.float32)
    view(images.decode(path.read_bytes()), pixels[0])
    return np.asarray(jax.jit(create_model(network.model).apply)(network.variables, pixels)[1]["pre_logits"][0])


def test_features_are_what_the_classifier_sees(network, weights, photos, tmp_path, monkeypatch, capsys):
    run(embed, "--weights", weights, photos, "--labels", "folder", "--out", tmp_path / "x.npz", "--batch_size", 2)
    assert "x.npz: 102 features of 3 images" in capsys.readouterr().err
    found = load_features(tmp_path / "x.npz")
    assert [Path(path).name for path in found.path] == ["1.png", "2.png", "3.png"]
    assert [found.class_names[label] for label in found.label] == ["cat", "dog", "dog"]
    for path, features in zip(found.path, found.features, strict=True):
        np.testing.assert_allclose(features, expected_features(network, Path(path)), rtol=1e-3, atol=1e-5)
    run(embed, "--weights", weights, photos, "--labels", "folder", "--out", tmp_path / "x.csv", "--batch_size", 2)
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == ["cat", "dog", "dog"]
    (photos / "dog" / "sub").mkdir()
    monkeypatch.chdir(photos / "dog" / "sub")
    run(embed, "--weights", weights, "../2.png", "--labels", "folder", "--out", tmp_path / "x.csv")
    assert [row["label"] for row in csv.DictReader((tmp_path / "x.csv").read_text().splitlines())] == ["dog"]
    values = np.array([[row[f"f{i}"] for i in range(102)] for row in rows], np.float32)
    np.testing.assert_array_equal(values, found.features)


def test_weights_without_a_classifier_have_the_same_features(network, weights, photos, tmp_path):
    variables = {**network.variables, "params": {k: v for k, v in network.variables["params"].items() if k != "head"}}
    save_network(tmp_path / "bare.safetensors", type(network)(**{**vars(network), "variables": variables}))
    for name, source in (("a", weights), ("b", tmp_path / "bare.safetensors")):
        run(embed, "--weights", source, photos / "dog", "--out", tmp_path / f"{name}.npz")
    a, b = (load_features(tmp_path / f"{name}.npz") for name in "ab")
    np.testing.assert_allclose(a.features, b.features, rtol=1e-5)
    assert a.label is None


def test_the_labels_of_a_dataset_come_along(weights, imagenet_dir, tmp_path, capsys):
    options = ["--dataset", "imagenet2012", "--data_dir", imagenet_dir, "--batch_size", 16]
    for split in ("validation[:20]", "validation[20:]"):
        run(embed, "--weights", weights, *options, "--split", split, "--out", tmp_path / f"{split[-2]}.npz")
    train = load_features(tmp_path / "0.npz")
    assert (len(train.features), len(train.class_names)) == (20, 1000)
    assert train.path[3] == "imagenet2012 validation[:20] 3"
    assert set(train.label) == {0, 1, 2}
    capsys.readouterr()
    run(probe, tmp_path / "0.npz", tmp_path / ":.npz", "--json")
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["classifier"] for result in results] == ["nearest neighbours", "ridge regression"]
    assert all(result["interval"][0] <= result["accuracy"] <= result["interval"][1] for result in results)


def test_several_labels_come_along_but_are_not_probed(multilabel_run, tmp_path):
    options = ["--dataset", "few_scenes", "--data_dir", multilabel_run / "tfds", "--split", "test"]
    for suffix in ("npz", "csv"):
        run(embed, "--weights", multilabel_run, *options, "--out", tmp_path / f"x.{suffix}")
    found = load_features(tmp_path / "x.npz")
    assert found.label.shape == (41, 10)
    first = next(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert first["label"].split(";") == [found.class_names[label] for label in np.flatnonzero(found.label[0])]
    with pytest.raises(BadDataError, match="several labels"):
        run(probe, tmp_path / "x.npz", tmp_path / "x.npz")


def test_a_damaged_image_is_named_and_left_out(weights, photos, tmp_path, capsys):
    (photos / "cat" / "0.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(BadDataError, match="1 of 4 images cannot be read"):
        run(embed, "--weights", weights, photos, "--out", tmp_path / "x.npz")
    assert capsys.readouterr().err.startswith(f"{photos}/cat/0.jpg: it cannot be decoded")
    assert len(load_features(tmp_path / "x.npz").features) == 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ([], UsageError, "pass images or folders"),
        (["photos", "--dataset", "d"], UsageError, "pass images or folders"),
        (["--dataset", "d"], UsageError, "pass both"),
        (["--dataset", "d", "--split", "test", "--labels", "folder"], UsageError, "remove --labels"),
        (["photos", "--out", "x.parquet"], UsageError, "ends in .npz or .csv"),
        (["photos", "--out", "no/such/x.npz"], InputMissingError, "create the directory"),
    ],
)
def test_wrong_arguments_of_embed(options, error, words):
    with pytest.raises(error) as raised:
        run(embed, "--weights", "x", "--out", "x.npz", *options)
    assert words in raised.value.fix


def clusters(seed: int, count: int = 60, channels: int = 12, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(7).normal(size=(4, channels))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    return (centres[labels] + noise * rng.normal(size=(count, channels))).astype(np.float32), labels


@pytest.mark.parametrize("k", NEIGHBOURS)
def test_nearest_neighbours_are_those_of_scikit_learn(k):
    (features, labels), (others, _) = clusters(0), clusters(1, 200)
    (scores,) = fit_neighbours(features, labels, 4, [k])(others)
    oracle = KNeighborsClassifier(k, metric="cosine").fit(features, labels)
    np.testing.assert_allclose(scores, oracle.predict_proba(others), atol=1e-9)
    np.testing.assert_array_equal(scores.argmax(axis=1), oracle.predict(others))


@pytest.mark.parametrize("channels", [12, 100])  # fewer and more than features
@pytest.mark.parametrize("option", [1e-3, 1.0])
def test_ridge_regression_is_that_of_scikit_learn(channels, option):
    (features, labels), (others, _) = clusters(0, channels=channels), clusters(1, 200, channels=channels)
    (scores,) = fit_ridge(features, labels, 4, [option])(others)
    penalty = option * np.square(features - features.mean(0, dtype=np.float64)).sum() / channels
    oracle = Ridge(alpha=penalty).fit(features.astype(np.float64), np.eye(4)[labels])
    np.testing.assert_allclose(scores, oracle.predict(others), atol=1e-6)


def test_options_are_not_chosen_on_test_data():
    from xception_jax.evaluation.probe import probe as probed

    train, test = clusters(0, 400, noise=2.5), clusters(1, 400, noise=2.5)
    results = list(probed(train, test, 4))
    shuffled = list(probed(train, (test[0], np.random.default_rng(0).permutation(test[1])), 4))
    assert [each.option for each in results] == [each.option for each in shuffled]
    assert [each.held_out for each in results] == [each.held_out for each in shuffled]
    assert all(0.5 < each.accuracy < 1 for each in results)
    assert all(each.accuracy < 0.4 for each in shuffled)


def test_a_fifth_of_each_class_is_held_out():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    chosen = hold_out(labels)
    assert [int(chosen[labels == label].sum()) for label in range(4)] == [10, 2, 1, 0]
    np.testing.assert_array_equal(chosen, hold_out(labels))
    assert (chosen != hold_out(labels, seed=1)).any()


def saved(file: Path, **changes) -> Path:
    features, label = clusters(0)
    fields = {"path": np.array([f"{i}.png" for i in range(60)]), "label": label, "class_names": tuple("abcd")}
    save_features(str(file), Features(**({"features": features, **fields} | changes)))
    return file


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": None}, "no labels"),
        ({"label": np.full(60, 4)}, "do not fit 60 images and 4 classes"),
        ({"class_names": tuple("abdc")}, "the classes differ"),
        ({"weights": "another"}, "two networks"),
        ({"features": np.full((60, 12), np.nan, np.float32)}, "not finite"),
        ({"path": np.array(["one"])}, "for 1 files"),
    ],
)
def test_features_that_do_not_fit_are_refused(changes, words, tmp_path):
    with pytest.raises(BadDataError, match=words):
        run(probe, saved(tmp_path / "a.npz"), saved(tmp_path / "b.npz", **changes))


def test_files_that_are_no_features_are_refused(tmp_path, capsys):
    (tmp_path / "cut.npz").write_bytes(saved(tmp_path / "a.npz").read_bytes()[:-100])
    with pytest.raises(BadDataError, match="cannot be read"):
        run(probe, tmp_path / "cut.npz", tmp_path / "a.npz")
    with pytest.raises(InputMissingError, match="no file of features"):
        run(probe, tmp_path / "none.npz", tmp_path / "a.npz")
    run(probe, tmp_path / "a.npz", tmp_path / "a.npz")
    assert "60 test images have exactly the features of a training image" in capsys.readouterr().err
    assert count_shared(clusters(0)[0], clusters(1)[0]) == 0


def test_limits_of_images_hold_for_a_dataset(weights, tmp_path):
    write_images(tmp_path, "sizes", [jpeg(photograph(n, 32 if n % 2 else 64)) for n in range(4)])
    options = ["--dataset", "sizes", "--data_dir", tmp_path, "--split", "train"]
    with pytest.raises(BadDataError, match="2 of 4 images cannot be read"):
        run(embed, "--weights", weights, *options, "--out", tmp_path / "x.npz", "--max_pixels", 32 * 32)
    run(embed, "--weights", weights, *options, "--out", tmp_path / "x.npz")
    assert len(load_features(tmp_path / "x.npz").features) == 4
