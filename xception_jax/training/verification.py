"""Verifies that a directory holds the checkpoint that its name says, and sets it aside if it does not."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from xception_jax.errors import StorageError
from xception_jax.files import open_regular, write_atomically
from xception_jax.names import printable
from xception_jax.training import digest, manifest
from xception_jax.training.digest import Digest
from xception_jax.training.manifest import DamagedError

RUN_ID = "run_id"
_RUN = re.compile("[0-9a-f]{32}")
_REASON = "damage.txt"  # says why a directory was set aside


@dataclasses.dataclass(frozen=True)
class Verified:
    """A step whose files are as they were saved.

    Attributes:
      record: what `Checkpoints.save` recorded.
      digest: the digest to compare the restored arrays with, or None for a step of an earlier version.
      has_manifest: whether there is a manifest. A run that is killed just after a commit leaves none.
    """

    record: dict[str, Any]
    digest: Digest | None
    has_manifest: bool


def verify_step(directory: Path, step: int, run: str, *, read_files: bool) -> Verified:
    """Verifies a step by its manifest and its digest, or by one of them if the other is not there.

    Args:
      directory: the directory of the step.
      step: the step that its name says.
      run: the identifier of the run, or '' if the directory of the checkpoints has none.
      read_files: whether to read all files. With several processes, one of them does this.

    Raises:
      DamagedError: a file or the record differs, or there is neither a manifest nor a digest.
    """
    has_manifest = os.path.lexists(directory / manifest.NAME)
    if not has_manifest and not digest.exists(directory):
        raise DamagedError("it has neither a manifest nor a digest to verify it with")
    content = manifest.read_content(directory / manifest.NAME) if has_manifest else {}
    if read_files and has_manifest:
        manifest.compare_files(directory, content["files"])
    found = digest.read(directory) if digest.exists(directory) else None
    if read_files and found is not None and not has_manifest:
        found.verify_files(directory)
    if found is not None and has_manifest and not found.agrees_with(content):
        raise DamagedError(f"{manifest.NAME} and {digest.NAME} differ")
    record = content["record"] if found is None else found.record
    if record.get("step") != step:
        raise DamagedError(f"it holds the state of step {printable(record.get('step'), 40)}")
    if run and record.get("run", run) != run:  # earlier versions did not record the run
        raise DamagedError("it was saved by another run")
    return Verified(record, found, has_manifest)


def find_run_id(directory: Path, steps: Iterable[int]) -> str:
    """Returns the identifier of the run that saves into a directory, or '' if it is not known.

    It is in a file beside the steps. Without the file, it is the one that most steps name.
    """
    with contextlib.suppress(OSError, ValueError), open_regular(directory / RUN_ID) as file:
        text = file.read(100).decode().strip()
        if _RUN.fullmatch(text):
            return text
    named = collections.Counter[str]()
    for step in sorted(steps):
        with contextlib.suppress(DamagedError):
            named[str(digest.read(directory / str(step)).record.get("run"))] += 1
    return next((run for run, _ in named.most_common() if _RUN.fullmatch(run)), "")


def keep_run_id(directory: Path, run: str) -> str:
    """Writes the identifier of the run, a new one if it is '', and returns it.

    Raises:
      OSError: it cannot be written.
    """
    run = run or uuid.uuid4().hex
    path = directory / RUN_ID
    if not path.is_file() or path.read_bytes() != f"{run}\n".encode():
        write_atomically(path, f"{run}\n")
    return run


@contextlib.contextmanager
def damage_on_all_processes() -> Iterator[None]:
    """Raises a DamagedError of any process on every process. A collective that all of them must enter."""
    reason = ""
    try:
        yield
    except DamagedError as error:
        reason = str(error)
    found = bool(reason)
    if jax.process_count() > 1:
        found = bool(np.any(multihost_utils.process_allgather(np.asarray(found))))
    if found:
        raise DamagedError(reason or "found by another process")


def set_aside(directory: Path, target: Path, reason: str) -> None:
    """Renames a damaged step and writes the reason into it.

    Raises:
      StorageError: it cannot be renamed.
    """
    try:
        directory.rename(target)
    except OSError as error:
        what = f"a damaged checkpoint ({reason}) cannot be renamed: {error.strerror}"
        raise StorageError(what, str(directory), "rename or delete it") from None
    if not target.is_symlink():  # the directory that a link refers to may be intact
        with contextlib.suppress(OSError):  # the disk is full
            write_atomically(target / _REASON, reason)


def read_reason(directory: Path) -> str:
    """Returns why a directory was set aside, in one line."""
    with contextlib.suppress(OSError), open_regular(directory / _REASON) as file:
        return printable(file.read(1000).decode(errors="replace"))
    return "damaged"
