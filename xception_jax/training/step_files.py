"""Reads and writes the files of checkpoints, on a disk or in a bucket.

A store that cannot be reached, or a disk that fails to read, raises a `UserError`, which is never taken for a damaged
file.
"""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from xception_jax.errors import StorageError, WorkdirError
from xception_jax.files import open_regular, write_atomically
from xception_jax.names import printable
from xception_jax.storage import Store, is_url, open_store
from xception_jax.storage.paths import parse

COMMITTED = "commit_success.txt"
"""In a bucket, the object that Orbax writes last into a step."""
_OF_A_STEP = ("default/", "digest/", "_CHECKPOINT_METADATA", "manifest.json", "damage.txt", COMMITTED)
RUN_ID = "run_id"
"""The file beside the steps that identifies the run."""


def step_path(path: Any) -> Path:
    """Returns a path with the interface of pathlib, for a local path or an address. Only names are taken from it."""
    return epath.Path(path) if is_url(path) else Path(path)


@functools.cache
def _store(bucket: str) -> Store:
    return open_store(bucket, "checkpoints")


def _find(path: Path) -> tuple[Store, str]:
    """Returns the store of a bucket, and the name of an object in it."""
    place = parse(os.fspath(path), "checkpoints")
    return _store(f"{place.scheme}://{place.bucket}"), place.path


def open_file(path: Path) -> io.BufferedReader | io.BytesIO:
    """Opens a file for reading.

    Raises:
      OSError: it is missing, cannot be opened, or is not a regular file.
      UserError: the store cannot be read.
    """
    if not is_url(path):
        return open_regular(path)
    store, name = _find(path)
    content = store.read(name)
    if content is None:
        raise FileNotFoundError(os.fspath(path))
    return io.BytesIO(content)


def replace(path: Path, content: str) -> None:
    """Replaces a file atomically.

    Raises:
      OSError: it could not be written to a disk.
      UserError: it could not be written to a store.
    """
    if is_url(path):
        store, name = _find(path)
        store.put(name, content)
    else:
        write_atomically(path, content)


def exists(path: Path) -> bool:
    """Returns whether there is a file, or a link to one.

    Raises:
      StorageError: the file system does not say.
    """
    if is_url(path):
        store, name = _find(path)
        return store.exists(name)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from None
    return True


def unreadable(path: Path, error: OSError) -> StorageError:
    """Returns what to raise for a file that cannot be read now, which does not mean that it is damaged."""
    return StorageError(
        f"a checkpoint cannot be read: {error.strerror or error}",
        os.fspath(path),
        "check disk, network and permissions, then run the same command again; no checkpoint was changed",
    )


def delete(path: Path) -> None:
    """Deletes a file, if it exists."""
    if is_url(path):
        store, name = _find(path)
        store.delete(name)
    else:
        path.unlink(missing_ok=True)


def files_below(directory: Path) -> list[Path]:
    """Returns the files in a directory and below it, sorted."""
    if not is_url(directory):
        return sorted(path for path in directory.rglob("*") if path.is_file())
    store, name = _find(directory)
    return [directory / found.removeprefix(f"{name}/") for found in store.list(f"{name}/")]


def rename(directory: Path, target: Path) -> None:
    """Renames a step. In a bucket, one of both is complete at any time."""
    if is_url(directory):
        store, name = _find(directory)
        store.move_prefix(f"{name}/", f"{_find(target)[1]}/", first=COMMITTED)
    else:
        directory.rename(target)


def delete_step(directory: Path) -> None:
    """Deletes a step from a bucket. What makes it look complete is deleted first."""
    store, name = _find(directory)
    store.delete_prefix(f"{name}/", first=COMMITTED)


def prepare_bucket(directory: Path, prove: Callable[[], None]) -> None:
    """Deletes the steps of a bucket that were not committed, and makes sure that there is at least one object.

    A directory in a bucket exists only as long as an object in it does.

    Args:
      directory: the directory of the checkpoints.
      prove: called before each step is deleted; raises an error if another run owns the directory by now.

    Raises:
      WorkdirError: a directory whose name is a number holds an object that no run of this package writes.
    """
    store, name = _find(directory)
    names = [found.removeprefix(f"{name}/") for found in store.list(f"{name}/")]
    steps = {found.partition("/")[0] for found in names if re.match(r"\d+/", found)}
    uncommitted = sorted(step for step in steps if f"{step}/{COMMITTED}" not in names)
    for found in names:
        step, _, rest = found.partition("/")
        if step in uncommitted and not rest.startswith(_OF_A_STEP):
            what = f"the checkpoints are not those of this package: they include {printable(found)}"
            raise WorkdirError(what, os.fspath(directory), "choose another work directory, or move this one away")
    for step in uncommitted:
        prove()
        store.delete_prefix(f"{name}/{step}/")
    if RUN_ID not in names:
        store.put(f"{name}/{RUN_ID}", "")  # not yet known; `find_run_id` ignores this
