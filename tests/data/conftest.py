from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.small_imagenet import jpeg, photograph
from xception_jax.config import DataConfig
from xception_jax.data.prepare.writer import Dataset, write_dataset


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory) -> Path:
    """Datasets that no test changes."""
    return tmp_path_factory.mktemp("tensorflow_datasets")


@pytest.fixture
def data(tfds_dir) -> DataConfig:
    """`config.data` for the shipped images."""
    return DataConfig(
        name="fashion_mnist_subset",
        data_dir=str(tfds_dir),
        image_size=32,
        augmentation="shift",
        eval_crop=1.0,
        threads=2,
    )


def write_images(data_dir: Path, name: str, images: list[bytes], labels: list[int] | None = None, classes: int = 5):
    """Writes a dataset whose split 'train' holds these images in this order (TFDS sorts by a hash of the keys)."""
    import hashlib

    keys = sorted(map(str, range(len(images))), key=lambda key: hashlib.md5(key.encode()).digest())
    labels = labels or [number % classes for number in range(len(images))]
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=classes),
        }
    )
    examples = [(key, {"image": image, "label": label}) for key, image, label in zip(keys, images, labels, strict=True)]
    return write_dataset(Dataset(name, features, {"train": examples}, "Test images."), data_dir, progress=False).path


@pytest.fixture(scope="session")
def photographs_dir(tfds_dir) -> Path:
    """23 photographs, as the dataset 'photographs'."""
    write_images(tfds_dir, "photographs", [jpeg(photograph(number)) for number in range(23)])
    return tfds_dir


@pytest.fixture
def photographs_data(data, photographs_dir) -> DataConfig:
    return data.replace(
        name="photographs", data_dir=str(photographs_dir), image_size=48, augmentation="inception", eval_crop=0.875
    )


def assert_batches_equal(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
