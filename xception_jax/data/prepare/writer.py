"""Writes a TFDS dataset (ArrayRecord shards, dataset_info.json, features.json) without TensorFlow.

Examples arrive as a stream and are stored in the order of a hash of their keys, as in every TFDS dataset. A split such
as 'train[98%:]' is then a random sample, although ImageNet's archive is sorted by class. (TFDS' own shuffler needs
TensorFlow above 1 GB.) Everything is written to `<version>.incomplete`, which is renamed at the end: a killed process
leaves nothing that looks complete. The same command then goes on: a split of which all examples have been read is not
read again, and a shard that is whole is not written again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core import dataset_info as tfds_dataset_info
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.utils import shard_utils

from xception_jax.data.metadata import check_features, open_builder
from xception_jax.data.prepare.progress import Progress
from xception_jax.data.prepare.sorting import SortedRecords
from xception_jax.data.sources import find_dataset, is_complete
from xception_jax.errors import BadDataError, StorageError
from xception_jax.files import write_atomically
from xception_jax.names import printable, printable_path

VERSION = "1.0.0"

WORK = "unsorted"
"""Subdirectory of an incomplete dataset for the records that are not in their shards yet."""

WRITERS = min(4, os.cpu_count() or 1)
"""Threads that write shards, each with one bucket of records in memory."""

_SOURCE = "source"  # file in WORK: identifies what the dataset is made of
_FORMAT = 1  # increased when the files in WORK, or the division into shards, change


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
      source: identifies the original files, see `fingerprint_of_files`. With it, the next process continues the work of
        one that was killed.
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


@contextlib.contextmanager
def incomplete_directory(
    data_dir: Path, name: str, version: str, *, overwrite: bool, source: str = ""
) -> Iterator[Path | None]:
    """Yields a directory that becomes data_dir/name/version if the block ends without an exception.

    It is empty, or has what a killed or interrupted process made of the same source. Work files belong in its
    subdirectory `WORK`. Yields None if the dataset exists and `overwrite` is False. A second process waits for a lock
    and then finds the finished dataset.

    Args:
      data_dir: the directory of all datasets.
      name: name of the dataset, and of its builder config.
      version: its version.
      overwrite: replaces an existing dataset.
      source: identifies the original files. If it is empty, every process begins anew.

    Raises:
      StorageError: the directory cannot be written.
    """
    target = data_dir / name / version
    partial = target.with_name(f"{version}.incomplete")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / ".lock", name):
            replaced = target.with_name(f"{version}.replaced")
            if os.path.lexists(replaced) and not os.path.lexists(target):
                replaced.rename(target)  # of a process that was killed between two names
            if is_complete(target) and not overwrite:
                for path in (target / WORK, replaced):  # of a process that was killed at its very end
                    shutil.rmtree(path, ignore_errors=True)
                if partial.is_dir():
                    what = f"an unfinished replacement of {printable(name)} is kept in {printable_path(partial)}"
                    print(f"note: {what}: finish it with --overwrite, or delete it", file=sys.stderr)
                yield None
                return
            _refuse_others(target, overwrite=overwrite)
            identity = hashlib.sha256(f"{_FORMAT} {name} {version} {source}".encode()).hexdigest()
            _begin(partial, identity if source else "")
            try:
                yield partial
                shutil.rmtree(replaced, ignore_errors=True)
                if target.is_dir():
                    target.rename(replaced)
                partial.rename(target)
                for path in (replaced, target / WORK):
                    shutil.rmtree(path, ignore_errors=True)
            except BaseException as error:
                if not (source and isinstance(error, KeyboardInterrupt)):
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise StorageError(
            f"preparing the dataset {name} failed: {error.strerror or error}",
            str(error.filename or target),
            "free some space or choose another --data_dir" if full else "check the path or choose another --data_dir",
        ) from error


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    """Waits until no other process prepares this dataset, and keeps others waiting. A file is not truncated."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "there is a link in the place of the lock file", os.fspath(path))
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        _lock(lock, name)
        yield
    finally:
        os.close(lock)


def _lock(lock: int, name: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that prepares {printable(name)} ...", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(
            "note: this file system has no locks: do not run two commands that prepare this dataset at the same time",
            file=sys.stderr,
        )


def _refuse_others(target: Path, *, overwrite: bool) -> None:
    """Raises StorageError if something else than a dataset would be deleted, or a link to one would be replaced."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise StorageError("there is a link or a file in the place of the dataset", str(target), "move it away")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        what = "there is a directory in the place of the dataset that is not a complete one"
        raise StorageError(what, str(target), "move it away, or pass --overwrite to replace it")


def _begin(partial: Path, identity: str) -> None:
    """Makes the directory, and empties it unless it was begun with the same identity."""
    begun = partial / WORK / _SOURCE
    if identity and begun.is_file() and begun.read_bytes() == identity.encode():
        return
    shutil.rmtree(partial, ignore_errors=True)
    (partial / WORK).mkdir(parents=True)
    write_atomically(begun, identity)


def fingerprint_of_files(paths: Iterable[Path]) -> str:
    """Identifies files by their names, sizes and times of modification, without reading them."""
    found = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(found).encode()).hexdigest()


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
    _refuse_newer(name, dataset.version, data_dir)
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
                splits.append(_write_shards(partial, dataset.name, split, records, progress=progress))
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
    except ValueError as error:
        raise BadDataError(
            f"an example does not fit the features of {dataset.name}: {str(error).splitlines()[-1]}",
            f"split {split}, example {key}",
            "labels are whole numbers from 0 to the number of classes - 1",
        ) from error


def _refuse_newer(name: str, version: str, data_dir: Path) -> None:
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


def _write_shards(
    directory: Path, name: str, split: str, records: SortedRecords, *, progress: bool
) -> tfds.core.SplitInfo:
    """Writes the shards that do not exist yet, in several threads. Each holds one bucket of the records in memory."""
    num_shards = shard_utils.ShardConfig().get_number_shards(records.num_bytes, records.count)
    boundaries = shard_utils.get_shard_boundaries(records.count, num_shards)
    template = shard_template(directory, name, split)
    spans = list(zip([0, *boundaries], boundaries, strict=False))
    paths = [Path(template.sharded_filepath(shard_index=i, num_shards=num_shards)) for i in range(num_shards)]
    missing = [shard for shard, path in enumerate(paths) if not path.exists()]
    if progress and len(missing) < num_shards:
        print(f"{name} {split}: {num_shards - len(missing)} of {num_shards} files exist already", file=sys.stderr)
    queue = _BucketQueue(records, [spans[shard] for shard in missing])
    failed = threading.Event()

    def write(shards: Sequence[int]) -> None:
        reader = _SpanReader(records)
        for shard in shards:
            if failed.is_set():
                return
            low, high = spans[shard]
            write_array_record(paths[shard], reader.read(low, high))
            queue.written(low, high)
            shown.add(high - low)

    total = sum(high - low for low, high in (spans[shard] for shard in missing))
    size = max(1, -(-len(missing) // WRITERS))
    with Progress(f"{name} {split}, writing", total, show=progress) as shown, ThreadPoolExecutor(WRITERS) as threads:
        try:
            list(threads.map(write, (missing[start : start + size] for start in range(0, len(missing), size))))
        except BaseException:
            failed.set()
            raise
    lengths = [high - low for low, high in spans]
    return tfds.core.SplitInfo(
        name=split, shard_lengths=lengths, num_bytes=records.num_bytes, filename_template=template
    )


class _SpanReader:
    """Reads records by position. Keeps the last bucket, of which the next shard often needs the rest."""

    def __init__(self, records: SortedRecords):
        self._records = records
        self._number, self._bucket = -1, list[bytes]()

    def read(self, low: int, high: int) -> Iterator[bytes]:
        for number, start in _buckets(self._records, low, high):
            if number != self._number:
                self._bucket = []  # frees its memory before the next is read
                self._number, self._bucket = number, self._records.bucket(number)
            yield from self._bucket[max(0, low - start) : high - start]


def _buckets(records: SortedRecords, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Yields the buckets that hold the positions from `low` to `high`, with the first position of each."""
    start = 0
    for number, count in enumerate(records.counts):
        if start < high and start + count > low and count:
            yield number, start
        start += count


class _BucketQueue:
    """Deletes each bucket as soon as all shards that need it are on disk.

    Args:
      records: the records.
      spans: the positions of the records of each missing shard.
    """

    def __init__(self, records: SortedRecords, spans: Sequence[tuple[int, int]]):
        self._records, self._lock = records, threading.Lock()
        self._shards_left = Counter(number for span in spans for number, _ in _buckets(records, *span))
        for number in range(len(records.counts)):
            if not self._shards_left[number]:
                records.discard(number)

    def written(self, low: int, high: int) -> None:
        """Notes that the shard with these positions is on disk."""
        with self._lock:
            for number, _ in _buckets(self._records, low, high):
                self._shards_left[number] -= 1
                if not self._shards_left[number]:
                    self._records.discard(number)


def shard_template(directory: Path, name: str, split: str) -> tfds.core.ShardedFileTemplate:
    """Returns the template for the file names of a split's shards."""
    return tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=name, split=split, filetype_suffix="array_record"
    )


def write_array_record(path: Path, records: Iterable[bytes]) -> None:
    """Writes an ArrayRecord file with one record per group, so that records can be read individually.

    A file with this name is always whole.

    Raises:
      StorageError: the disk is full, or the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        writer = ArrayRecordWriter(os.fspath(partial), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        with open(partial, "rb") as file:
            os.fsync(file)
        partial.rename(path)
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
