"""Where examples come from: TFDS datasets on disk, and synthetic images for measuring throughput.

A source is a sequence of {'image': bytes of a file, 'label': int or tuple of ints, 'index': its own position}. It can
be pickled, so that Grain's worker processes can have it, and read from many threads at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import simplejpeg
import tensorflow_datasets as tfds

from xception_jax.config import DataConfig
from xception_jax.data.prepare import fashion_mnist
from xception_jax.data.prepare.writer import Dataset, is_complete, write_dataset
from xception_jax.errors import BadDataError, ConfigError, InputMissingError

SYNTHETIC = "synthetic"
LABELS_CHECKED_BEFORE_TRAINING = 4096
OPEN_IMAGES_LABELS = "objects_trainable"  # of TFDS' open_images_v4: the 7,186 classes with enough images to learn from

_SYNTHETIC_CLASSES = 1000
_SYNTHETIC_IMAGES = 64
_SYNTHETIC_SHAPE = (375, 500)  # height and width of a typical ImageNet photograph
_PREPARED_ON_FIRST_USE: dict[str, Callable[[], Dataset]] = {
    "fashion_mnist_subset": fashion_mnist.fashion_mnist_subset,
    "fashion_mnist_scenes": fashion_mnist.fashion_mnist_scenes,
}
_NEEDS_SOURCE = ("fashion_mnist", "imagenet2012", "imagenet_v2")


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What is known of a source without reading its examples.

    Attributes:
      name: of the dataset.
      split: as it was asked for.
      num_classes: labels are 0 to num_classes - 1.
      class_names: one for each class.
      multi_label: whether 'label' is a tuple of ints, the set of classes in the image.
      fingerprint: SHA-256 over dataset_info.json and features.json; of all splits.
      num_examples: in this split.
    """

    name: str
    split: str
    num_classes: int
    class_names: tuple[str, ...]
    multi_label: bool
    fingerprint: str
    num_examples: int


class Source(Protocol):
    """A sequence of examples: {'image': bytes, 'label': int | tuple[int, ...], 'index': int}."""

    info: SourceInfo

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one example."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads some examples, which can be much cheaper than one by one."""
        ...


def open_source(data: DataConfig, split: str) -> Source:
    """Opens one split of `config.data.name`.

    'fashion_mnist_subset' and 'fashion_mnist_scenes' are written from the images that are shipped with this package
    when they are first asked for. A name may carry a builder config and a version: 'name/config:1.0.0'; without a
    version the newest is taken.

    Args:
      data: `config.data`; name, data_dir and synthetic_examples are read.
      split: such as 'train', 'train[:98%]', 'validation'.

    Raises:
      InputMissingError: the dataset or the split is not there, or is empty.
      BadDataError: the dataset has no image with a label (or labels).
      ConfigError: the split cannot be understood.
    """
    if data.name == SYNTHETIC:
        return SyntheticSource(data.synthetic_examples, split)
    data_dir = resolve_data_dir(data.data_dir)
    directory = _find(data.name, data_dir)
    if directory is None and data.name in _PREPARED_ON_FIRST_USE:
        print(f"{data.name} is not in {data_dir} yet: writing it from the images shipped here, once", file=sys.stderr)
        directory = write_dataset(_PREPARED_ON_FIRST_USE[data.name](), data_dir, progress=False).path
    if directory is None:
        raise InputMissingError(
            f"the dataset {data.name} is not in {data_dir}",
            str(data_dir),
            f"run {_prepare_command(data.name, data_dir)}",
        )
    return TfdsSource(directory, split)


def find_class_names(data: DataConfig) -> tuple[str, ...] | None:
    """Returns the names of the classes of `config.data.name`, or None if the dataset is not on this machine.

    Its features.json is read, the images need not be there.

    Raises:
      BadDataError: the dataset has no image with a label.
    """
    if data.name == SYNTHETIC:
        return SyntheticSource(1, "train").info.class_names
    directory = _find(data.name, resolve_data_dir(data.data_dir))
    if directory is not None:
        features = tfds.builder_from_directory(os.fspath(directory)).info.features
        return tuple(_label_feature(features, directory)[1].names)
    return fashion_mnist.CLASS_NAMES if data.name in _PREPARED_ON_FIRST_USE else None


def resolve_data_dir(data_dir: str) -> Path:
    """Returns the directory that holds all datasets: as given, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def _find(name: str, data_dir: Path) -> Path | None:
    """Returns the directory of a complete dataset: name[/config][:version], by default of the newest version."""
    name, _, version = name.partition(":")
    parent = data_dir / name
    if version:
        return parent / version if is_complete(parent / version) else None
    found = [path for path in parent.glob("*") if tfds.core.Version.is_valid(path.name) and is_complete(path)]
    return max(found, key=lambda path: tfds.core.Version(path.name), default=None)


def _prepare_command(name: str, data_dir: Path) -> str:
    name = name.partition(":")[0]
    command = (
        f"{name} --source DIR"
        if name.partition("/")[0] in _NEEDS_SOURCE
        else f"image_folder --name {name} --source DIR"
    )
    if name in _PREPARED_ON_FIRST_USE:
        command = name
    return f"python -m xception_jax prepare {command} --data_dir {data_dir}"


class TfdsSource:
    """One split of a TFDS dataset of ArrayRecord files; images stay as the bytes of their files.

    Args:
      directory: of one version, with dataset_info.json.
      split: such as 'train[:98%]'.
    """

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split
        builder = tfds.builder_from_directory(os.fspath(directory))
        self._check_format(builder)
        self._check_split(builder)
        self._label_name, label = _label_feature(builder.info.features, directory)
        self._names_files = "file_name" in builder.info.features
        self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        self.info = SourceInfo(
            name=builder.info.name,
            split=split,
            num_classes=label.num_classes,
            class_names=tuple(label.names),
            multi_label=self._label_name != "label",
            fingerprint=_fingerprint(directory),
            num_examples=len(self._records),
        )

    def __reduce__(self):
        """Opens the files anew in the process that unpickles: TFDS' own objects are large, and not made for it."""
        return TfdsSource, (self.directory, self.split)

    def __len__(self) -> int:
        """Number of examples."""
        return self.info.num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one example.

        Raises:
          BadDataError: the record is damaged.
        """
        return self._example(index, self._read(index))

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads some examples at once; raises like `__getitem__`."""
        try:
            records = self._records.__getitems__(indices)
        except Exception:
            records = [self._read(index) for index in indices]  # says which of them is damaged
        return [self._example(index, record) for index, record in zip(indices, records, strict=True)]

    def _example(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
        label = record[self._label_name]
        if self._label_name == OPEN_IMAGES_LABELS:
            # A confidence of zero says that a person has looked and has not found the class.
            present = zip(label["label"], label["confidence"], strict=True)
            label = sorted({int(value) for value, confidence in present if confidence > 0})
        label = tuple(int(value) for value in label) if self.info.multi_label else int(label)
        return {"image": record["image"], "label": label, "index": index}

    def _read(self, index: int) -> dict[str, Any]:
        """Returns one record, or raises BadDataError."""
        try:
            return self._records[index]
        except Exception as error:
            # array_record raises bare RuntimeErrors, protobuf DecodeErrors and TFDS whatever comes first.
            raise BadDataError(
                f"record {index} of {self.info.name} cannot be read: {' '.join(str(error).split())}",
                f"{self.directory}, split {self.split}",
                "copy or prepare the dataset again",
            ) from error

    def file_names(self) -> list[str] | None:
        """Returns the names that the images had as files, in the order of the split; None if they were not kept.

        All records are read.
        """
        if not self._names_files:
            return None
        return [self._read(index)["file_name"].decode() for index in range(len(self))]

    def _check_format(self, builder: tfds.core.DatasetBuilder) -> None:
        # as_data_source() names the format in a message of its own, which sends the reader to download_and_prepare().
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise InputMissingError(
                f"the dataset is stored as {builder.info.file_format.value}, which has no random access",
                str(self.directory),
                f"run python -m xception_jax prepare tfrecord --source {self.directory}",
            )

    def _check_split(self, builder: tfds.core.DatasetBuilder) -> None:
        name = builder.info.name
        splits = {split: info.num_examples for split, info in builder.info.splits.items()}
        held = ", ".join(f"{split} ({count:,})" for split, count in splits.items()) or "none"
        fix = f"the splits are {held}; to write the dataset again: {_prepare_command(name, self.directory.parents[1])}"
        if self.split.partition("[")[0] not in splits and "+" not in self.split:
            raise InputMissingError(f"the dataset {name} has no split {self.split!r}", str(self.directory), fix)
        try:
            selected = builder.info.splits[self.split]
        except (ValueError, KeyError, AssertionError) as error:
            how = f"write it as train, train[:98%] or train[98%:]; {fix}"
            raise ConfigError(f"the split {self.split!r} cannot be understood", "config.data", how) from error
        if selected.num_examples == 0:
            raise InputMissingError(f"the split {self.split!r} of {name} is empty", str(self.directory), fix)
        missing = [file.filename for file in selected.file_instructions if not Path(file.filename).exists()]
        if missing:
            raise InputMissingError(f"{len(missing)} files of the dataset {name} are missing", missing[0], fix)


def _label_feature(features: tfds.features.FeaturesDict, directory: Path) -> tuple[str, tfds.features.ClassLabel]:
    """Returns the name of the feature that labels the images, and the ClassLabel in it."""
    found = dict(features.items())
    label = found.get("label")
    if isinstance(found.get("image"), tfds.features.Image):
        if isinstance(label, tfds.features.ClassLabel) and label.num_classes:
            return "label", label
        label = getattr(found.get("labels"), "feature", None)
        if isinstance(label, tfds.features.ClassLabel) and label.num_classes:
            return "labels", label
        objects = getattr(found.get(OPEN_IMAGES_LABELS), "feature", None)
        if objects is not None:
            return OPEN_IMAGES_LABELS, objects["label"]
    raise BadDataError(
        f"the dataset has the features {sorted(found)}, but no image with a label",
        str(directory),
        "it needs 'image' and 'label' (a ClassLabel), or 'image' and 'labels' (a Sequence of ClassLabel)",
    )


def _fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in ("dataset_info.json", "features.json"):
        digest.update((directory / name).read_bytes())
    return digest.hexdigest()


def check_labels(source: Source) -> None:
    """Checks that labels are in range, before anything is compiled.

    Reads `LABELS_CHECKED_BEFORE_TRAINING` examples at even distances: all of a small dataset, a sample of ImageNet,
    whose 1.28 million would take minutes. The pipeline checks every label again (`check_label`) as it loads it.

    Raises:
      BadDataError: a label is negative or not below the number of classes.
    """
    num_checked = min(len(source), LABELS_CHECKED_BEFORE_TRAINING)
    for index in np.linspace(0, len(source) - 1, num_checked, dtype=np.int64):
        check_label(source[int(index)], source.info)


def check_label(example: dict[str, Any], info: SourceInfo) -> None:
    """Checks the label, or each of the labels, of one example.

    Raises:
      BadDataError: it is negative or not below the number of classes.
    """
    labels = example["label"] if info.multi_label else (example["label"],)
    for label in labels:
        if not 0 <= label < info.num_classes:
            raise BadDataError(
                f"label {label} is not one of the {info.num_classes} classes",
                f"dataset {info.name}, split {info.split}, example {example['index']}",
                f"labels are 0 to {info.num_classes - 1}: correct the labels, or num_classes in features.json",
            )


class SyntheticSource:
    """Random JPEG images of the size of ImageNet's, made once and used again and again, with random labels.

    Args:
      num_examples: length of the source.
      split: for `info`; all splits are alike.
    """

    def __init__(self, num_examples: int, split: str):
        self._images = _synthetic_images()
        parameters = [num_examples, _SYNTHETIC_IMAGES, _SYNTHETIC_SHAPE, _SYNTHETIC_CLASSES]
        self.info = SourceInfo(
            name=SYNTHETIC,
            split=split,
            num_classes=_SYNTHETIC_CLASSES,
            class_names=tuple(str(label) for label in range(_SYNTHETIC_CLASSES)),
            multi_label=False,
            fingerprint=hashlib.sha256(json.dumps(parameters).encode()).hexdigest(),
            num_examples=num_examples,
        )

    def __len__(self) -> int:
        """Number of examples."""
        return self.info.num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns one of the images; the label follows from the index alone."""
        label = index * 2_654_435_761 % 2**32 * _SYNTHETIC_CLASSES >> 32
        return {"image": self._images[index % _SYNTHETIC_IMAGES], "label": label, "index": index}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns some of the images."""
        return [self[index] for index in indices]


@functools.cache
def _synthetic_images() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    height, width = _SYNTHETIC_SHAPE
    images = []
    for _ in range(_SYNTHETIC_IMAGES):
        # Smooth shapes and a little noise: as many bytes as a photograph, so as expensive to decode.
        shapes = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
        noise = rng.integers(0, 24, (height, width, 1), np.uint8)
        images.append(simplejpeg.encode_jpeg(cv2.add(shapes, np.repeat(noise, 3, 2)), quality=90, colorspace="RGB"))
    return tuple(images)
