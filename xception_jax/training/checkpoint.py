"""Manages checkpoints: Orbax writes them, and a digest and a manifest prove that they are intact.

Orbax restores a flipped bit without an error, and the state of another step if directories are renamed. So each step
has a digest of its content (`digest.py`), and its files are verified before Orbax reads them. The order of a save must
hold, because the process may be killed at any point: Orbax writes the state and its digest to
`<step>.orbax-checkpoint-tmp` and renames it to `<step>`; all files are synced to disk and their digests written to
`<step>/manifest.json`; the step is reported as saved.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from xception_jax.errors import BadDataError, InputMissingError, UserError, WorkdirError
from xception_jax.parallel import from_primary
from xception_jax.storage import checkpoint_directory, is_url
from xception_jax.training import digest, manifest
from xception_jax.training.digest import DigestArgs, host_parts
from xception_jax.training.fingerprint import tree_signature, versions
from xception_jax.training.manifest import DamagedError
from xception_jax.training.orbax_manager import open_manager
from xception_jax.training.preservation import LatestOrBest
from xception_jax.training.save_errors import all_damaged, cannot_open, save_failed, seconds_to_save, store_errors
from xception_jax.training.step_files import COMMITTED, delete, delete_step, exists, prepare_bucket, step_path
from xception_jax.training.verification import (
    failures_on_all_processes,
    identify_run,
    read_reason,
    refuse_other_dataset,
    refuse_other_model,
    set_aside,
    verify_step,
)

if TYPE_CHECKING:
    from xception_jax.training.run_directory import Bucket


_DELETION_SECONDS = 1.0


class _DeletedError(Exception):
    """There is no such step, or no longer."""


@dataclasses.dataclass
class _Pending:
    """A save in progress.

    Attributes:
      step: its step.
      num_bytes: its size.
      future: completes when its manifest is written.
      deadline: when it fails if it is not complete, in `time.monotonic()`.
    """

    step: int
    num_bytes: int
    future: concurrent.futures.Future
    deadline: float


class Checkpoints:
    """Saves and restores the checkpoints of a run, in `<directory>/<step>/`, which all processes share.

    With several processes, every method except `poll` is a collective that all of them must call. Use it as a context
    manager or call `close`; otherwise a save in progress is lost at exit.

    Args:
      directory: parent of the checkpoint directories, on a file system or in gs://; created if missing.
      keep_latest: number of newest steps to keep, at least 1.
      keep_best: number of steps with the best `best_metric` to keep as well.
      best_metric: a key of the metrics passed to `save`.
      higher_is_better: whether a higher `best_metric` is better.
      regular_every: steps divisible by this number are regular, except 0. Every run of the config saves them,
        interrupted or not.
      identity: identifies the run. All entries are recorded; 'dataset' is compared on restore.
      allow_dataset_change: whether to restore a checkpoint that was trained on a different dataset.
      read_only: whether to leave all files as they are, for evaluation beside a running trainer.
      bucket: the lease and the files of a run in gs://: the lease is renewed before each commit, manifest and deletion,
        and the files are pushed before each commit.
      report: called with one line per event (saved, damaged, repaired).

    Raises:
      StorageError: the directory cannot be created or read.
      WorkdirError: it is in a store that Orbax cannot use. A reader gets an InputMissingError instead.
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
        bucket: Bucket | None = None,
        report: Callable[[str], None] = print,
    ):
        unusable = InputMissingError if read_only else WorkdirError
        self._directory = step_path(checkpoint_directory(os.fspath(directory), "checkpoints", unusable))
        self._in_bucket = is_url(self._directory)
        self._bucket = bucket
        # gcsfs has exceptions of its own.
        self._errors = Exception if self._in_bucket else OSError
        self._best_metric, self._sign = best_metric, 1 if higher_is_better else -1
        self._identity = dict(identity or {})
        self._allow_dataset_change = allow_dataset_change
        self._read_only = read_only
        self._report = report
        self._primary = jax.process_index() == 0
        self._pending: _Pending | None = None
        self._held_step = -1  # the step that was last saved or restored
        self._hangs = False  # whether a save did not end in time
        self._policy = LatestOrBest(keep_latest, keep_best if best_metric else 0, regular_every, {})
        self._deleted: set[int] = set()  # from a bucket, see _delete_old
        try:
            if self._in_bucket:
                self._prepare_bucket()
            before_commit = bucket.before_commit if bucket else None
            self._manager = open_manager(self._directory, self._policy, read_only, before_commit)
            self._run = identify_run(self._directory, self.steps(), write=not read_only)
        except self._errors as error:
            raise cannot_open(self._directory, error, unusable) from error
        self._background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="manifest")
        for step in self.steps():
            with contextlib.suppress(DamagedError):
                self.score(step, manifest.read(self._path(step)).get("metrics", {}))

    def _prepare_bucket(self) -> None:
        """Deletes what killed saves left, before any process lists it. Orbax would do so while it lists, and fail."""
        if self._primary and not self._read_only:
            self._prove()
            prepare_bucket(self._directory, self._prove)
        from_primary(0)  # the other processes wait

    def __enter__(self) -> Checkpoints:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes. An error of a save does not replace an exception that is already propagating."""
        try:
            self.close()
        except UserError as lost:
            if error is None:
                raise
            for line in str(lost).split("\n") if str(lost) != str(error) else ():
                self._report(line)

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first. They are verified only when they are restored."""
        return sorted(set(self._manager.all_steps()) - self._deleted)

    def save(
        self, step: int, state: Any, metrics: Mapping[str, float] | None = None, *, last_good: float = math.inf
    ) -> None:
        """Copies the state to the host and writes it in the background.

        Waits for the previous save first. The state may be donated as soon as this returns. An existing checkpoint of
        the step is replaced, unless it is the one that this object last saved or restored.

        Args:
          step: number of the step, and name of its directory.
          state: a tree of arrays, without PRNG key arrays.
          metrics: recorded with the step, and ranked by `best_metric`.
          last_good: the last step that changed the parameters. The newest regular step before it is kept, too.

        Raises:
          StorageError: this save or the previous one failed. Only `close` may be called afterwards.
        """
        self.wait()
        if step == self._held_step:
            return
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        record = {
            "step": step,
            "run": self._run,
            "identity": self._identity,
            "versions": versions(),
            "metrics": metrics,
        }
        if self._bucket is not None:
            record["lease"] = self._bucket.owner
        self.score(step, metrics)
        self._policy.last_good = last_good
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            if step in self.steps():
                if self._in_bucket and self._primary:  # a deletion that is cut short must not look like a step
                    self._prove()
                    delete(self._path(step) / COMMITTED)
                self._manager.delete(step)
            self._deleted.discard(step)
            items = {digest.ITEM: DigestArgs(record, host_parts(state)), digest.STATE: ocp.args.StandardSave(state)}
            metadata = {"record": json.dumps(record)}  # where earlier versions look for it
            # Without `force`, Orbax silently skips a step that is older than the newest.
            self._manager.save(step, args=ocp.args.Composite(**items), force=True, custom_metadata=metadata)
        except self._errors as error:
            raise self._save_failed(step, num_bytes, error) from error
        future = self._background.submit(self._finish, record)
        deadline = time.monotonic() + seconds_to_save(self._directory, num_bytes)
        self._pending = _Pending(step, num_bytes, future, deadline)
        self._held_step = step

    def poll(self) -> None:
        """Reports a save that has completed since the last call. Takes microseconds.

        Raises:
          StorageError: the save failed.
          WorkdirError: another run has taken over the bucket.
        """
        if self._bucket is not None:
            self._bucket.check()
        pending = self._pending
        if pending is not None and (pending.future.done() or time.monotonic() > pending.deadline):
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save and its manifest are on disk.

        Raises:
          StorageError: the checkpoint could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        left = max(0.0, pending.deadline - time.monotonic())
        try:
            pending.future.result(None if math.isinf(left) else left)
        except Exception as error:  # tensorstore raises a full disk as ValueError
            self._hangs = not pending.future.done()
            raise self._save_failed(pending.step, pending.num_bytes, error) from error
        self._report(f"saved checkpoint {pending.step}")

    def close(self) -> None:
        """Waits for the last save and stops the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown(wait=not self._hangs)
            if not self._hangs:
                with contextlib.suppress(Exception):  # Orbax raises the error of a failed save again, after `wait`
                    self._manager.close()

    def restore_latest(
        self, abstract_state: Any, *, regular: bool = False, below: float = math.inf
    ) -> tuple[int, Any] | None:
        """Restores the newest intact step, and sets aside the damaged steps that are newer.

        Args:
          abstract_state: a tree of `jax.ShapeDtypeStruct`. Shardings may differ from those of the save. A leaf without
            one keeps its saved sharding, or is placed on one device if the devices have changed.
          regular: whether to skip the steps that only interrupted runs save.
          below: only older steps are restored.

        Returns:
          The step and its state, or None if there is no such checkpoint.

        Raises:
          BadDataError: every checkpoint is damaged (if neither `regular` nor `below` is given), or the newest intact
            one holds a different model or was trained on a different dataset. The latter two are not set aside.
        """
        self.wait()
        damaged = {}

        def newest(below: float) -> int:
            steps = [s for s in self.steps() if s < below and (self._policy.is_regular(s) or not regular)]
            return from_primary(max(steps, default=-1))

        step = newest(below)
        while step >= 0:
            older = newest(step)
            try:
                with self._unless_deleted(step), store_errors(self._directory, "restoring"):
                    return step, self._restore(step, abstract_state)
            except DamagedError as error:
                with store_errors(self._directory, "restoring"):
                    damaged[self._set_aside(step, str(error), older)] = str(error)
            except _DeletedError:
                older = newest(below)  # the trainer saved newer steps before it deleted this one
            step = older
        if regular or below < math.inf:
            return None  # there may be intact steps that were not asked for
        # Include what an earlier run has set aside. Otherwise a second attempt would silently start from step 0.
        with store_errors(self._directory, "restoring"):
            damaged |= {path.name: read_reason(path) for path in sorted(self._directory.glob("*.corrupt-*"))}
        if damaged:
            raise all_damaged(self._directory, damaged)
        return None

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Restores one step. A damaged step is not set aside.

        Raises:
          InputMissingError: there is no such step, or a trainer deletes it meanwhile.
          BadDataError: the step is damaged, or is of a different model or dataset.
        """
        self.wait()
        try:
            if step not in self.steps():
                raise _DeletedError
            with self._unless_deleted(step), store_errors(self._directory, "restoring"):
                return self._restore(step, abstract_state)
        except DamagedError as error:
            where = str(self._path(step))
            raise BadDataError(f"checkpoint {step} is damaged: {error}", where, "use an older one") from None
        except _DeletedError:
            what, there = f"there is no checkpoint {step}", ", ".join(map(str, self.steps())) or "none"
            raise InputMissingError(what, str(self._directory), f"choose among: {there}") from None

    @contextlib.contextmanager
    def _unless_deleted(self, step: int) -> Iterator[None]:
        """Raises _DeletedError instead of another error if a trainer deletes the step that is read beside it."""
        try:
            yield
        except Exception:
            if not self._read_only:
                raise
            # A step that is being deleted looks damaged for a moment.
            marker = self._path(step) / COMMITTED if self._in_bucket else self._path(step)
            deadline = time.monotonic() + _DELETION_SECONDS
            while exists(marker):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            self._manager.reload()
            raise _DeletedError from None

    def _restore(self, step: int, abstract_state: Any) -> Any:
        """Verifies a step, compares it with the expected model and dataset, and reads it."""
        with failures_on_all_processes():
            verified = verify_step(self._path(step), step, self._run, read_files=self._primary)
        with failures_on_all_processes():
            stored = tree_signature(self._manager.item_metadata(step)[digest.STATE])
            if not stored:  # Orbax does not raise when it cannot read this
                raise DamagedError("the names of its arrays cannot be read")
        refuse_other_model(self._path(step), stored, tree_signature(abstract_state))
        if not self._allow_dataset_change:
            now, classes = self._identity.get("dataset"), self._identity.get("classes")
            refuse_other_dataset(self._path(step), verified.record, now, classes)
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        restore = ocp.args.StandardRestore(abstract_state, fallback_sharding=one_device)
        # The files are intact, so an error is a bug and keeps its traceback.
        state = self._manager.restore(step, args=ocp.args.Composite(**{digest.STATE: restore}))[digest.STATE]
        if verified.digest is not None:
            with failures_on_all_processes():
                verified.digest.verify_arrays(state)
        if not verified.has_manifest and not self._read_only:
            self._report(f"checkpoint {step} had no manifest; its content matches its digest, so a manifest is added")
            if self._primary:
                self._prove()
                with contextlib.suppress(OSError):  # the disk is full; the next run verifies the step again
                    manifest.write(self._path(step), verified.record)
        self._held_step = step
        return state

    def _set_aside(self, step: int, reason: str, older: int) -> str:
        """Renames a damaged step so that Orbax and later runs ignore it. Returns its new name."""
        now = datetime.datetime.now(datetime.UTC)
        name = str(step) if self._read_only else f"{step}.corrupt-{now:%Y%m%dT%H%M%SZ}"
        if not self._read_only:
            if self._primary:
                self._prove()
                set_aside(self._path(step), self._directory / name, reason)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"set aside {step}")
            self._manager.reload()
        instead = f"falling back to checkpoint {older}" if older >= 0 else "there is no older checkpoint"
        self._report(f"checkpoint {step} is damaged ({reason}) and was kept as {name}; {instead}")
        return name

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ranks a step, which may be saved before or later, by metrics of its state. All processes must call this."""
        self._policy.scores.pop(step, None)
        score = metrics.get(self._best_metric, math.nan) if self._best_metric else math.nan
        if math.isfinite(score):
            self._policy.scores[step] = self._sign * score

    def _prove(self) -> None:
        """Proves that this run still owns its directory in a bucket, before it changes anything there."""
        if self._bucket is not None:
            self._bucket.prove()

    def _finish(self, record: dict[str, Any]) -> None:
        """Waits until Orbax has committed a step and writes its manifest. Runs in the background thread."""
        self._manager.wait_until_finished()
        if self._primary:
            path = self._path(record["step"])
            if self._bucket is not None:
                self._bucket.renew()
            known = {name: entry for name, entry in digest.read(path).files.items() if name.startswith(digest.STATE)}
            manifest.write(path, record, known)
        if self._in_bucket:
            self._delete_old()

    def _delete_old(self) -> None:
        """Deletes old steps from a bucket. Orbax would delete their objects in any order."""
        steps = self.steps()
        for step in set(steps) - self._policy.kept(steps):
            if self._primary:
                self._prove()
                delete_step(self._path(step))
            self._deleted.add(step)

    def _save_failed(self, step: int, num_bytes: int, error: Exception) -> UserError:
        self._held_step = -1
        self._policy.scores.pop(step, None)
        if self._primary and not self._in_bucket:
            for temporary in self._directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(temporary, ignore_errors=True)
        last = max((s for s in self.steps() if s != step), default=0)
        return save_failed(self._directory, step, num_bytes, last, error)
