"""Sorts more records than fit in memory by a hash of their keys, and keeps them for a process that continues."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from xception_jax.errors import BadDataError
from xception_jax.files import sync_directory, write_atomically
from xception_jax.user_files import read_json

BUCKET_MEMORY = 256 << 20
"""Bytes of records kept in memory before they are appended to the files of their buckets."""

_BUCKETS = 512
_ENTRY = struct.Struct("<16sQ")  # digest of the key, bytes of the record
_INDEX = "index.json"


class SortedRecords:
    """Records in the order of the MD5 digests of their keys, on disk if they exceed `BUCKET_MEMORY`.

    The first bits of its digest put a record into one of `_BUCKETS` buckets. Buckets are read back and sorted one at a
    time; for ImageNet each has 270 MB. On disk, the records are complete as soon as there is an index.

    Args:
      directory: directory for the files of the buckets.
    """

    def __init__(self, directory: Path):
        self.num_bytes = 0
        self.counts = [0] * _BUCKETS  # records in each bucket
        self._directory = directory
        self._digests: set[bytes] = set()
        self._memory: list[list[tuple[bytes, bytes]]] = [[] for _ in range(_BUCKETS)]
        self._held = 0
        self._on_disk = False

    @classmethod
    def complete(cls, directory: Path) -> SortedRecords | None:
        """Returns the records that a process has completed in a directory, or None."""
        try:
            index = read_json(directory / _INDEX, dict)
        except (OSError, ValueError):
            return None
        records = cls(directory)
        records.num_bytes, records.counts, records._on_disk = index["num_bytes"], index["counts"], True
        return records

    @property
    def count(self) -> int:
        """Number of records."""
        return sum(self.counts)

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
        bucket = int.from_bytes(digest[:2]) * _BUCKETS >> 16
        self._memory[bucket].append((digest, record))
        self.counts[bucket] += 1
        self.num_bytes += len(record)
        self._held += len(record)
        if self._held > BUCKET_MEMORY:
            self._spill()

    def finish(self, *, keep: bool) -> None:
        """Completes the records, on disk if some are there already.

        Args:
          keep: whether another process may continue with the records on disk, even after a power failure.
        """
        self._digests.clear()
        if not self._on_disk:
            return
        self._spill()
        if not keep:
            return
        for path in self._directory.iterdir():
            with open(path, "rb") as file:
                os.fsync(file)
        sync_directory(self._directory)
        write_atomically(self._directory / _INDEX, json.dumps({"num_bytes": self.num_bytes, "counts": self.counts}))

    def _spill(self) -> None:
        self._directory.mkdir(exist_ok=True)
        self._on_disk = True
        for number, entries in enumerate(self._memory):
            with open(self._path(number), "ab") as file:
                for digest, record in entries:
                    file.write(_ENTRY.pack(digest, len(record)))
                    file.write(record)
            entries.clear()
        self._held = 0

    def bucket(self, number: int) -> list[bytes]:
        """Returns the records of a bucket, sorted. Threads may read different buckets at the same time."""
        entries = list(_read_entries(self._path(number))) if self._on_disk else self._memory[number]
        return [record for _, record in sorted(entries, key=lambda entry: entry[0])]

    def discard(self, number: int) -> None:
        """Deletes a bucket, to free its space."""
        self._memory[number].clear()
        self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._directory / str(number)


def _read_entries(path: Path) -> Iterator[tuple[bytes, bytes]]:
    with open(path, "rb") as file:
        while header := file.read(_ENTRY.size):
            digest, length = _ENTRY.unpack(header)
            yield digest, file.read(length)
