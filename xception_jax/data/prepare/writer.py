"""Writes a TFDS dataset (ArrayRecord shards, dataset_info.json, features.json) without TensorFlow.

Examples arrive as a stream and are stored in the order of a hash of their keys, as in every TFDS dataset. A split such
as 'train[98%:]' is then a random sample, although ImageNet's archive is sorted by class. (TFDS' own shuffler needs
TensorFlow above 1 GB.) Everything is written to `<version>.incomplete`, which is renamed at the end: a killed process
leaves nothing that looks complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import dataset_info as tfds_dataset_info
from tensorflow_datasets.core.utils import shard_utils
from tqdm import tqdm

from xception_jax.data.metadata import check_features, open_builder
from xception_jax.data.sources import is_complete
from xception_jax.errors import BadDataError, StorageError

VERSION = "1.0.0"

_BUCKETS = 512
_BUCKET_MEMORY = 256 << 20  # bytes of records kept in memory before they are appended to the files of their buckets
_ENTRY = struct.Struct("<16sQ")  # digest of the key, bytes of the record


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
    """

    name: str
    features: tfds.features.FeaturesDict
    splits: Mapping[str, Iterable[tuple[str, dict[str, Any]]]]
    description: str
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    version: str = VERSION
    config: str = ""


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


@contextlib.contextmanager
def incomplete_directory(data_dir: Path, name: str, version: str, *, overwrite: bool) -> Iterator[Path | None]:
    """Yields an empty directory that becomes data_dir/name/version if the block ends without an exception.

    Yields None if the dataset exists and `overwrite` is False. A second process waits for a lock and then finds the
    finished dataset.

    Raises:
      StorageError: the directory cannot be written.
    """
    target = data_dir / name / version
    partial = target.with_name(f"{version}.incomplete")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if is_complete(target) and not overwrite:
                yield None
                return
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise StorageError(
            f"preparing the dataset {name} failed: {error.strerror or error}",
            str(error.filename or target),
            "free some space or choose another --data_dir" if full else "check the path or choose another --data_dir",
        ) from error


def write_dataset(dataset: Dataset, data_dir: Path, *, overwrite: bool = False, progress: bool = True) -> Summary:
    """Writes a dataset to data_dir/name/version unless it exists.

    Args:
      dataset: the dataset.
      data_dir: the directory of all datasets.
      overwrite: replaces an existing dataset.
      progress: shows progress on standard error.

    Raises:
      BadDataError: two examples of a split have the same key, a label is out of range, or a class has no valid name.
      StorageError: the disk is full, or the directory cannot be written.
    """
    name = f"{dataset.name}/{dataset.config}" if dataset.config else dataset.name
    target = data_dir / name / dataset.version
    if is_complete(target) and not overwrite:
        return existing(target)
    check_features(dataset.features, f"dataset {dataset.name}")
    with incomplete_directory(data_dir, name, dataset.version, overwrite=overwrite) as partial:
        if partial is None:
            return existing(target)
        splits = []
        for split, examples in dataset.splits.items():
            records = _SortedByHash(partial / f"{split}.unsorted")
            total = dataset.expected.get(split)
            for key, example in tqdm(
                examples, f"{dataset.name} {split}", total, unit="img", disable=None if progress else True
            ):
                records.add(key, _serialize(dataset, split, key, example))
            if records.count:
                splits.append(_write_shards(partial, dataset.name, split, records))
            shutil.rmtree(partial / f"{split}.unsorted", ignore_errors=True)
        _write_metadata(partial, dataset, splits)
    return Summary(target, {split.name: split.num_examples for split in splits}, already_there=False)


def _serialize(dataset: Dataset, split: str, key: str, example: dict[str, Any]) -> bytes:
    try:
        return dataset.features.serialize_example(example)
    except ValueError as error:
        raise BadDataError(
            f"an example does not fit the features of {dataset.name}: {str(error).splitlines()[-1]}",
            f"split {split}, example {key}",
            "labels are whole numbers from 0 to the number of classes - 1",
        ) from error


class _SortedByHash:
    """Sorts records by the MD5 digest of their keys, on disk if they exceed `_BUCKET_MEMORY`.

    The first bits of its digest put a record into one of `_BUCKETS` buckets. Buckets are read back and sorted one at a
    time; for ImageNet each has 270 MB.

    Args:
      directory: directory for the files of the buckets.
    """

    def __init__(self, directory: Path):
        self.count = 0
        self.num_bytes = 0
        self._directory = directory
        self._digests: set[bytes] = set()
        self._memory: list[list[tuple[bytes, bytes]]] = [[] for _ in range(_BUCKETS)]
        self._held = 0

    def add(self, key: str, record: bytes) -> None:
        """Adds a record.

        Raises:
          BadDataError: an earlier record has the same key.
        """
        digest = hashlib.md5(key.encode()).digest()
        if digest in self._digests:
            raise BadDataError(
                f"two examples have the same name, {key}", key, "rename one of them or remove it from the source"
            )
        self._digests.add(digest)
        self._memory[int.from_bytes(digest[:2]) * _BUCKETS >> 16].append((digest, record))
        self.count += 1
        self.num_bytes += len(record)
        self._held += len(record)
        if self._held > _BUCKET_MEMORY:
            self._spill()

    def _spill(self) -> None:
        self._directory.mkdir(exist_ok=True)
        for number, entries in enumerate(self._memory):
            with open(self._directory / str(number), "ab") as file:
                for digest, record in entries:
                    file.write(_ENTRY.pack(digest, len(record)))
                    file.write(record)
            entries.clear()
        self._held = 0

    def __iter__(self) -> Iterator[bytes]:
        for number, entries in enumerate(self._memory):
            path = self._directory / str(number)
            if path.exists():
                entries = entries + list(_read_entries(path))
                path.unlink()
            for _, record in sorted(entries, key=lambda entry: entry[0]):
                yield record


def _read_entries(path: Path) -> Iterator[tuple[bytes, bytes]]:
    with open(path, "rb") as file:
        while header := file.read(_ENTRY.size):
            digest, length = _ENTRY.unpack(header)
            yield digest, file.read(length)


def _write_shards(directory: Path, name: str, split: str, records: _SortedByHash) -> tfds.core.SplitInfo:
    num_shards = shard_utils.ShardConfig().get_number_shards(records.num_bytes, records.count)
    boundaries = shard_utils.get_shard_boundaries(records.count, num_shards)
    template = shard_template(directory, name, split)
    lengths = [high - low for low, high in zip([0, *boundaries], boundaries, strict=False)]
    stream = iter(records)
    for shard, length in enumerate(lengths):
        path = template.sharded_filepath(shard_index=shard, num_shards=num_shards)
        write_array_record(Path(path), (next(stream) for _ in range(length)))
    return tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=records.num_bytes, filename_template=template
    )


def shard_template(directory: Path, name: str, split: str) -> tfds.core.ShardedFileTemplate:
    """Returns the template for the file names of a split's shards."""
    return tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, split=split, filetype_suffix="array_record"
    )


def write_array_record(path: Path, records: Iterable[bytes]) -> None:
    """Writes an ArrayRecord file with one record per group, so that records can be read individually.

    Raises:
      StorageError: the disk is full, or the file cannot be written.
    """
    try:
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    except RuntimeError as error:
        # array_record raises RuntimeError for every error of the operating system.
        raise StorageError(
            f"writing a shard failed: {str(error).splitlines()[0]}",
            str(path),
            "free some space on that disk",
        ) from error


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
