"""Writes a TFDS dataset (ArrayRecord shards, dataset_info.json, features.json) without TensorFlow.

Examples arrive as a stream and are stored in the order of a hash of their keys, as in every TFDS dataset. A split such
as 'train[98%:]' is then a random sample, although ImageNet's archive is sorted by class. (TFDS' own shuffler needs
TensorFlow above 1 GB.) After a process was killed, the same command goes on: a split of which all examples have been
read is not read again, and a shard that is whole is not written again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info as tfds_dataset_info
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from xception_jax.data.metadata import check_features, open_builder
from xception_jax.data.prepare.directory import WORK, incomplete_directory
from xception_jax.data.prepare.progress import Progress
from xception_jax.data.prepare.shards import write_shards
from xception_jax.data.prepare.sorting import SortedRecords
from xception_jax.data.sources import find_dataset, is_complete
from xception_jax.errors import BadDataError, StorageError
from xception_jax.names import one_line

VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset to be written.

    Attributes:
      name: its name in `config.data.name`.
      features: features of each example; 'image' is the content of a file, which is kept byte for byte.
      splits: (key, example) pairs for each split; keys are unique within a split.
      description: one paragraph for dataset_info.json.
      expected: number of examples in each split of the complete dataset, for progress and for reports only.
      version: version of the dataset.
      config: name of the builder config if a dataset has several; the dataset is then opened as 'name/config'.
      source: identifies the original files, see `directory.fingerprint_of_files`. With it, the next process continues
        the work of one that was killed.
      digest: adds a digest of all keys and records to the description, so that datasets with other labels have other
        fingerprints. Images whose labels never change do without: their fingerprints are the same in every release.
    """

    name: str
    features: tfds.features.FeaturesDict
    splits: Mapping[str, Iterable[tuple[str, dict[str, Any]]]]
    description: str
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    version: str = VERSION
    config: str = ""
    source: str = ""
    digest: bool = False


@dataclasses.dataclass(frozen=True)
class Summary:
    """Describes a prepared dataset: its directory, its examples in each split, and whether it existed before."""

    path: Path
    num_examples: dict[str, int]
    already_there: bool


def existing(directory: Path) -> Summary:
    """Returns the summary of a dataset that existed before."""
    splits = open_builder(directory).info.splits
    return Summary(directory, {name: split.num_examples for name, split in splits.items()}, already_there=True)


def write_dataset(dataset: Dataset, data_dir: Path, *, overwrite: bool = False, progress: bool = True) -> Summary:
    """Writes a dataset to data_dir/name/version unless it exists.

    Args:
      dataset: the dataset.
      data_dir: the directory of all datasets.
      overwrite: replaces an existing dataset.
      progress: shows progress on standard error.

    Raises:
      BadDataError: two examples of a split have the same key, a label is out of range, a class has no valid name, or
        the dataset would be empty.
      StorageError: the disk is full, the directory cannot be written, or there is a newer version.
    """
    name = f"{dataset.name}/{dataset.config}" if dataset.config else dataset.name
    target = data_dir / name / dataset.version
    refuse_newer(name, dataset.version, data_dir)
    leftovers = [target.with_name(f"{target.name}.{kind}") for kind in ("replaced", "incomplete")]
    if is_complete(target) and not overwrite and not any(map(os.path.lexists, (*leftovers, target / WORK))):
        return existing(target)
    check_features(dataset.features, f"dataset {dataset.name}")
    with incomplete_directory(data_dir, name, dataset.version, overwrite=overwrite, source=dataset.source) as partial:
        if partial is None:
            return existing(target)
        splits, digest = [], 0
        for split in dataset.splits:
            unsorted = partial / WORK / split
            records = None if dataset.digest else SortedRecords.complete(unsorted)
            if records is None:
                shutil.rmtree(unsorted, ignore_errors=True)
                records, of_split = _collect(dataset, split, unsorted, progress=progress)
                digest ^= of_split
            if records.count:
                splits.append(write_shards(partial, dataset.name, split, records, progress=progress))
            else:
                print(f"{name}: no example of {split} is left, so the dataset has no such split", file=sys.stderr)
        if not splits:
            raise BadDataError(f"there is no example for {name}", name, "check that the original files are complete")
        if dataset.digest:
            described = f"{dataset.description} Digest of keys and records: {digest:032x}."
            dataset = dataclasses.replace(dataset, description=described)
        _write_metadata(partial, dataset, splits)
    return Summary(target, {split.name: split.num_examples for split in splits}, already_there=False)


def _serialize(dataset: Dataset, serializer: ExampleSerializer, split: str, key: str, example: dict[str, Any]) -> bytes:
    try:
        # `features.serialize_example` writes the features in an order that differs from process to process.
        return serializer.get_tf_example(dataset.features.encode_example(example)).SerializeToString(deterministic=True)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:  # TFDS raises all of these
        why = f"the feature {error} is missing or unknown" if isinstance(error, KeyError) else one_line(error)
        raise BadDataError(
            f"an example does not fit the features of {dataset.name}: {why}",
            f"split {split}, example {key}",
            "give each feature a value; labels are names of classes, or numbers from 0 to the number of classes - 1",
        ) from error


def refuse_newer(name: str, version: str, data_dir: Path) -> None:
    """Raises StorageError if a newer version would be read instead of the one that is to be written."""
    newest = find_dataset(name, data_dir)
    if newest is not None and tfds.core.Version(newest.name) > tfds.core.Version(version):
        fix = "choose another --name or --data_dir, or move the newer version away"
        if is_complete(newest.with_name(version)):
            fix = f"set config.data.name={name}:{version} to read the version that exists, or {fix}"
        what = f"there is a version {newest.name} of {name}, which would be read instead of {version}"
        raise StorageError(what, str(newest), fix)


def _collect(dataset: Dataset, split: str, directory: Path, *, progress: bool) -> tuple[SortedRecords, int]:
    """Reads all examples of a split. Also returns their digest, which does not depend on their order."""
    records, digest = SortedRecords(directory), 0
    serializer = ExampleSerializer(dataset.features.get_serialized_info())
    with Progress(f"{dataset.name} {split}, reading", dataset.expected.get(split), show=progress) as shown:
        for key, example in dataset.splits[split]:
            record = _serialize(dataset, serializer, split, key, example)
            records.add(key, record)
            if dataset.digest:
                digest ^= _digest(split, key, record)
            shown.add()
    records.finish(keep=bool(dataset.source))
    return records, digest


def _digest(split: str, key: str, record: bytes) -> int:
    of_record = hashlib.sha256(record).hexdigest()
    return int.from_bytes(hashlib.sha256(f"{split}\0{key}\0{of_record}".encode()).digest()[:16])


def _write_metadata(directory: Path, dataset: Dataset, splits: list[tfds.core.SplitInfo]) -> None:
    info = tfds_dataset_info.DatasetInfo(
        builder=tfds_dataset_info.DatasetIdentity(
            name=dataset.name,
            version=tfds.core.Version(dataset.version),
            data_dir=os.fspath(directory),
            module_name="",
            config_name=dataset.config or None,
        ),
        description=dataset.description,
        features=dataset.features,
        supervised_keys=None,
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(directory)
