"""Writes files atomically, syncs directories, and computes digests and free space."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import resource
import secrets
import shutil
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from xception_jax.errors import ConfigError


def sync_directory(directory: str | os.PathLike) -> None:
    """Syncs a directory, so that created, renamed and removed files in it survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file atomically: after a crash it has either the old or the new content.

    Args:
      path: the file, in an existing directory.
      content: bytes, or text to encode as UTF-8.

    Raises:
      OSError: the file could not be written. It is unchanged, and no temporary file is left.
    """
    path = Path(path)
    # In the same directory, because a rename is atomic only within a file system. The name is cut, because it grows.
    temporary = path.with_name(f"{path.name[:50]}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            # Tells `remove_leftovers` that the writer is alive; the kernel releases it when the process ends.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):  # there is no such file, or a file system without modes
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # must come before the rename, so that the name never refers to missing bytes
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


# Names of temporary files of `write_atomically`, now and in earlier versions, whose names are less peculiar.
_TEMPORARY = re.compile(r".+\.(\d+)\.[0-9a-f]{16}\.tmp", re.DOTALL)
_EARLIER = re.compile(r"(?:[a-z_]+\.(?:json|jsonl|html|npz|txt|csv|md|svg)|run_id|wandb_id)\.(\d+)\.tmp")
_JUST_NOW = 60.0  # seconds


def remove_leftovers(directories: Iterable[Path]) -> None:
    """Deletes the temporary files of `write_atomically` whose writers were killed. Leaves all others, and links.

    Args:
      directories: where to look, not below them. They need not exist.
    """
    for directory in directories:
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in list(entries):
                match = _TEMPORARY.fullmatch(entry.name) or _EARLIER.fullmatch(entry.name)
                if match and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(OSError):
                        _remove_if_abandoned(Path(entry.path), int(match[1]))


def _remove_if_abandoned(path: Path, pid: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the writer is alive, on any host
        # A process that has just created the file may not have locked it yet, and an earlier version does not lock it.
        # An old file of a living process is that of a dead one with the same number.
        if not _is_alive(pid) or time.time() - os.fstat(descriptor).st_mtime > _JUST_NOW:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # a process of another user
    except (OSError, OverflowError):
        return False
    return pid > 0


_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def compression_of(start: bytes) -> str:
    """Returns what compressed a file that begins with these bytes: 'gzip', 'bzip2', 'xz' or 'zstd'; '' for nothing."""
    return next((name for magic, name in _COMPRESSIONS.items() if start.startswith(magic)), "")


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a regular file. A pipe or a device, which could block or go on forever, is refused.

    Raises:
      OSError: the file cannot be opened, or is not a regular file.
    """
    try:
        _require_regular(os.stat(path), path)  # because opening a device can have effects
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null byte
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from None
    try:
        _require_regular(os.fstat(descriptor), path)  # it may have been exchanged in between
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _require_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory", os.fspath(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))


def free_space(directory: str | os.PathLike) -> str:
    """Describes the free space for an error message: '1,024 bytes free', and the file size limit, if there is one."""
    text = f"{shutil.disk_usage(directory).free:,} bytes free"
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return text if limit == resource.RLIM_INFINITY else f"{text}, files limited to {limit:,} bytes"


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_directory(path: str, where: str) -> Path:
    """Returns the absolute path of a directory on a file system.

    Args:
      path: a path; ~ is the home directory.
      where: the flag or field that gave it, for the error.

    Raises:
      ConfigError: the path is empty, is the address of an object store, or begins with ~ and there is no such home.
    """
    if not path or "://" in path:
        what = "is not supported: locks and renames need a file system" if path else "is empty"
        raise ConfigError(f"the directory {path!r} {what}", where, "use a local directory")
    return expanded(path, where).absolute()


def expanded(path: str, where: str) -> Path:
    """Returns a path with the home directory in place of ~ or ~USER.

    Args:
      path: a path.
      where: the flag or field that gave it, for the error.

    Raises:
      ConfigError: there is no such user, or this user has no home directory, as in a container that runs as a number.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"there is no home directory for {path!r}", where, "give the whole path") from None
