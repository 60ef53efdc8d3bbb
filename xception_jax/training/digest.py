"""Commits with each checkpoint what it contains: its step and run, and the SHA-256 of every array and file.

Orbax commits the digest in the same rename as the state, so there is no checkpoint without one. Files are verified
before Orbax parses them, and arrays after it has read them, however they are sharded by then.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from xception_jax.training import manifest
from xception_jax.training.fingerprint import named_leaves, tree_signature, whole
from xception_jax.training.manifest import DamagedError

STATE, ITEM = "default", "digest"  # the items of a checkpoint, which are its subdirectories
NAME = f"{ITEM}.json"

_STEP_METADATA = "_CHECKPOINT_METADATA"
_COMMIT_TIME = "commit_timestamp_nsecs"  # Orbax adds it when the digest has been written


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an array, on the host.

    Attributes:
      name: name of the whole array.
      signature: its dtype and shape, such as 'float32[512, 64]'.
      index: where the part is in it, such as '0:256,0:64'.
      values: the part.
    """

    name: str
    signature: str
    index: str
    values: np.ndarray

    def digest(self) -> str:
        """Returns the SHA-256 over name, dtype, shape, position and bits."""
        digest = hashlib.sha256(f"{self.name} {self.signature} {self.index}\n".encode())
        digest.update(np.ascontiguousarray(self.values).reshape(-1).view(np.uint8))
        return digest.hexdigest()


def host_parts(state: Any) -> list[Part]:
    """Returns the parts of a state that this process is the first to hold. The parts of all processes make the state.

    Orbax then uses the same host copies, so that nothing is transferred twice on one device.
    """
    signatures, found = tree_signature(state), []
    for name, leaf in named_leaves(state).items():
        if isinstance(leaf, jax.Array):
            found += [(name, _index(s.index, leaf.shape), s.data) for s in leaf.addressable_shards if s.replica_id == 0]
        elif jax.process_index() == 0:
            found.append((name, _index((slice(None),) * np.ndim(leaf), np.shape(leaf)), leaf))
    for _, _, values in found:
        if isinstance(values, jax.Array):
            values.copy_to_host_async()
    return [Part(name, signatures[name], index, np.asarray(values)) for name, index, values in found]


def _index(index: Sequence[slice], shape: Sequence[int]) -> str:
    return ",".join("{}:{}".format(*part.indices(size)) for part, size in zip(index, shape, strict=True))


@dataclasses.dataclass(frozen=True)
class Digest:
    """The digest of a checkpoint.

    Attributes:
      record: what `Checkpoints.save` recorded, with `step` and `run`.
      arrays: {name: {'array': dtype and shape, 'parts': {index: SHA-256}}}.
      files: results of `manifest.measure` for the files of the state.
      metadata: SHA-256 of the metadata that Orbax keeps of the step.
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

    def verify_arrays(self, state: Any) -> None:
        """Raises DamagedError if a restored state differs. With several processes, this is a collective."""
        signatures = tree_signature(state)
        # All leaves, because with several processes each may be a collective.
        problems = [self._problem(name, signatures[name], whole(leaf)) for name, leaf in named_leaves(state).items()]
        if len(self.arrays) != len(signatures):
            problems.append(f"{NAME} describes {len(self.arrays)} arrays instead of {len(signatures)}")
        if problem := next(filter(None, problems), None):
            raise DamagedError(problem)

    def _problem(self, name: str, signature: str, values: np.ndarray) -> str | None:
        """Returns what is wrong with an array, if anything."""
        try:
            entry = self.arrays[name]
            parts = [Part(name, entry["array"], index, values[_slices(index)]) for index in entry["parts"]]
            found = {part.index: part.digest() for part in parts}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            return f"{NAME} does not describe {name}"
        complete = bool(parts) and sum(part.values.size for part in parts) == values.size
        same = complete and found == entry["parts"] and signature == entry["array"]
        return None if same else f"the SHA-256 of the array {name} differs"


def exists(directory: Path) -> bool:
    """Returns whether a step has a digest. Steps saved by earlier versions do not."""
    return (directory / ITEM / NAME).exists()


def read(directory: Path) -> Digest:
    """Reads the digest of a step.

    Raises:
      DamagedError: it is missing or damaged.
    """
    content = manifest.read_sealed(directory / ITEM / NAME)
    fields = {field.name: content.get(field.name) for field in dataclasses.fields(Digest)}
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
        content = json.loads((directory / _STEP_METADATA).read_bytes())
        content.pop(_COMMIT_TIME, None)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()
    except OSError as error:
        raise DamagedError(f"{_STEP_METADATA} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise DamagedError(f"{_STEP_METADATA} is not readable as JSON") from None


class DigestHandler(ocp.AsyncCheckpointHandler):
    """Writes the digest of a state as an item of its checkpoint. It must be registered after the item of the state."""

    async def async_save(self, directory: Any, args: Any) -> list[ocp.future.Future]:
        """Hashes in the background, while Orbax writes the arrays."""
        self._record = args.record
        hashing = self._write_part(Path(directory), args.parts)
        return [ocp.future.CommitFutureAwaitingContractedSignals(hashing, name=ITEM)]

    async def _write_part(self, directory: Path, parts: list[Part]) -> None:
        arrays: dict[str, Any] = {}
        for part in parts:
            arrays.setdefault(part.name, {"array": part.signature, "parts": {}})["parts"][part.index] = part.digest()
        (directory / f"process_{jax.process_index()}.json").write_text(json.dumps(arrays))

    def finalize(self, directory: Any) -> None:
        """Merges the parts of all processes. Orbax calls this on process 0 when the state is complete."""
        directory, arrays = Path(directory), {}
        for path in sorted(directory.glob("process_*.json")):
            for name, entry in json.loads(path.read_text()).items():
                arrays.setdefault(name, entry)["parts"] |= entry["parts"]
            path.unlink()
        step = directory.parent
        files = {path.relative_to(step).as_posix(): path for path in manifest.files_below(step / STATE)}
        content = Digest(
            record=self._record,
            arrays=arrays,
            files={name: manifest.measure(path) for name, path in files.items()},
            metadata=_metadata(step),
        )
        (directory / NAME).write_text(manifest.sealed(dataclasses.asdict(content)))

    def save(self, directory: Any, args: Any) -> None:
        """Refuses: Orbax calls `async_save`, but its interface requires this method."""
        raise NotImplementedError

    def restore(self, directory: Any, args: Any = None) -> Digest:
        """Reads the digest."""
        return read(Path(directory).parent)


@ocp.args.register_with_handler(DigestHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class DigestArgs(ocp.args.CheckpointArgs):
    """What `DigestHandler` saves: the record of the step, and the parts of its state on this process."""

    record: dict[str, Any]
    parts: list[Part]
