"""Opens the shards of a dataset without waiting forever.

The library creates 64 threads when it opens its first file. Where the limits of the process allow no more threads, it
tries again and again and never returns; without address space for their stacks, it may also crash.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.core.utils import shard_utils

from xception_jax.errors import BadDataError, DeviceMemoryError, StorageError
from xception_jax.names import one_line

TIMEOUT = 60.0
"""Seconds after which a shard counts as unreadable, for example on a server that does not answer."""

_ADDRESS_SPACE = 3 << 29  # bytes for the stacks of 64 threads, and for what each reserves to allocate memory
_POOL_STARTED = threading.Event()  # the threads of the library, in this process

_CHECKED = 16  # shards of which the number of records is compared
_POLL = 0.25
_REFUSED = 4  # times in a row that no thread can be started


def check_shards(shards: Sequence[shard_utils.FileInstruction]) -> None:
    """Opens some of the shards, evenly spaced, and compares their numbers of records with dataset_info.json.

    Raises:
      BadDataError: a shard is damaged, or has another number of records.
      DeviceMemoryError: the limits of this process are too low for the threads of the library.
      StorageError: a shard cannot be opened within `TIMEOUT`.
    """
    step = max(1, -(-len(shards) // _CHECKED))
    for shard in shards[::step]:
        count, path = _count_records(str(shard.filename)), str(shard.filename)
        if count != shard.examples_in_shard:
            what = f"the file has {count:,} records but dataset_info.json says {shard.examples_in_shard:,}"
            raise BadDataError(what, path, "copy or prepare the dataset again")


def _count_records(path: str) -> int:
    """Opens a shard in a thread, which is left behind if it does not end."""
    if not _POOL_STARTED.is_set() and _free_address_space() < _ADDRESS_SPACE:
        raise _no_threads(path)
    results: list[int | Exception] = []

    def work() -> None:
        try:
            reader = ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=32768)
            results.append(reader.num_records())
            reader.close()
        except Exception as error:
            results.append(error)

    worker = threading.Thread(target=work, daemon=True, name="open shard")
    if not _started(worker):
        raise _no_threads(path)
    deadline, refused = time.monotonic() + TIMEOUT, 0
    worker.join(_POLL)
    while worker.is_alive():
        refused = 0 if _started(threading.Thread(target=int, daemon=True)) else refused + 1
        if refused == _REFUSED:
            raise _no_threads(path)
        if time.monotonic() > deadline:
            what = f"the file cannot be opened within {TIMEOUT:g} seconds"
            raise StorageError(what, path, "check the disk or the server that holds it")
        worker.join(_POLL)
    _POOL_STARTED.set()
    if isinstance(result := results[-1], Exception):  # closing may find the damage
        message = one_line(result)
        raise BadDataError(f"the file is damaged: {message}", path, "copy or prepare the dataset again") from result
    return result


def _free_address_space() -> float:
    """Returns the bytes that this process may still map, infinity without a limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not used.exists():
        return float("inf")
    return limit - int(used.read_text().split()[0]) * resource.getpagesize()


def _started(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except (RuntimeError, MemoryError):
        return False
    return True


def _no_threads(path: str) -> DeviceMemoryError:
    return DeviceMemoryError(
        "the reader of datasets cannot start its threads: the limits of this process are too low",
        path,
        "allow 2 GiB more of address space (ulimit -v) and 200 more threads (ulimit -u, or the limit of the container)",
    )
