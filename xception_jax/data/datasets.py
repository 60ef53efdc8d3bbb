"""The datasets that can be prepared by name, and opening any dataset.

To add a dataset, write a function that returns a `Dataset`, add a line to `DATASETS`, and its name to
`prepare/names.py`, which the command reads without importing TFDS.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from xception_jax.config import DataConfig
from xception_jax.data.metadata import open_builder
from xception_jax.data.prepare.fashion_mnist import (
    fashion_mnist,
    fashion_mnist_scenes,
    fashion_mnist_stacks,
    fashion_mnist_subset,
)
from xception_jax.data.prepare.imagenet import imagenet2012
from xception_jax.data.prepare.imagenet_v2 import VARIANTS, imagenet_v2
from xception_jax.data.prepare.photographs import photograph_crops
from xception_jax.data.prepare.writer import Dataset, write_dataset
from xception_jax.data.random_labels import RandomLabels
from xception_jax.data.sources import (
    Source,
    TfdsSource,
    find_dataset,
    find_versions,
    label_feature,
    resolve_data_dir,
)
from xception_jax.data.synthetic import SYNTHETIC, SyntheticSource
from xception_jax.errors import InputMissingError
from xception_jax.names import in_shell, printable_path

DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "fashion_mnist": fashion_mnist,
    "imagenet2012": imagenet2012,
    "imagenet_v2": imagenet_v2,
    **{f"imagenet_v2/{variant}": functools.partial(imagenet_v2, variant=variant) for variant in VARIANTS},
}
"""Builds each dataset from the directory of its original files."""

SHIPPED: dict[str, Callable[[], Dataset]] = {
    "fashion_mnist_subset": fashion_mnist_subset,
    "fashion_mnist_scenes": fashion_mnist_scenes,
    "fashion_mnist_stacks": fashion_mnist_stacks,
    "photograph_crops": photograph_crops,
}
"""Builds each dataset from images in this package, or in others. `open_dataset` writes them on first use."""


def open_dataset(data: DataConfig, split: str) -> Source:
    """Opens one split of the dataset `data.name`, and writes the dataset first if this package ships its images.

    The name may have a builder config and a version, 'name/config:1.0.0'. Without a version, the newest is opened.

    Args:
      data: `config.data`; reads name, data_dir, synthetic_examples and random_labels.
      split: such as 'train', 'train[:98%]' or 'validation'.

    Raises:
      InputMissingError: the dataset or the split is missing, or the split is empty.
      BadDataError: the dataset has no image with a label (or labels).
      ConfigError: the split cannot be parsed, or images have several labels that cannot be random.
    """
    source = _open_dataset(data, split)
    return source if data.random_labels < 0 else RandomLabels(source, data.random_labels)


def overlap(source: Source, split: str) -> bool:
    """Returns whether another split of the same dataset has images of this one, as 'train[98%:]' has of 'train'."""
    if split == source.info.split:
        return True
    return isinstance(source, TfdsSource | RandomLabels) and source.overlaps(split)


def _open_dataset(data: DataConfig, split: str) -> Source:
    if data.name == SYNTHETIC:
        return SyntheticSource(data.synthetic_examples, split)
    data_dir = resolve_data_dir(data.data_dir)
    directory = find_dataset(data.name, data_dir)
    if directory is None and data.name in SHIPPED:
        print(f"writing {data.name} to {printable_path(data_dir)} (first use only)", file=sys.stderr)
        directory = write_dataset(SHIPPED[data.name](), data_dir, progress=False).path
    name, _, version = data.name.partition(":")
    if directory is None and version and (found := find_versions(name, data_dir)):
        versions = ", ".join(path.name for path in found)
        fix = f"choose one of {versions}; {name} without a version is the newest"
        raise InputMissingError(f"the dataset {name} has no version {version}", str(data_dir / name), fix)
    if directory is None:
        of_tfds = name not in (*SHIPPED, *DATASETS)
        other = "convert a dataset of TFDS by prepare tfrecord, or " if of_tfds else ""
        fix = f"{other}run {_prepare_command(name, data_dir)}"
        raise InputMissingError(f"the dataset {data.name} is not in {data_dir}", str(data_dir), fix)
    return TfdsSource(directory, split)


def _prepare_command(name: str, data_dir: Path) -> str:
    if name in SHIPPED:
        arguments = name
    elif name in DATASETS:
        arguments = f"{name} --source DIR"
    else:
        arguments = f"image_folder --name {in_shell(name)} --source DIR"
    return f"xception-jax prepare {arguments} --data_dir {in_shell(data_dir)}"


def find_class_names(data: DataConfig) -> tuple[str, ...] | None:
    """Returns the class names of the dataset `data.name`, or None if it is not on this machine.

    Only the description of the dataset is read; its images may be missing.

    Raises:
      BadDataError: the dataset has no image with a label (or labels).
    """
    if data.name == SYNTHETIC:
        return SyntheticSource(1, "train").info.class_names
    directory = find_dataset(data.name, resolve_data_dir(data.data_dir))
    if directory is not None:
        features = open_builder(directory).info.features
    elif data.name in SHIPPED:
        directory, features = Path(data.name), SHIPPED[data.name]().features
    else:
        return None
    return tuple(label_feature(features, directory)[1].names)
