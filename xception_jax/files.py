"""Writing files so that a crash leaves the old content or the new one, never a part of either; and their digests."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from pathlib import Path


def sync_directory(directory: str | os.PathLike) -> None:
    """Makes the creation, renaming and removal of files in a directory survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file; who reads it sees the old content or all of the new.

    Args:
      path: the file; its directory must exist.
      content: bytes, or text that is written as UTF-8.

    Raises:
      OSError: it could not be written; the file is as before and nothing is left beside it.
    """
    path = Path(path)
    # In the same directory, because a rename is atomic only within one file system.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # before the rename: a name must not point at bytes that are not there yet
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def free_space(directory: str | os.PathLike) -> str:
    """Returns what room there is for a file, for an error: '1,024 bytes free', and the limit of the process, if any."""
    text = f"{shutil.disk_usage(directory).free:,} bytes free"
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return text if limit == resource.RLIM_INFINITY else f"{text}, files limited to {limit:,} bytes"


def sha256(path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
