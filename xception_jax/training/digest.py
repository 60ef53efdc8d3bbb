"""Commits with each checkpoint what it contains: its step and run, and the SHA-256 of every array and file.

Orbax commits the digest in the same rename as the state, so there is no checkpoint without one. Files are verified
before Orbax parses them, and arrays after it has read them, however they are sharded by then.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from xception_jax.parallel import whole
from xception_jax.training import manifest, step_files
from xception_jax.training.fingerprint import named_leaves
from xception_jax.training.manifest import DamagedError
from xception_jax.training.step_files import COMMITTED, step_path

STATE, ITEM = "default", "digest"  # the items of a checkpoint, which are its subdirectories
NAME = f"{ITEM}.json"

_STEP_METADATA = "_CHECKPOINT_METADATA"
_COMMIT_TIME = "commit_timestamp_nsecs"  # Orbax adds it when the digest has been written


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an array, on the host.

    Attributes:
      name: name of the whole array.
      shape: its shape.
      index: where the part is in it.
      values: the part.
    """

    name: str
    shape: Sequence[int]
    index: Sequence[slice]
    values: np.ndarray

    def place(self) -> str:
        """Returns where the part is, such as '0:256,0:64'."""
        places = zip(self.index, self.shape, strict=True)
        return ",".join("{}:{}".format(*part.indices(size)) for part, size in places)

    def signature(self) -> str:
        """Returns the dtype and shape of the whole array, as `tree_signature` does."""
        return f"{self.values.dtype}{list(self.shape)}"

    def digest(self) -> str:
        """Returns the SHA-256 over name, dtype, shape, place and bits."""
        digest = hashlib.sha256(f"{self.name} {self.signature()} {self.place()}\n".encode())
        digest.update(np.ascontiguousarray(self.values).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def host_parts(state: Any) -> list[Part]:
    """Returns the parts of a state that this process is the first to hold. The parts of all processes make the state.

    Orbax then uses the same host copies, so that on one device nothing is transferred twice.
    """
    found: list[tuple[str, Sequence[int], Sequence[slice], Any]] = []
    for name, leaf in named_leaves(state).items():
        if not isinstance(leaf, jax.Array):
            if jax.process_index() == 0:
                found.append((name, np.shape(leaf), (slice(None),) * np.ndim(leaf), leaf))
        elif len(leaf.sharding.device_set) == 1:
            found.append((name, leaf.shape, (slice(None),) * leaf.ndim, leaf))
        else:
            found += [(name, leaf.shape, s.index, s.data) for s in leaf.addressable_shards if s.replica_id == 0]
    for _, _, _, values in found:
        if isinstance(values, jax.Array):
            values.copy_to_host_async()
    return [Part(name, shape, index, np.asarray(values)) for name, shape, index, values in found]


@dataclasses.dataclass(frozen=True)
class Digest:
    """The digest of a checkpoint.

    Attributes:
      record: what `Checkpoints.save` recorded, with `step` and `run`.
      arrays: {name: {'array': dtype and shape, 'parts': {index: SHA-256}}}.
      files: results of `manifest.measure` for all files, except the digest and the metadata that Orbax keeps.
      metadata: SHA-256 of that metadata, without the time of the commit, which is not known before.
    """

    record: dict[str, Any]
    arrays: dict[str, Any]
    files: dict[str, Any]
    metadata: str

    def verify_files(self, directory: Path) -> None:
        """Raises DamagedError if a file of a step differs or is missing."""
        manifest.compare_files(directory, self.files)
        if _metadata(directory) != self.metadata:
            raise DamagedError(f"{_STEP_METADATA} differs from what was saved")

    def agrees_with(self, content: dict[str, Any]) -> bool:
        """Returns whether a manifest has the same record and the same files of the state."""
        files = {name: entry for name, entry in self.files.items() if name.startswith(f"{STATE}/")}
        same_record = json.dumps(content["record"]) == json.dumps(self.record)  # a NaN is not equal to itself
        return same_record and files == {name: content["files"].get(name) for name in files}

    def verify_arrays(self, state: Any) -> None:
        """Raises DamagedError if a restored state differs. With several processes, this is a collective."""
        leaves = named_leaves(state)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            # All leaves, because with several processes `whole` is a collective. The main thread calls it, in order.
            problems = list(pool.map(self._problem, leaves, map(whole, leaves.values())))
        if len(self.arrays) != len(leaves):
            problems.append(f"{NAME} describes {len(self.arrays)} arrays instead of {len(leaves)}")
        if problem := next(filter(None, problems), None):
            raise DamagedError(problem)

    def _problem(self, name: str, values: np.ndarray) -> str | None:
        """Returns what is wrong with an array, if anything."""
        try:
            entry = self.arrays[name]
            indices = {index: _slices(index) for index in entry["parts"]}
            parts = {index: Part(name, values.shape, found, values[found]) for index, found in indices.items()}
            same = entry["array"] == f"{values.dtype}{list(values.shape)}" and all(
                part.digest() == entry["parts"][index] for index, part in parts.items()
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            return f"{NAME} does not describe {name}"
        complete = bool(parts) and sum(part.values.size for part in parts.values()) == values.size
        return None if same and complete else f"the SHA-256 of the array {name} differs"


def exists(directory: Path) -> bool:
    """Returns whether a step has a digest. Steps saved by earlier versions do not."""
    return step_files.exists(directory / ITEM / NAME)


def read(directory: Path) -> Digest:
    """Reads the digest of a step.

    Raises:
      DamagedError: it is missing or damaged.
    """
    content = manifest.read_content(directory / ITEM / NAME)
    fields: dict[str, Any] = {field.name: content.get(field.name) for field in dataclasses.fields(Digest)}
    if not isinstance(fields["arrays"], dict):
        raise DamagedError(f"{NAME} does not describe a checkpoint")
    return Digest(**fields)


def _slices(index: str) -> tuple[slice, ...]:
    if not re.fullmatch(r"(\d{1,15}:\d{1,15}(,|$))*", index):
        raise ValueError(index)
    return tuple(slice(*map(int, part.split(":"))) for part in index.split(",") if part)


def _metadata(directory: Path) -> str:
    """Returns the SHA-256 of the metadata of a step, without the time of its commit."""
    try:
        with manifest.reading(directory / _STEP_METADATA, _STEP_METADATA):
            data = manifest.read_bytes(directory / _STEP_METADATA)
        content = json.loads(data)
        content.pop(_COMMIT_TIME, None)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise DamagedError(f"{_STEP_METADATA} is not readable as JSON") from None


def _notes_to_come(step: Path) -> dict[str, Any]:
    """Returns size and SHA-256 of the notes that Orbax writes when it commits the digest and the step."""
    path, place = step / STATE / COMMITTED, str(step / STATE)
    note = manifest.read_bytes(path).decode() if step_files.exists(path) else ""
    if place not in note:  # another version of Orbax
        return {}
    final = step.with_name(step.name.partition(".")[0])
    notes = {f"{ITEM}/{COMMITTED}": str(step / ITEM), COMMITTED: str(final)}
    contents = {name: note.replace(place, there).encode() for name, there in notes.items()}
    return {name: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}


class DigestHandler(ocp.AsyncCheckpointHandler):
    """Writes the digest of a state as an item of its checkpoint. It must be registered after the item of the state."""

    async def async_save(self, directory: Any, args: Any) -> list[ocp.future.Future]:
        """Hashes in the background, while Orbax writes the arrays."""
        self._record = args.record
        hashing = self._write_part(step_path(directory), args.parts)
        return [ocp.future.CommitFutureAwaitingContractedSignals(hashing, name=ITEM)]

    async def _write_part(self, directory: Path, parts: list[Part]) -> None:
        arrays: dict[str, Any] = {}
        for part in parts:
            arrays.setdefault(part.name, {"array": part.signature(), "parts": {}})["parts"][part.place()] = (
                part.digest()
            )
        step_files.replace(directory / f"process_{jax.process_index()}.json", json.dumps(arrays))

    def finalize(self, directory: Any) -> None:
        """Merges the parts of all processes. Orbax calls this on process 0 when the state is complete."""
        directory = step_path(directory)
        arrays: dict[str, Any] = {}
        for path in step_files.files_below(directory):
            if not re.fullmatch(r"process_\d+\.json", path.name):
                continue
            for name, entry in json.loads(manifest.read_bytes(path)).items():
                arrays.setdefault(name, entry)["parts"] |= entry["parts"]
            step_files.delete(path)
        step = directory.parent
        files = {path.relative_to(step).as_posix(): path for path in step_files.files_below(step / STATE)}
        content = Digest(
            record=self._record,
            arrays=arrays,
            files={name: manifest.measure(path) for name, path in files.items()} | _notes_to_come(step),
            metadata=_metadata(step),
        )
        step_files.replace(directory / NAME, manifest.sealed(dataclasses.asdict(content)))

    def save(self, directory: Any, args: Any) -> None:
        """Refuses: Orbax calls `async_save`, but its interface requires this method."""
        raise NotImplementedError

    def restore(self, directory: Any, args: Any = None) -> Digest:
        """Reads the digest."""
        return read(step_path(directory).parent)


@ocp.args.register_with_handler(DigestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DigestArgs(ocp.args.CheckpointArgs):
    """What `DigestHandler` saves: the record of the step, and the parts of its state on this process."""

    record: dict[str, Any]
    parts: list[Part]
