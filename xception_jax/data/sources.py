"""Sources of examples: TFDS datasets on disk.

A source is a sequence of {'image': bytes of an image file, 'label': int or tuple of ints, 'index': position}. Any
number of threads may read it, and it can be pickled, so that worker processes can open it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds

from xception_jax.data.metadata import FEATURES, INFO, open_builder
from xception_jax.data.shards import check_shards
from xception_jax.errors import BadDataError, ConfigError, InputMissingError
from xception_jax.files import local_directory
from xception_jax.names import in_shell, one_line

LABELS_CHECKED_BEFORE_TRAINING = 4096
OPEN_IMAGES_LABELS = "objects_trainable"  # in TFDS' open_images_v4: the 7,186 classes with enough images for training

AS_ARRAY_RECORD = "write it again by tfds.builder(NAME, file_format='array_record').download_and_prepare()"
"""What to do about a dataset in other files than ArrayRecord and TFRECORD."""

_CHUNK = 64  # records that are read in one call, with the bytes of their images

_Decoder = Callable[[bytes], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """Describes a source without reading its examples.

    Attributes:
      name: name of the dataset.
      split: the split as requested, such as 'train[:98%]'.
      num_classes: labels are 0 to num_classes - 1.
      class_names: one name for each class.
      multi_label: whether 'label' is a tuple of ints, the set of classes in the image.
      fingerprint: SHA-256 of dataset_info.json and features.json; the same for all splits.
      num_examples: number of examples in this split.
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
        """Reads several examples, which can be much cheaper than one by one."""
        ...

    def column(self, name: str) -> list[Any] | None:
        """Reads one feature of all examples without decoding their images; None if the source does not have it."""
        ...


def resolve_data_dir(data_dir: str) -> Path:
    """Returns the directory of all datasets: `data_dir` if set, else TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
      ConfigError: it is the address of an object store.
    """
    directory = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in directory:
        raise ConfigError(
            f"datasets cannot be read from {directory!r}: every single image would be a request to the object store",
            "config.data.data_dir or TFDS_DATA_DIR",
            "copy the dataset to a disk of each host (gcloud storage cp -r), or mount the bucket "
            "with a file cache (gcsfuse), and set config.data.data_dir to that directory",
        )
    return local_directory(directory, "config.data.data_dir or TFDS_DATA_DIR")


def find_dataset(name: str, data_dir: Path) -> Path | None:
    """Returns the directory of a complete dataset, or None.

    Args:
      name: name[/config][:version]; without a version, the newest is found.
      data_dir: the directory of all datasets.
    """
    name, _, version = name.partition(":")
    if version:
        return data_dir / name / version if is_complete(data_dir / name / version) else None
    return next(iter(find_versions(name, data_dir)), None)


def find_versions(name: str, data_dir: Path) -> list[Path]:
    """Returns the directories of all versions of a dataset, newest first, given its name[/config]."""
    paths = (data_dir / name).glob("*")
    found = [path for path in paths if tfds.core.Version.is_valid(path.name) and is_complete(path)]
    return sorted(found, key=lambda path: tfds.core.Version(path.name), reverse=True)


def is_complete(directory: Path) -> bool:
    """Returns whether a directory holds a finished dataset."""
    return (directory / INFO).is_file() and (directory / FEATURES).is_file()


class TfdsSource:
    """Reads one split of a TFDS dataset in ArrayRecord files. Images stay encoded.

    Args:
      directory: directory of one version of the dataset, with dataset_info.json.
      split: such as 'train[:98%]'.

    Raises:
      InputMissingError: the split is missing or empty, files are missing, or the dataset is not in ArrayRecord files.
      BadDataError: the dataset has no image with a label (or labels).
      ConfigError: the split cannot be parsed, or has images twice.
    """

    def __init__(self, directory: Path, split: str):
        self.directory, self.split = directory, split
        builder = open_builder(directory)
        self._check_format(builder)
        self._check_split(builder)
        self._label_name, label = label_feature(builder.info.features, directory)
        check_shards(builder.info.splits[split].file_instructions)
        self._features = builder.info.features
        self._columns: dict[str, list[Any]] = {}
        self._decode = _decoder(self._features, ("image", self._label_name))
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split, deserialize_method=raw)
        self.info = SourceInfo(
            name=builder.info.name,
            split=split,
            num_classes=label.num_classes,
            class_names=tuple(label.names),
            multi_label=self._label_name != "label",
            fingerprint=_fingerprint(directory),
            num_examples=len(self._records),
        )

    def __reduce__(self) -> tuple:
        """Pickles as its arguments: the objects of TFDS are large and not made for pickling."""
        return TfdsSource, (self.directory, self.split)

    def __len__(self) -> int:
        """Number of examples."""
        return self.info.num_examples

    def overlaps(self, split: str) -> bool:
        """Returns whether another split of the dataset has some of the same examples, as 'train' and 'train[98%:]'."""
        splits = open_builder(self.directory).info.splits
        return any(
            file == other_file and max(first, other_first) < min(last, other_last)
            for file, first, last in _ranges(splits[self.split])
            for other_file, other_first, other_last in _ranges(splits[split])
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one example.

        Raises:
          BadDataError: the record is damaged.
        """
        return self._example(index, self._read(index, self._decode))

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads several examples in one call; raises like `__getitem__`."""
        records = self._read_all(indices, self._decode)
        return [self._example(index, record) for index, record in zip(indices, records, strict=True)]

    def _example(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
        try:
            image, label = record["image"], record[self._label_name]
            if not isinstance(image, bytes):
                raise TypeError(f"the image is {type(image).__name__}, not bytes")
            if self._label_name == OPEN_IMAGES_LABELS:
                # Confidence 0 means that a person verified the absence of the class.
                present = zip(label["label"], label["confidence"], strict=True)
                label = sorted({int(value) for value, confidence in present if confidence > 0})
            label = tuple(int(value) for value in label) if self.info.multi_label else int(label)
        except (KeyError, TypeError, ValueError) as error:  # a feature is missing or of another type
            raise self._damaged(index, error) from error
        return {"image": image, "label": label, "index": index}

    def _read(self, index: int, decode: _Decoder) -> dict[str, Any]:
        try:
            return decode(self._records[index])
        except MemoryError:
            raise
        except Exception as error:
            # array_record raises RuntimeError, protobuf raises DecodeError, and TFDS passes on any error.
            raise self._damaged(index, error) from error

    def _damaged(self, index: int, error: Exception) -> BadDataError:
        return BadDataError(
            f"record {index} of {self.info.name} cannot be read: {one_line(error)}",
            f"{self.directory}, split {self.split}",
            "copy or prepare the dataset again",
        )

    def column(self, name: str) -> list[Any] | None:
        """Reads one feature of all examples without decoding their images; None if the dataset does not have it.

        Args:
          name: such as 'label', 'file_name' or 'group'. Bytes are decoded to text as those of file names.

        Raises:
          BadDataError: a record is damaged.
        """
        if name not in self._features:
            return None
        if name not in self._columns:
            chunks = (range(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK))
            decode = _decoder(self._features, (name,))
            values = [record[name] for chunk in chunks for record in self._read_all(chunk, decode)]
            self._columns[name] = [os.fsdecode(value) if isinstance(value, bytes) else value for value in values]
        return self._columns[name]

    def _read_all(self, indices: Sequence[int], decode: _Decoder) -> list[dict[str, Any]]:
        try:
            return list(map(decode, self._records.__getitems__(indices)))
        except MemoryError:
            raise
        except Exception:
            return [self._read(index, decode) for index in indices]  # the error names the damaged one

    def _check_format(self, builder: tfds.core.DatasetBuilder) -> None:
        # Without this check as_data_source() fails and suggests download_and_prepare(), which does not help here.
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            what = f"the dataset is stored as {builder.info.file_format.value}, not as array_record"
            fix = AS_ARRAY_RECORD
            if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
                command = f"xception-jax prepare tfrecord --source {in_shell(self.directory)}"
                fix = f"run {command} --data_dir OTHER, then set data_dir to OTHER"
            raise InputMissingError(what, str(self.directory), fix)

    def _check_split(self, builder: tfds.core.DatasetBuilder) -> None:
        name = builder.info.name
        splits = {split: info.num_examples for split, info in builder.info.splits.items()}
        available = ", ".join(f"{split} ({count:,})" for split, count in splits.items()) or "none"
        fix = f"the splits are {available}; xception-jax prepare --help shows how to write the dataset again"
        if self.split.partition("[")[0] not in splits and "+" not in self.split:
            raise InputMissingError(f"the dataset {name} has no split {self.split!r}", str(self.directory), fix)
        try:
            selected = builder.info.splits[self.split]
        except (ValueError, KeyError, AssertionError) as error:
            if "incompatible with" in str(error):  # a slice that TFDS has understood
                what = f"the split {self.split!r} is out of range: {one_line(error)}"
                raise ConfigError(what, "config.data", fix) from error
            how = f"write it as train, train[:98%] or train[98%:]; {fix}"
            raise ConfigError(f"the split {self.split!r} cannot be parsed", "config.data", how) from error
        if selected.num_examples == 0:
            raise InputMissingError(f"the split {self.split!r} of {name} is empty", str(self.directory), fix)
        for (file, _, end), (other_file, start, _) in itertools.pairwise(sorted(_ranges(selected))):
            if file == other_file and start < end:
                how = f"name each part once, as in train[:50%]+train[75%:]; {fix}"
                raise ConfigError(f"the split {self.split!r} has images twice", "config.data", how)
        missing = [file.filename for file in selected.file_instructions if not Path(file.filename).is_file()]
        if missing:
            raise InputMissingError(f"{len(missing)} files of the dataset {name} are missing", missing[0], fix)


def _decoder(features: tfds.features.FeaturesDict, names: Sequence[str]) -> _Decoder:
    """Returns what reads some features of a record. Images stay encoded, and all other features unread."""
    chosen = tfds.features.FeaturesDict({name: features[name] for name in names})
    encoded = {name: tfds.decode.SkipDecoding() for name in names if isinstance(features[name], tfds.features.Image)}
    return functools.partial(chosen.deserialize_example_np, decoders=encoded)


def _ranges(split: tfds.core.SplitInfo) -> list[tuple[str, int, float]]:
    """Returns the records of a split as (file, first, last + 1)."""
    files = split.file_instructions
    return [(str(f.filename), f.skip, math.inf if f.take < 0 else f.skip + f.take) for f in files]


def label_feature(features: tfds.features.FeaturesDict, directory: Path) -> tuple[str, tfds.features.ClassLabel]:
    """Returns the name of the feature that labels the images, and its ClassLabel.

    Args:
      features: the features of the dataset.
      directory: its directory, for the error message.

    Raises:
      BadDataError: the dataset has no image with a label (or labels).
    """
    found = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    if isinstance(found.get("image"), tfds.features.Image):
        several = getattr(found.get("labels"), "feature", None)
        objects = getattr(found.get(OPEN_IMAGES_LABELS), "feature", None)
        of_objects = dict(objects.items()).get("label") if isinstance(objects, tfds.features.FeaturesDict) else None
        for name, label in (("label", found.get("label")), ("labels", several), (OPEN_IMAGES_LABELS, of_objects)):
            if isinstance(label, tfds.features.ClassLabel) and label.num_classes:
                return name, label
    raise BadDataError(
        f"the dataset has no image with a label; its features are {sorted(found)}",
        str(directory),
        "it needs 'image' and 'label' (a ClassLabel), or 'image' and 'labels' (a Sequence of ClassLabel)",
    )


def _fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in (INFO, FEATURES):
        digest.update((directory / name).read_bytes())
    return digest.hexdigest()


def check_labels(source: Source, part: int = 0, parts: int = 1) -> None:
    """Checks a sample of the labels before anything is compiled.

    Reads up to `LABELS_CHECKED_BEFORE_TRAINING` evenly spaced examples; all of ImageNet would take minutes. The
    pipeline checks every label when it loads the example.

    Args:
      source: the examples.
      part: number of the process, which checks every `parts`-th example of the sample.
      parts: number of processes.

    Raises:
      BadDataError: a label is negative or not below the number of classes.
    """
    num_checked = min(len(source), LABELS_CHECKED_BEFORE_TRAINING)
    sample = np.linspace(0, len(source) - 1, num_checked, dtype=np.int64)[part::parts].tolist()
    for start in range(0, len(sample), _CHUNK):
        for example in source.__getitems__(sample[start : start + _CHUNK]):
            check_label(example, source.info)


def check_label(example: dict[str, Any], info: SourceInfo) -> None:
    """Checks the label, or all labels, of one example.

    Raises:
      BadDataError: a label is negative or not below the number of classes.
    """
    labels = example["label"] if info.multi_label else (example["label"],)
    for label in labels:
        if not 0 <= label < info.num_classes:
            raise BadDataError(
                f"label {label} is not one of the {info.num_classes} classes",
                f"dataset {info.name}, split {info.split}, example {example['index']}",
                f"labels are 0 to {info.num_classes - 1}: correct the labels, or num_classes in features.json",
            )
