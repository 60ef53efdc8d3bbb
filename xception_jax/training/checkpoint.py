"""Manages checkpoints: Orbax writes them, and a manifest proves that they are intact.

Orbax restores a flipped bit without an error, so every file is verified against the manifest. The order of a save must
hold, because the process may be killed at any point: Orbax writes `<step>.orbax-checkpoint-tmp` and renames it to
`<step>`; the digests of the files are written to `<step>/manifest.json`; the step is reported as saved.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from xception_jax.errors import BadDataError, InputMissingError, StorageError
from xception_jax.files import free_space, write_atomically
from xception_jax.training import manifest
from xception_jax.training.fingerprint import compare_signatures, tree_fingerprint, tree_signature, versions
from xception_jax.training.manifest import DamagedError
from xception_jax.training.preservation import LatestOrBest

_REASON = "damage.txt"  # says why a directory was set aside

# Orbax logs each error with its traceback before raising it, and warns about files that it did not write. This module
# raises everything that concerns the user, as a UserError.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def _from_primary(value: int) -> int:
    """Returns the value of process 0 on every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@dataclasses.dataclass
class _Pending:
    """A save in progress: its step, its size, and a future that completes when its manifest is on disk."""

    step: int
    num_bytes: int
    future: concurrent.futures.Future


class Checkpoints:
    """Saves and restores the checkpoints of a run, in `<directory>/<step>/` on a file system shared by all processes.

    With several processes, every method except `poll` is a collective that all of them must call. Use it as a context
    manager or call `close`; otherwise a save in progress is lost at exit.

    Args:
      directory: parent of the checkpoint directories; created if missing.
      keep_latest: number of newest steps to keep, at least 1.
      keep_best: number of steps with the best `best_metric` to keep as well.
      best_metric: a key of the metrics passed to `save`.
      higher_is_better: whether a higher `best_metric` is better.
      regular_every: steps divisible by this number are regular. Every run of the config saves them, interrupted or not.
      identity: identifies the run. All entries are recorded; 'dataset' is compared on restore.
      allow_dataset_change: whether to restore a checkpoint that was trained on a different dataset.
      read_only: whether to leave all files as they are, for evaluation beside a running trainer.
      report: called with one line per event (saved, damaged, repaired).

    Raises:
      StorageError: the directory cannot be created or read.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_latest: int = 2,
        keep_best: int = 0,
        best_metric: str | None = None,
        higher_is_better: bool = True,
        regular_every: int = 1,
        identity: Mapping[str, str] | None = None,
        allow_dataset_change: bool = False,
        read_only: bool = False,
        report: Callable[[str], None] = print,
    ):
        self._directory = Path(directory).absolute()  # Orbax rejects relative paths
        self._best_metric, self._sign = best_metric, 1 if higher_is_better else -1
        self._identity = dict(identity or {})
        self._allow_dataset_change = allow_dataset_change
        self._read_only = read_only
        self._report = report
        self._primary = jax.process_index() == 0
        self._pending: _Pending | None = None
        self._held_step = -1  # the step that was last saved or restored
        self._policy = LatestOrBest(keep_latest, keep_best if best_metric else 0, regular_every, {})
        options = ocp.CheckpointManagerOptions(
            read_only=read_only,  # also disables the next option
            cleanup_tmp_directories=True,  # left behind by a killed process
            preservation_policy=self._policy,
            lightweight_initialize=True,  # does not read metrics, see _LatestOrBest
            # Otherwise a read-only directory delays the exit by 300 seconds.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        try:
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers=ocp.StandardCheckpointHandler()
            )
        except OSError as error:
            raise StorageError(
                f"the checkpoint directory cannot be used: {error.strerror or error}",
                str(self._directory),
                "make it a directory that you can write to",
            ) from error
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="manifest")
        for step in self.steps():
            with contextlib.suppress(DamagedError):
                self._score(step, manifest.read(self._path(step)).get("metrics", {}))

    def __enter__(self) -> Checkpoints:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes. An error of a save does not replace an exception that is already propagating."""
        try:
            self.close()
        except StorageError as lost:
            if error is None:
                raise
            for line in str(lost).split("\n"):
                self._report(line)

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first. They are verified only when they are restored."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Copies the state to the host and writes it in the background.

        Waits for the previous save first. The state may be donated as soon as this returns. An existing checkpoint of
        the step is replaced, unless it is the one that this object last saved or restored.

        Args:
          step: number of the step, and name of its directory.
          state: a tree of arrays, without PRNG key arrays.
          metrics: recorded with the step, and ranked by `best_metric`.

        Raises:
          StorageError: this save or the previous one failed. Only `close` may be called afterwards.
        """
        self.wait()
        if step == self._held_step:
            return
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        record = {
            "step": step,
            "identity": self._identity,
            "versions": versions(),
            "tree": tree_fingerprint(state),
            "metrics": metrics,
        }
        self._score(step, metrics)
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            # Without `force`, Orbax silently skips a step that is older than the newest.
            self._manager.save(
                step, args=ocp.args.StandardSave(state), force=True, custom_metadata={"record": json.dumps(record)}
            )
        except OSError as error:
            raise self._save_failed(step, num_bytes, error) from error
        self._pending = _Pending(step, num_bytes, self._background.submit(self._finish, record))
        self._held_step = step

    def poll(self) -> None:
        """Reports a save that has completed since the last call. Takes microseconds.

        Raises:
          StorageError: the save failed.
        """
        if self._pending is not None and self._pending.future.done():
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save and its manifest are on disk.

        Raises:
          StorageError: the checkpoint could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.future.result()
        except Exception as error:  # tensorstore raises a full disk as ValueError
            raise self._save_failed(pending.step, pending.num_bytes, error) from error
        self._report(f"saved checkpoint {pending.step}")

    def close(self) -> None:
        """Waits for the last save and stops the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            with contextlib.suppress(Exception):  # Orbax raises the error of a failed save again, after `wait`
                self._manager.close()

    def restore_latest(self, abstract_state: Any, *, regular: bool = False) -> tuple[int, Any] | None:
        """Restores the newest intact step, and sets aside the damaged steps that are newer.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct`. Shardings may differ from those of the save. A leaf without
            one keeps its saved sharding, or is placed on one device if the devices have changed.
          regular: whether to skip the steps that only interrupted runs save.

        Returns:
          The step and its state, or None if there is no checkpoint yet.

        Raises:
          BadDataError: every checkpoint is damaged, or the newest intact one holds a different model or was trained on
            a different dataset. The latter two are not set aside.
        """
        self.wait()
        damaged = {}
        every = self._policy.regular_every if regular else 1

        def newest(below: float) -> int:
            return _from_primary(max((s for s in self.steps() if s < below and s % every == 0), default=-1))

        step = newest(math.inf)
        while step >= 0:
            older = newest(step)
            try:
                return step, self._restore(step, abstract_state)
            except DamagedError as error:
                damaged[self._set_aside(step, str(error), older)] = str(error)
            step = older
        # Include what an earlier run has set aside. Otherwise a second attempt would silently start from step 0.
        for path in sorted(self._directory.glob("*.corrupt-*")):
            reason = path / _REASON
            damaged[path.name] = reason.read_text() if reason.exists() else "damaged"
        if damaged:
            raise BadDataError(
                "every checkpoint is damaged",
                f"{self._directory}: " + "; ".join(f"{name}: {reason}" for name, reason in damaged.items()),
                "restore one from a backup, or delete these directories to start again from step 0",
            )
        return None

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restores one step. A damaged step is not set aside.

        Raises:
          InputMissingError: there is no such step.
          BadDataError: the step is damaged, or is of a different model or dataset.
        """
        self.wait()
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise InputMissingError(f"there is no checkpoint {step}", str(self._directory), f"choose among: {there}")
        try:
            return self._restore(step, abstract_state)
        except DamagedError as error:
            where = str(self._path(step))
            raise BadDataError(f"checkpoint {step} is damaged: {error}", where, "use an older one") from None

    def _restore(self, step: int, abstract_state: Any) -> Any:
        """Verifies a step, compares it with the expected model and dataset, and reads it."""
        has_manifest = bool(_from_primary((self._path(step) / manifest.NAME).exists()))
        if has_manifest:
            with _damage_on_all_processes(DamagedError):
                if self._primary:
                    manifest.verify(self._path(step))
        # A process that is killed just after the commit leaves no manifest. Reading the step then verifies it, and any
        # error means damage. With a manifest the files are intact, so an error is a bug and keeps its traceback.
        reading = contextlib.nullcontext if has_manifest else _damage_on_all_processes
        with reading():
            stored = tree_signature(self._manager.item_metadata(step))
            if not stored:  # Orbax does not raise when it cannot read this
                raise DamagedError("the names of its arrays cannot be read")
            record = manifest.read(self._path(step)) if has_manifest else self._record(step)
        self._refuse_other_model(step, stored, tree_signature(abstract_state))
        self._refuse_other_dataset(step, record)
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        restore = ocp.args.StandardRestore(abstract_state, fallback_sharding=one_device)
        with reading():
            state = self._manager.restore(step, args=restore)
        if not has_manifest and not self._read_only:
            self._report(f"checkpoint {step} had no manifest; it is readable, so a manifest is added")
            if self._primary:
                with contextlib.suppress(OSError):  # the disk is full; the next run verifies the step again
                    manifest.write(self._path(step), record)
        self._held_step = step
        return state

    def _refuse_other_model(self, step: int, stored: dict[str, str], wanted: dict[str, str]) -> None:
        differences, table = compare_signatures(stored, wanted)
        if differences:
            raise BadDataError(
                f"checkpoint {step} holds a different model: {differences} of {len(wanted)} parameters differ",
                str(self._path(step)),
                "use the config that it was trained with, or another work directory",
                table,
            )

    def _refuse_other_dataset(self, step: int, record: dict[str, Any]) -> None:
        stored, now = record.get("identity", {}).get("dataset"), self._identity.get("dataset")
        if stored and now and stored != now and not self._allow_dataset_change:
            raise BadDataError(
                f"checkpoint {step} was trained on a different dataset: fingerprint {stored}, now {now}",
                str(self._path(step)),
                "restore the dataset, use another work directory, or set config.checkpoint.allow_dataset_change=True",
            )

    def _record(self, step: int) -> dict[str, Any]:
        """Returns the record that `save` passed to Orbax, for a step without a manifest."""
        return json.loads((self._manager.metadata(step).custom_metadata or {}).get("record", "{}"))

    def _set_aside(self, step: int, reason: str, older: int) -> str:
        """Renames a damaged step so that Orbax and later runs ignore it. Returns its new name."""
        now = datetime.datetime.now(datetime.UTC)
        name = str(step) if self._read_only else f"{step}.corrupt-{now:%Y%m%dT%H%M%SZ}"
        if not self._read_only:
            if self._primary:
                self._path(step).rename(self._directory / name)
                with contextlib.suppress(OSError):  # the disk is full
                    write_atomically(self._directory / name / _REASON, reason)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"set aside {step}")
            self._manager.reload()
        instead = f"falling back to checkpoint {older}" if older >= 0 else "there is no older checkpoint"
        self._report(f"checkpoint {step} is damaged ({reason}) and was kept as {name}; {instead}")
        return name

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _score(self, step: int, metrics: Mapping[str, float]) -> None:
        self._policy.scores.pop(step, None)
        score = metrics.get(self._best_metric, math.nan) if self._best_metric else math.nan
        if math.isfinite(score):
            self._policy.scores[step] = self._sign * score

    def _finish(self, record: dict[str, Any]) -> None:
        """Waits until Orbax has committed a step and writes its manifest. Runs in the background thread."""
        self._manager.wait_until_finished()
        if self._primary:
            manifest.write(self._path(record["step"]), record)

    def _save_failed(self, step: int, num_bytes: int, error: Exception) -> StorageError:
        self._held_step = -1
        self._policy.scores.pop(step, None)
        if self._primary:
            for temporary in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(temporary, ignore_errors=True)
        # The message of tensorstore has several lines, and the cause is at its end.
        number = re.search(r"os_error_code='(\d+)'", str(error))
        cause = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error).split("\n")[0]
        last = max((s for s in self.steps() if s != step), default=0)
        return StorageError(
            f"checkpoint {step} could not be written: {cause}",
            f"{self._directory} (needs {num_bytes:,} bytes, {free_space(self._directory)})",
            f"free some space and run the same command to resume from step {last}",
        )


@contextlib.contextmanager
def _damage_on_all_processes(kind: type[Exception] = Exception) -> Iterator[None]:
    """Converts an exception of the given kind on any process to a DamagedError on every process."""
    reason = ""
    try:
        yield
    except kind as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # the devices are out of memory; the checkpoint is not damaged
        reason = str(error).split("\n")[0] or type(error).__name__
    found = bool(reason)
    if jax.process_count() > 1:
        found = bool(np.any(multihost_utils.process_allgather(np.asarray(found))))
    if found:
        raise DamagedError(reason or "found by another process")
