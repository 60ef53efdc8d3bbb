"""Writes files atomically, syncs directories, and computes digests and free space."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
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
    # In the same directory, because a rename is atomic only within a file system.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # must come before the rename, so that the name never refers to missing bytes
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


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
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(f"there is no home directory for {path!r}", where, "give the whole path") from None
