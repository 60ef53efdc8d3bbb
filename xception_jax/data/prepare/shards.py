"""Writes the sorted records of a split to ArrayRecord files, in several threads."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.utils import shard_utils

from xception_jax.data.prepare.progress import Progress
from xception_jax.data.prepare.sorting import SortedRecords
from xception_jax.errors import StorageError

WRITERS = min(4, os.cpu_count() or 1)
"""Threads that write shards, each with one bucket of records in memory."""


def write_shards(
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
