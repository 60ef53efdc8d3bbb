"""Verifies that a directory holds the checkpoint that its name says, and sets it aside if it does not."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from xception_jax.errors import BadDataError, StorageError
from xception_jax.names import printable
from xception_jax.parallel import bytes_from_primary
from xception_jax.storage import is_url
from xception_jax.training import digest, manifest
from xception_jax.training.digest import Digest
from xception_jax.training.fingerprint import compare_signatures
from xception_jax.training.manifest import DamagedError
from xception_jax.training.step_files import RUN_ID, exists, open_file, rename, replace
from xception_jax.user_files import parse_json

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
    has_manifest = exists(directory / manifest.NAME)
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


def refuse_other_model(directory: Path, stored: dict[str, str], wanted: dict[str, str]) -> None:
    """Raises BadDataError unless a step holds the expected arrays, given by name as `tree_signature` returns them."""
    differences, table = compare_signatures(stored, wanted)
    if differences:
        raise BadDataError(
            f"checkpoint {directory.name} holds a different model: "
            f"{differences} of {len(stored | wanted)} parameters differ",
            str(directory),
            "use the config that it was trained with, or another work directory",
            table,
        )


def refuse_other_dataset(directory: Path, record: dict[str, Any], now: str | None, classes: str | None = None) -> None:
    """Raises BadDataError if a step was trained on a dataset with other classes, or with another fingerprint.

    Args:
      directory: the directory of the step.
      record: what `Checkpoints.save` recorded.
      now: the fingerprint of the dataset.
      classes: the names of its classes as JSON. The fingerprint does not cover them.
    """
    identity = record.get("identity", {})
    stored, names = identity.get("dataset"), identity.get("classes")
    difference = ""
    if stored and now and stored != now:
        difference = f"fingerprint {stored}, now {now}"
    if names and classes and names != classes:
        difference = _describe_classes(parse_json(names, list), parse_json(classes, list))
    if difference:
        raise BadDataError(
            f"checkpoint {directory.name} was trained on a different dataset: {difference}",
            str(directory),
            "restore the dataset, use another work directory, or set config.checkpoint.allow_dataset_change=True",
        )


def _describe_classes(stored: list[str], now: list[str]) -> str:
    differing = (f"class {n} was {a!r}, now {b!r}" for n, (a, b) in enumerate(zip(stored, now, strict=False)) if a != b)
    return next(differing, f"{len(stored)} classes, now {len(now)}")


def identify_run(directory: Path, steps: Iterable[int], *, write: bool) -> str:
    """Returns the identifier of the run on all processes, if `write` a new one for a new directory.

    Raises:
      OSError: it cannot be written.
      UserError: the store cannot be read or written.
    """
    run, primary = "", jax.process_index() == 0
    if primary:
        run = find_run_id(directory, steps)
    if primary and write:
        run = keep_run_id(directory, run)
    return bytes_from_primary(run.encode()).decode()


def find_run_id(directory: Path, steps: Iterable[int]) -> str:
    """Returns the identifier of the run that saves into a directory, or '' if it is not known.

    It is in a file beside the steps. Without the file, it is the one that most steps name.
    """
    with contextlib.suppress(OSError, ValueError), open_file(directory / RUN_ID) as file:
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
    with contextlib.suppress(FileNotFoundError), open_file(path) as file:
        if file.read(100) == f"{run}\n".encode():
            return run
    replace(path, f"{run}\n")
    return run


@contextlib.contextmanager
def failures_on_all_processes() -> Iterator[None]:
    """Raises a DamagedError or StorageError of any process on every process.

    A collective that all of them must enter. If there are both, a StorageError wins: what cannot be read now may be
    intact.
    """
    own: DamagedError | StorageError | None = None
    try:
        yield
    except (DamagedError, StorageError) as error:
        own = error
    worst = 0 if own is None else 1 if isinstance(own, DamagedError) else 2
    if jax.process_count() > 1:
        worst = int(np.max(multihost_utils.process_allgather(np.asarray(worst))))
    if worst == 2 and not isinstance(own, StorageError):
        what, fix = "another process cannot read a checkpoint", "see its message"
        raise StorageError(what, "the checkpoints", fix).printed_by(False)
    if worst:
        raise own or DamagedError("found by another process")


def set_aside(directory: Path, target: Path, reason: str) -> None:
    """Renames a damaged step and writes the reason into it.

    Raises:
      StorageError: it cannot be renamed.
    """
    try:
        rename(directory, target)
    except OSError as error:
        what = f"a damaged checkpoint ({reason}) cannot be renamed: {error.strerror}"
        raise StorageError(what, str(directory), "rename or delete it") from None
    if is_url(target) or not target.is_symlink():  # the directory that a link refers to may be intact
        with contextlib.suppress(OSError):  # the disk is full
            replace(target / _REASON, reason)


def read_reason(directory: Path) -> str:
    """Returns why a directory was set aside, in one line."""
    with contextlib.suppress(OSError), open_file(directory / _REASON) as file:
        return printable(file.read(1000).decode(errors="replace"))
    return "damaged"
