"""Reads and writes metrics.jsonl: one JSON object per line, each with a `step` and a `split`.

Numbers that JSON cannot represent (NaN, inf) are written as null and read back as NaN.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import lzma
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xception_jax.errors import InputMissingError, WorkdirError
from xception_jax.files import write_atomically
from xception_jax.user_files import parse_json, read_bytes, reading

log = logging.getLogger(__name__)

# Splits of metrics.jsonl in addition to 'train', 'dev' and 'test'.
INTERVAL = "interval"  # metrics of steps before a checkpoint that the next 'train' entry of a resumed run must include
START = "start"  # the run starts or resumes here; sums up the time of earlier starts, also of entries that are dropped
RECOVERY = "recovery"  # the run went back to a checkpoint and skipped the batches in between

MAX_METRICS_BYTES = 2 * 2**30  # a run of millions of steps that logs each
MAX_DECOMPRESSED_BYTES = 2**28  # a few kilobytes can decompress to gigabytes


def _plain(value: Any) -> Any:
    """Converts a number of Python, NumPy or JAX, or a list of them, to JSON-serializable data."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return json_ready(np.asarray(value).item())  # ValueError for more than one element


def json_ready(value: Any) -> Any:
    """Replaces floats that are not finite by None, in nested mappings and lists."""
    if isinstance(value, Mapping):
        return {str(name): json_ready(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(entry) for entry in value]
    return math.nan if value is None else value


def _parse(content: bytes) -> Iterator[dict[str, Any] | None]:
    """Yields the entry of each line, or None if the line is incomplete or damaged."""
    for line in content.splitlines():
        try:
            entry = parse_json(line, dict)
        except ValueError:
            yield None
        else:
            yield entry if _is_entry(entry) else None


def _is_entry(entry: dict[str, Any]) -> bool:
    """Returns whether all values have the types and the lengths that readers of entries rely on."""
    split = entry.get("split")
    if type(entry.get("step")) is not int or not isinstance(split, str):
        return False
    if type(entry.get("count", 0)) is not int:
        return False
    numbers, lengths = list[Any](), set[int]()
    for value in (value for name, value in entry.items() if name != "split"):
        if split == INTERVAL and isinstance(value, list):
            numbers += value
            lengths.add(len(value))
        else:
            numbers.append(value)
    return len(lengths) <= 1 and all(number is None or isinstance(number, int | float) for number in numbers)


def _entry(step: int, split: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": int(step), "split": split} | {name: _plain(value) for name, value in values.items()}


def _encode(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _decode(content: bytes) -> list[dict[str, Any]]:
    entries = [entry for entry in _parse(content) if entry is not None]
    return [{name: _with_nan(value) for name, value in entry.items()} for entry in entries]


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the entries of a metrics.jsonl in order, with null as NaN. A missing file has no entries.

    Skips incomplete lines, so it can read the file of a run that is still training. A file whose name ends in .xz is
    decompressed.

    Raises:
      UserError: the file cannot be read, or is too large.
    """
    try:
        with reading("metrics", path, "restore the file from a copy, or move it away"):
            content = read_bytes(path, MAX_METRICS_BYTES)
            if os.fspath(path).endswith(".xz"):
                content = _decompress(content)
    except InputMissingError:
        if os.path.lexists(path):
            raise
        return []
    return _decode(content)


def _decompress(content: bytes) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, MAX_DECOMPRESSED_BYTES)
    decompressed = decompressor.decompress(content, MAX_DECOMPRESSED_BYTES)
    if not decompressor.eof:
        raise ValueError(f"it is incomplete, or decompresses to more than {MAX_DECOMPRESSED_BYTES:,} bytes")
    return decompressed


class MetricsLog:
    """Appends to a metrics.jsonl, which has each entry exactly once after any crash and resume.

    Opening the file drops incomplete lines, and all entries after `step`, which the run will write again. `write`
    passes each entry to the operating system in one call, so kill -9 loses none. If the disk is full or fails, there
    is one warning; entries are kept in memory, and every later call retries.

    Args:
      path: the file, in an existing directory.
      step: the step that the run starts or resumes from.
      first: split and values of an entry for `step`, written together with the repair. It may sum up what is dropped.

    Raises:
      WorkdirError: the file cannot be opened or repaired.
    """

    def __init__(self, path: str | os.PathLike[str], step: int = 0, first: tuple[str, Mapping[str, Any]] | None = None):
        self._path = Path(path)
        self._waiting: list[bytes] = []
        self._warned = False
        try:
            entries = self._repair(step, first)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            self._size = os.fstat(self._file).st_size
        except OSError as error:
            raise WorkdirError(
                f"the metrics file cannot be used ({error.strerror})",
                str(self._path),
                "free space there, make it writable, or choose another work directory",
            ) from error
        self._written = {(entry["step"], entry["split"]) for entry in entries}

    def _repair(self, step: int, first: tuple[str, Mapping[str, Any]] | None) -> list[dict[str, Any]]:
        content = b""
        try:
            content = read_bytes(self._path, MAX_METRICS_BYTES)
        except FileNotFoundError:
            if first is None:
                return []
        except ValueError as error:
            raise OSError(errno.EFBIG, str(error)) from None
        parsed = list(_parse(content))
        entries = [entry for entry in parsed if entry is not None and entry["step"] <= step]
        if first is not None:
            entries.append(_entry(step, *first))
        repaired = b"".join(map(_encode, entries))
        dropped = [entry["split"] for entry in parsed if entry is not None and entry["step"] > step]
        if step == 0 and {"dev", "test"} & set(dropped):
            self._set_aside(content)
        if repaired != content:
            write_atomically(self._path, repaired)
        if damaged := parsed.count(None):
            log.warning("%s: removed %d damaged line%s", self._path, damaged, "s" * (damaged > 1))
        return entries

    def _set_aside(self, content: bytes) -> None:
        """Keeps the entries of a run that begins again, because its checkpoints are gone or there were none yet."""
        kept = self._path.with_name(f"{self._path.stem}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.jsonl")
        write_atomically(kept, content)
        log.warning("there is no checkpoint for the entries of %s; they are kept in %s", self._path, kept.name)

    def has(self, step: int, split: str) -> bool:
        """Returns whether there is an entry for this step and split, including entries before a resume."""
        return (step, split) in self._written

    def waiting(self) -> list[dict[str, Any]]:
        """Returns the entries that could not be written yet, as `read_metrics` would."""
        return _decode(b"".join(self._waiting))

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Appends one entry. Values are numbers (of Python, NumPy or JAX), or lists of them.

        Raises:
          ValueError: a value is an array.
        """
        entry = _entry(step, split, values)
        self._waiting.append(_encode(entry))
        self._written.add((entry["step"], split))
        self._flush()

    def _flush(self) -> bool:
        data = b"".join(self._waiting)
        try:
            done = 0
            while done < len(data):  # a disk that fills up completes part of a write and fails the next
                done += os.write(self._file, data[done:])
        except OSError as error:
            self._warn(error)
            # Remove partial lines; all waiting entries will be written again. Truncating a file needs no space.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            return False
        self._waiting.clear()
        self._size += len(data)
        return True

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            log.warning(
                "%s: cannot be written (%s); training continues, and entries are kept in memory until it can",
                self._path,
                error.strerror,
            )
        self._warned = True

    def sync(self) -> None:
        """Flushes all entries to disk. Must be called before a checkpoint is saved.

        Otherwise a power failure could keep the checkpoint but lose entries before it, which a resumed run does not
        write again.
        """
        if self._flush():
            try:
                os.fsync(self._file)
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """Syncs and closes the file. Entries that still cannot be written are lost."""
        self.sync()
        if self._waiting:
            log.warning("%s: %d entries could not be written", self._path, len(self._waiting))
        with contextlib.suppress(OSError):
            os.close(self._file)
