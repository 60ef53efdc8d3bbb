"""Reads and writes the manifest of a directory, a record and the size and SHA-256 of every file, and verifies files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xception_jax.files import sync_directory
from xception_jax.names import printable
from xception_jax.storage import is_url
from xception_jax.training.step_files import files_below, open_file, replace, unreadable

NAME = "manifest.json"

# Errors which say that there is no regular file of this name: a directory, a pipe, a loop of links, an impossible name.
_NOT_A_FILE = (errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG)

# A full Xception has a digest of 0.2 MB. Larger files are not parsed.
_MAX_BYTES = 64 << 20


class DamagedError(Exception):
    """The contents of a directory have changed since they were written. The message is a short reason."""


def write(directory: Path, record: dict[str, Any], known: Mapping[str, Any] | None = None) -> None:
    """Writes the manifest of all files in a directory, and syncs all of them to disk.

    Args:
      directory: the directory, whose files must not change afterwards.
      record: JSON-serializable data, returned by `read`.
      known: results of `measure` for files that need not be read again.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    paths = [path for path in files_below(directory) if not path.name.startswith(NAME)]
    on_disk = not is_url(directory)
    for path in paths if on_disk else []:
        _sync(path)
    # Sync the files, then their directories, then the manifest, so that a manifest that survives a power failure proves
    # that everything else did.
    for subdirectory in {path.parent for path in paths} | {directory, directory.parent} if on_disk else ():
        sync_directory(subdirectory)
    names = {path.relative_to(directory).as_posix(): path for path in paths}
    files = {name: (known or {}).get(name) or measure(path) for name, path in names.items()}
    replace(directory / NAME, sealed({"record": record, "files": files}))


def read(directory: Path) -> dict[str, Any]:
    """Returns the record of a directory.

    Raises:
      DamagedError: the manifest is missing or damaged.
    """
    return read_content(directory / NAME)["record"]


def measure(path: Path) -> dict[str, Any]:
    """Returns the size and the SHA-256 of a file.

    Raises:
      OSError: the file cannot be read, or is not a regular file.
    """
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.seek(0, os.SEEK_END), "sha256": digest}


def compare_files(directory: Path, files: Mapping[str, Any]) -> None:
    """Compares the files of a directory with results of `measure`, by name relative to the directory.

    Raises:
      DamagedError: a file is missing or differs.
      StorageError: a file cannot be read now.
    """
    for name, entry in files.items():
        shown, path = printable(name), directory / name
        with reading(path, shown):
            found = measure(path) if is_url(directory) else {"size": path.stat().st_size}
            if found["size"] != entry["size"]:
                raise DamagedError(f"{shown} has {found['size']} bytes instead of {entry['size']}")
            # A file on a disk is only read if it has the right size.
            if (found.get("sha256") or measure(path)["sha256"]) != entry["sha256"]:
                raise DamagedError(f"the SHA-256 of {shown} differs")


@contextlib.contextmanager
def reading(path: Path, shown: str) -> Iterator[None]:
    """Translates the errors of reading a file. One that cannot be read now is not damaged.

    Args:
      path: the file.
      shown: its name in messages.

    Raises:
      DamagedError: it is missing, is not a regular file, or cannot have this name.
      StorageError: it cannot be read now.
    """
    try:
        yield
    except FileNotFoundError:
        raise DamagedError(f"{shown} is missing") from None
    except OSError as error:
        if error.errno not in _NOT_A_FILE:
            raise unreadable(path, error) from None
        raise DamagedError(f"{shown} cannot be read: {error.strerror}") from None
    except ValueError:  # a NUL or a lone surrogate
        raise DamagedError(f"{shown} is not the name of a file") from None


def sealed(content: Mapping[str, Any]) -> str:
    """Returns an object as JSON with the SHA-256 of its content as a last entry."""
    return json.dumps({**content, "sha256": seal_of(content)}, indent=1) + "\n"


def read_bytes(path: Path) -> bytes:
    """Reads a small file.

    Raises:
      OSError: it cannot be read, or is not a regular file.
      DamagedError: it is larger than any that was written.
    """
    with open_file(path) as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise DamagedError(f"{path.name} has more than {_MAX_BYTES:,} bytes")
    return content


def read_content(path: Path) -> dict[str, Any]:
    """Returns the object that `sealed` wrote, if its record and its files have the expected types.

    Raises:
      DamagedError: the file is missing, is not what was written, or does not describe a directory.
      StorageError: it cannot be read now.
    """
    try:
        with reading(path, path.name):
            data = read_bytes(path)
        content = json.loads(data)
        seal = content.pop("sha256")
        expected = seal_of(content)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):  # not text, JSON or a sealed object
        raise DamagedError(f"{path.name} is not readable as JSON") from None
    if seal != expected:
        raise DamagedError(f"the SHA-256 of {path.name} differs")
    if not _describes_a_directory(content):
        raise DamagedError(f"{path.name} does not describe a checkpoint")
    return content


def _describes_a_directory(content: dict[str, Any]) -> bool:
    record, files = content.get("record"), content.get("files")
    if not isinstance(record, dict) or not isinstance(files, dict):
        return False
    numbers = record.get("metrics", {})
    texts = record.get("identity", {})
    return (
        all(isinstance(part, dict) for part in (numbers, texts, *files.values()))
        and all(isinstance(number, int | float) for number in numbers.values())
        and all(isinstance(text, str) for text in texts.values())
        and all(entry.keys() == {"size", "sha256"} and isinstance(entry["size"], int) for entry in files.values())
    )


def seal_of(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the content of an object, without the entry that `sealed` adds."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    with open_file(path) as file:
        os.fsync(file.fileno())
