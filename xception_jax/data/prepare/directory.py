"""Makes the directory of a prepared dataset in such a way that it is complete or has another name.

Everything is written to `<version>.incomplete`, which is renamed at the end: a killed process leaves nothing that looks
complete, and the next one goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from xception_jax.data.sources import is_complete
from xception_jax.errors import StorageError
from xception_jax.files import write_atomically
from xception_jax.names import printable, printable_path

WORK = "unsorted"
"""Subdirectory of an incomplete dataset for the records that are not in their shards yet."""

_SOURCE = ".source"  # file in WORK: identifies what the dataset is made of; no split has such a name
_FORMAT = 1  # increased when the files in WORK, or the division into shards, change


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
