"""Mirrors a local directory to a store: for files that are appended to, which no object store can do."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType

from xception_jax.errors import StorageError, UserError
from xception_jax.files import free_space
from xception_jax.storage.store import Store

log = logging.getLogger(__name__)

# A file that changed in the last moments may change again within one tick of the clock of the file system, and then has
# the same time and size. It is read again by the next `push`.
_SETTLED_NS = 2_000_000_000
_PREFIX, _LOCK = "xception_jax.", "alive"
_JUST_NOW = 60.0  # seconds


@dataclasses.dataclass(frozen=True)
class _Pushed:
    """Describes the copy of a file in the store.

    Attributes:
      sha256: its digest.
      signature: what `stat` returned for the local file, or None if a later change could have the same.
    """

    sha256: bytes
    signature: tuple[int, int, int] | None


class Mirror:
    """A new local directory, whose files `push` writes to a store.

    Use it as a context manager: it pulls files at the start, pushes at the end, and deletes the local directory. The
    next mirror deletes those of processes that were killed. Files are never deleted from the store. `push` may be
    called from any thread.

    Args:
      store: where the files are kept.
      pulled: names of the files that a resumed run goes on with, if they exist; those that end with a slash are
        directories. Not everything is pulled: checkpoints may be there, or other runs.
      permit: called before files are pushed, and before each; raises a UserError if they may not be. At the end of the
        context, this error is not raised again if it is the one that ends the context.
    """

    def __init__(self, store: Store, pulled: Iterable[str] = (), permit: Callable[[], None] = lambda: None) -> None:
        self._store, self._names_to_pull, self._permit = store, tuple(pulled), permit
        self._pushed: dict[str, _Pushed] = {}
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        _remove_abandoned()
        self._temporary = tempfile.TemporaryDirectory(prefix=_PREFIX)
        self._alive = _hold(Path(self._temporary.name, _LOCK))
        # Under the name that it has in the store, which trackers show.
        name = store.root.rpartition("/")[2].encode()[:100].decode(errors="ignore")
        self.directory = Path(self._temporary.name, "directory", name)
        self.directory.mkdir(parents=True)

    def __enter__(self) -> Mirror:
        """Pulls files."""
        try:
            self._pull()
        except BaseException:
            self._delete()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Pushes what has changed. A failure does not replace an exception that is already propagating.

        Nothing is pushed if the exception says that the store does not answer, because that takes a while.
        """
        try:
            if not (isinstance(error, StorageError) and error.where.startswith(self._store.root)):
                self.push()
        except UserError as lost:
            if error is None:
                raise
            if str(lost) != str(error):
                log.warning("%s", lost)
        finally:
            self._delete()

    def _delete(self) -> None:
        self._temporary.cleanup()
        os.close(self._alive)

    def _pull(self) -> None:
        """Reads files from the store.

        Names that lead out of the directory, or that no file can have, are left alone with a warning.

        Raises:
          UserError: the store cannot be read.
          StorageError: the local disk is full.
        """
        for entry in self._names_to_pull:
            for name in self._store.list(entry) if entry.endswith("/") else [entry]:
                if not name.endswith("/"):  # some clients create such objects to show empty directories
                    self._pull_file(name)

    def _pull_file(self, name: str) -> None:
        path = _local_path(self.directory, name)
        if path is None:
            log.warning("%s: %r is not mirrored", self._store.root, name)
            return
        content = self._store.read(name)
        if content is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):  # a store can have both `a` and `a/b`
            log.warning("%s: %r is not mirrored, because it is a directory as well", self._store.root, name)
        except OSError as error:
            raise StorageError(
                f"the local copy cannot be written: {error.strerror}",
                f"{path}; {free_space(self.directory)}",
                "set TMPDIR to a directory with more space",
            ) from None
        else:
            self._pushed[name] = _Pushed(hashlib.sha256(content).digest(), None)

    def push(self) -> None:
        """Writes the files that have changed since the last call, each as a whole.

        Call it before a checkpoint is saved: a resumed run does not write again what came before its checkpoint.

        Raises:
          UserError: the store cannot be written. Files that were not yet written are tried by the next call.
        """
        with self._lock:
            self._permit()
            for name, path in self._files():
                self._push(name, path)

    def _push(self, name: str, path: Path) -> None:
        before = self._pushed.get(name)
        try:
            signature = _signature(path)  # must come before reading: what is written meanwhile is found next time
            if before is not None and before.signature == signature:
                return
            content = path.read_bytes()
        except FileNotFoundError:  # renamed or deleted since it was listed
            return
        digest = hashlib.sha256(content).digest()
        if before is None or before.sha256 != digest:
            self._permit()  # again: the file before may have taken long enough for another run to take over
            self._store.put(name, content)
        settled = time.time_ns() - signature[1] > _SETTLED_NS
        self._pushed[name] = _Pushed(digest, signature if settled else None)

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yields name and path of the regular files in order. Links are not followed."""
        for folder, folders, files in os.walk(self.directory):
            folders.sort()
            for file in sorted(files):
                path = Path(folder, file)
                name = path.relative_to(self.directory).as_posix()
                # `.tmp` are those of `write_atomically`.
                if name.endswith(".tmp") or path.is_symlink() or not path.is_file():
                    continue
                if name.isprintable():  # bytes that are not UTF-8 are surrogates here, which are not printable
                    yield name, path
                elif name not in self._warned:
                    self._warned.add(name)
                    log.warning("%r is not mirrored, because no object can have this name", name)


def _hold(path: Path) -> int:
    """Creates and locks a file that tells others that this process lives, and returns its descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_abandoned() -> None:
    """Deletes the local directories of this user whose processes were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the process lives
                status = os.fstat(descriptor)
                # A process that has just created the file may not have locked it yet.
                is_old = time.time() - status.st_mtime > _JUST_NOW
                if is_old and status.st_uid == os.geteuid() and not path.parent.is_symlink():
                    shutil.rmtree(path.parent, ignore_errors=True)
            finally:
                os.close(descriptor)


def _signature(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _local_path(directory: Path, name: str) -> Path | None:
    """Returns the path for a name, or None if it would not be a file in this directory."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > 255 for part in parts):
        return None
    return directory.joinpath(*parts)
