"""Reads, writes and verifies the manifest of a directory: a record, and the size and SHA-256 of every file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from xception_jax.files import sha256, sync_directory, write_atomically

NAME = "manifest.json"


class DamagedError(Exception):
    """The contents of a directory have changed since they were written. The message is a short reason."""


def write(directory: Path, record: dict[str, Any]) -> None:
    """Writes the manifest of all files in a directory, and syncs all of them to disk.

    Args:
      directory: the directory, whose files must not change afterwards.
      record: JSON-serializable data, returned by `read`.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(NAME))
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": _synced_digest(path)}
        for path in paths
    }
    # Sync the files, then their directories, then the manifest, so that a manifest that survives a power failure proves
    # that everything else did.
    for subdirectory in {path.parent for path in paths} | {directory, directory.parent}:
        sync_directory(subdirectory)
    content = {"record": record, "files": files}
    write_atomically(directory / NAME, json.dumps(content | {"sha256": _seal(content)}, indent=1) + "\n")


def read(directory: Path) -> dict[str, Any]:
    """Returns the record of a directory.

    Raises:
      DamagedError: the manifest is missing or damaged.
    """
    return _read(directory)["record"]


def verify(directory: Path) -> None:
    """Reads every file in the manifest and compares its size and SHA-256.

    Raises:
      DamagedError: the manifest is missing or damaged, or a file is missing or differs.
    """
    for name, entry in _read(directory)["files"].items():
        path = directory / name
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                raise DamagedError(f"{name} has {size} bytes instead of {entry['size']}")
            if sha256(path) != entry["sha256"]:
                raise DamagedError(f"the SHA-256 of {name} differs")
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror}") from None


def _read(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads((directory / NAME).read_bytes())
        seal = content.pop("sha256")
    except FileNotFoundError:
        raise DamagedError(f"{NAME} is missing") from None
    except OSError as error:
        raise DamagedError(f"{NAME} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError):  # not text, not JSON, or not an object with a digest
        raise DamagedError(f"{NAME} is not readable as JSON") from None
    if seal != _seal(content):
        raise DamagedError(f"the SHA-256 of {NAME} differs")
    return content


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _synced_digest(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)
