"""Labels that are random, but the same for an image wherever and whenever it is read."""

from __future__ import annotations

import contextlib
import pickle

import numpy as np
import pytest

from xception_jax.config import DataConfig
from xception_jax.data.datasets import open_dataset
from xception_jax.data.pipeline import EvaluationBatches, train_batches
from xception_jax.errors import ConfigError

DATA = DataConfig(name="fashion_mnist_subset", image_size=32, augmentation="none", threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DATA.replace(data_dir=str(tmp_path_factory.mktemp("datasets")))


def labels_of(source):
    return [example["label"] for example in source.__getitems__(range(len(source)))]


def test_the_directory_is_that_of_the_images(data):
    """Cached features are dropped if its files change."""
    original, random = (open_dataset(each, "train[:20]") for each in (data, data.replace(random_labels=0)))
    assert random.directory == original.directory


def test_labels_belong_to_images_in_any_split_and_epoch(data):
    true = open_dataset(data, "train[:200]")
    random = open_dataset(data.replace(random_labels=3), "train[:200]")
    labels = labels_of(random)
    assert labels == labels_of(random) == random.column("label") == [random[i]["label"] for i in range(200)]
    assert labels == labels_of(pickle.loads(pickle.dumps(random)))
    assert labels[50:150] == labels_of(open_dataset(data.replace(random_labels=3), "train[50:150]"))
    agreement = np.mean(np.array(labels) == labels_of(true))
    assert agreement < 0.25  # chance: 0.1
    assert labels != labels_of(open_dataset(data.replace(random_labels=4), "train[:200]"))
    assert random[7]["image"] == true[7]["image"]
    assert random.column("no_such_feature") is None

    seen = {}
    with contextlib.closing(train_batches(data, random, batch_size=100, seed=0, start_step=0)) as batches:
        for _ in range(6):  # three epochs
            batch = next(batches)
            for index, label in zip(batch["index"].tolist(), batch["label"].tolist(), strict=True):
                assert seen.setdefault(index, label) == label == labels[index]
    (evaluated,) = EvaluationBatches(data, random, batch_size=200)
    assert evaluated["label"].tolist() == labels


def test_overlaps_are_those_of_the_source(data):
    random = open_dataset(data.replace(random_labels=0), "test[:50%]")
    assert random.overlaps("test")
    assert not random.overlaps("test[50%:]")


def test_all_classes_are_equally_likely(data):
    labels = labels_of(open_dataset(data.replace(random_labels=0), "train[:4000]"))
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.9)


def test_runs_cannot_be_confused(data):
    true = open_dataset(data, "train")
    found = {seed: open_dataset(data.replace(random_labels=seed), "train").info for seed in (0, 1)}
    prints = {true.info.fingerprint, *(info.fingerprint for info in found.values())}
    assert len(prints) == 3
    assert found[1].name == "fashion_mnist_subset with random labels (seed 1)"
    assert found[1].num_classes == 10
    assert open_dataset(data.replace(random_labels=-1), "train").info == true.info


@pytest.mark.slow  # writes the dataset
def test_several_labels_cannot_be_random(data):
    with pytest.raises(ConfigError, match="any number of labels"):
        open_dataset(data.replace(name="fashion_mnist_scenes", random_labels=0), "train")
