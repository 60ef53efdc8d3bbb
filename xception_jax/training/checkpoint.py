"""Checkpoints that are whole or not there: Orbax writes them, a manifest of ours proves what was written.

The order that must hold: Orbax writes `<step>.orbax-checkpoint-tmp` and renames it to `<step>` (committed); then the
digests of its files go to `<step>/manifest.json`, on disk before its name is; only then is the step reported as saved.
A process may be killed between any two of these. Orbax itself restores a flipped bit in silence.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
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

_REASON = "damage.txt"  # in a directory that was set aside: why

# Orbax logs each error with its traceback before it raises it, and warns of files that it did not write. All that
# concerns the user is raised here, in three lines.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


def _from_primary(value: int) -> int:
    """Returns what process 0 passed, on every process."""
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@dataclasses.dataclass
class _LatestOrBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest steps, the newest regular one, and those with the highest scores.

    Not Orbax's own pair of policies: they read the metrics of earlier runs from files that no digest covers, and a
    damaged one ends the constructor of the manager.
    """

    keep_latest: int
    keep_best: int
    regular_every: int
    scores: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = sorted(info.step for info in checkpoints)
        scored = sorted((step for step in steps if step in self.scores), key=self.scores.__getitem__)
        kept = set(steps[-self.keep_latest :]) | set(scored[len(scored) - self.keep_best :] if self.keep_best else ())
        kept |= set([step for step in steps if step % self.regular_every == 0][-1:])
        return [info.step in kept for info in checkpoints]


@dataclasses.dataclass
class _Pending:
    """A save in the background: its step, the bytes of its arrays, and the future that ends with its manifest."""

    step: int
    num_bytes: int
    future: concurrent.futures.Future


class Checkpoints:
    """The checkpoints of one run, in `<directory>/<step>/`, on a file system that all processes share.

    With several processes every method but `poll` is a collective: all of them call it. Use as a context manager, or
    `close` it: a process that exits without loses the save that is under way.

    Args:
      directory: where the steps are; created if it is not there.
      keep_latest: how many of the newest steps to keep, at least 1.
      keep_best: how many of the steps with the highest `best_metric` to keep besides.
      best_metric: a key of the metrics given to `save`.
      higher_is_better: whether a high `best_metric` is a good one.
      regular_every: steps that this divides are regular: saved by every run of the config, interrupted or not.
      identity: what the run is: 'dataset' is compared on restoring, everything is recorded.
      allow_dataset_change: restore although the dataset has changed.
      read_only: for evaluation beside a running trainer: nothing is created, moved, repaired or deleted.
      report: takes one line for each event: saved, damaged, repaired.

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
        self._directory = Path(directory).absolute()  # Orbax takes no relative path
        self._best_metric, self._sign = best_metric, 1 if higher_is_better else -1
        self._identity = dict(identity or {})
        self._allow_dataset_change = allow_dataset_change
        self._read_only = read_only
        self._report = report
        self._primary = jax.process_index() == 0
        self._pending: _Pending | None = None
        self._held_step = -1  # the step whose state this object has last saved or restored
        self._policy = _LatestOrBest(keep_latest, keep_best if best_metric else 0, regular_every, {})
        options = ocp.CheckpointManagerOptions(
            read_only=read_only,  # also turns the next line off
            cleanup_tmp_directories=True,  # what a killed process was writing
            preservation_policy=self._policy,
            lightweight_initialize=True,  # do not read metrics, see the policy
            # Otherwise a directory that cannot be written hangs the exit for 300 seconds.
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
                "make it a directory that this user can write",
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
        """Closes; an error that is under way is not replaced by that of a save."""
        try:
            self.close()
        except StorageError as lost:
            if error is None:
                raise
            self._report(str(lost))

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first; whether they are intact shows when one is restored."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Copies the state off the devices and returns while it is written in the background.

        The state may be donated as soon as this returns. If the previous save is still being written, this waits for
        it. A step that exists is replaced, unless its state is the one that was last saved or restored here.

        Args:
          step: number of the directory.
          state: a tree of arrays, without PRNG key arrays.
          metrics: recorded with the step; `best_metric` among them ranks it.

        Raises:
          StorageError: this save or the previous one failed; after that there is only `close`.
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
            # `force`: Orbax would otherwise skip a step below the newest in silence.
            self._manager.save(
                step, args=ocp.args.StandardSave(state), force=True, custom_metadata={"record": json.dumps(record)}
            )
        except OSError as error:
            raise self._save_failed(step, num_bytes, error) from error
        self._pending = _Pending(step, num_bytes, self._background.submit(self._finish, record))
        self._held_step = step

    def poll(self) -> None:
        """Reports a save that has been completed since the last call; costs microseconds.

        Raises:
          StorageError: it failed.
        """
        if self._pending is not None and self._pending.future.done():
            self.wait()

    def wait(self) -> None:
        """Blocks until what was saved is on disk with its manifest.

        Raises:
          StorageError: it could not be written.
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
        """Waits as `wait`, and ends the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            with contextlib.suppress(Exception):  # a failed save: raised by `wait`, and once more by Orbax
                self._manager.close()

    def restore_latest(self, abstract_state: Any, *, regular: bool = False) -> tuple[int, Any] | None:
        """Restores the newest step that is intact, and sets aside the damaged ones that are newer.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct` with shardings, which need not be those of the save. Without
            one, an array comes back as it was sharded, or on one device where there are others than then.
          regular: leave out the steps that only an interrupted run has.

        Returns:
          The step and its state, or None if nothing was saved yet.

        Raises:
          BadDataError: every checkpoint is damaged, or the newest intact one holds another model or was trained on
            another dataset. The latter two are not set aside.
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
        # What an earlier run has set aside counts: without that, the second attempt would start again from step 0.
        for path in sorted(self._directory.glob("*.corrupt-*")):
            reason = path / _REASON
            damaged[path.name] = reason.read_text() if reason.exists() else "damaged"
        if damaged:
            raise BadDataError(
                "every checkpoint is damaged",
                f"{self._directory}: " + "; ".join(f"{name}: {reason}" for name, reason in damaged.items()),
                "bring one back from a backup, or delete these directories to start again from step 0",
            )
        return None

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restores one step; a damaged one stays where it is.

        Raises:
          InputMissingError: there is no such step.
          BadDataError: it is damaged, or holds another model or dataset.
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
        """Verifies a step, compares it with what is wanted, and reads it."""
        has_manifest = bool(_from_primary((self._path(step) / manifest.NAME).exists()))
        if has_manifest:
            with _damage_on_all_processes(DamagedError):
                if self._primary:
                    manifest.verify(self._path(step))
        # Without a manifest (killed just after the commit) being read is the proof, so there any error is damage.
        # With one, an error is none of the files', and keeps its traceback.
        reading = contextlib.nullcontext if has_manifest else _damage_on_all_processes
        with reading():
            stored = tree_signature(self._manager.item_metadata(step))
            if not stored:  # Orbax says nothing when it cannot read this
                raise DamagedError("the names of its arrays cannot be read")
            record = manifest.read(self._path(step)) if has_manifest else self._record(step)
        self._refuse_other_model(step, stored, tree_signature(abstract_state))
        self._refuse_other_dataset(step, record)
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        restore = ocp.args.StandardRestore(abstract_state, fallback_sharding=one_device)
        with reading():
            state = self._manager.restore(step, args=restore)
        if not has_manifest and not self._read_only:
            self._report(f"checkpoint {step} had no manifest; it was verified by reading it, and gets one")
            if self._primary:
                with contextlib.suppress(OSError):  # no room: the next run verifies it again
                    manifest.write(self._path(step), record)
        self._held_step = step
        return state

    def _refuse_other_model(self, step: int, stored: dict[str, str], wanted: dict[str, str]) -> None:
        differences, table = compare_signatures(stored, wanted)
        if differences:
            raise BadDataError(
                f"checkpoint {step} is of another model: {differences} of {len(wanted)} parameters differ",
                f"{self._path(step)}\n{table}",
                "use the config that it was trained with, or another work directory",
            )

    def _refuse_other_dataset(self, step: int, record: dict[str, Any]) -> None:
        stored, now = record.get("identity", {}).get("dataset"), self._identity.get("dataset")
        if stored and now and stored != now and not self._allow_dataset_change:
            raise BadDataError(
                f"checkpoint {step} was trained on another dataset: fingerprint {stored}, now {now}",
                str(self._path(step)),
                "restore the dataset, start in another work directory, or allow the change",
            )

    def _record(self, step: int) -> dict[str, Any]:
        """Returns what `save` told Orbax of a step, for when there is no manifest."""
        return json.loads((self._manager.metadata(step).custom_metadata or {}).get("record", "{}"))

    def _set_aside(self, step: int, reason: str, older: int) -> str:
        """Renames a damaged step, so that neither Orbax nor a later run takes it for one; returns its new name."""
        now = datetime.datetime.now(datetime.UTC)
        name = str(step) if self._read_only else f"{step}.corrupt-{now:%Y%m%dT%H%M%SZ}"
        if not self._read_only:
            if self._primary:
                self._path(step).rename(self._directory / name)
                with contextlib.suppress(OSError):  # no room
                    write_atomically(self._directory / name / _REASON, reason)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"set aside {step}")
            self._manager.reload()
        instead = f"falling back to checkpoint {older}" if older >= 0 else "there is no older one"
        self._report(f"checkpoint {step} is damaged ({reason}) and was left as {name}: {instead}")
        return name

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _score(self, step: int, metrics: Mapping[str, float]) -> None:
        self._policy.scores.pop(step, None)
        score = metrics.get(self._best_metric, math.nan) if self._best_metric else math.nan
        if math.isfinite(score):
            self._policy.scores[step] = self._sign * score

    def _finish(self, record: dict[str, Any]) -> None:
        """Runs in the background: the manifest of a step once Orbax has committed it."""
        self._manager.wait_until_finished()
        if self._primary:
            manifest.write(self._path(record["step"]), record)

    def _save_failed(self, step: int, num_bytes: int, error: Exception) -> StorageError:
        self._held_step = -1
        self._policy.scores.pop(step, None)
        if self._primary:
            for temporary in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(temporary, ignore_errors=True)
        # tensorstore hides the cause at the end of several lines.
        number = re.search(r"os_error_code='(\d+)'", str(error))
        cause = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error).split("\n")[0]
        last = max((s for s in self.steps() if s != step), default=0)
        return StorageError(
            f"checkpoint {step} could not be written: {cause}",
            f"{self._directory} (needs {num_bytes:,} bytes, {free_space(self._directory)})",
            f"make room and run the same command to resume from step {last}",
        )


@contextlib.contextmanager
def _damage_on_all_processes(kind: type[Exception] = Exception) -> Iterator[None]:
    """Turns an error of a kind, on any process, into a DamagedError on every process."""
    reason = ""
    try:
        yield
    except kind as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # the devices are too small, not the checkpoint damaged
        reason = str(error).split("\n")[0] or type(error).__name__
    found = bool(reason)
    if jax.process_count() > 1:
        found = bool(np.any(multihost_utils.process_allgather(np.asarray(found))))
    if found:
        raise DamagedError(reason or "as another process found")
