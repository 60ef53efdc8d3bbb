"""Opens the directory of a run, on a file system or in gs://.

In a bucket, a lease takes the place of the lock. Files other than checkpoints are kept in a temporary directory, which
is pushed before each commit of a checkpoint. A run that resumes goes on with what was pushed: it writes again what came
after its checkpoint, so a temporary directory loses nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from xception_jax.config import ExperimentConfig, from_json, load_config, to_json
from xception_jax.errors import ConfigError, InputMissingError
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.metrics import main_metric
from xception_jax.storage import Lease, Mirror, Store, checkpoint_directory, hold, is_url, join, open_store
from xception_jax.training.checkpoint import Checkpoints
from xception_jax.training.experiment import Experiment
from xception_jax.training.step_files import step_path
from xception_jax.training.workdir import (
    CHECKPOINT,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    check_config,
    has_checkpoints,
    open_workdir,
    write_config,
)
from xception_jax.user_files import reading

LEASE = "lease"
# What a run reads again when it resumes. It only adds to the other files.
_PULLED = (CONFIG, METRICS, "report.html", "wandb_id")


class Bucket:
    """The directory of a run in gs://, as process 0 holds it.

    Args:
      lease: keeps other runs away.
      mirror: the files other than checkpoints.
    """

    def __init__(self, lease: Lease, mirror: Mirror) -> None:
        self._lease, self._mirror = lease, mirror

    @property
    def owner(self) -> str:
        """Identifies this run among all that have held the directory."""
        return self._lease.owner.nonce

    def check(self) -> None:
        """Raises WorkdirError if another run is known to have taken over. Takes microseconds."""
        if self._lease.lost:
            self._lease.renew()

    def renew(self) -> None:
        """Proves that this run still owns the directory. Must be called before a checkpoint is reported.

        Raises:
          WorkdirError: another run has taken over.
          StorageError: the store does not answer, so nobody knows.
        """
        self._lease.renew()

    def prove(self) -> None:
        """Does the same as `renew`, unless this was proved within the last second: before all other changes."""
        self._lease.prove()

    def push(self) -> None:
        """Pushes the files of the run, as `before_commit` does."""
        self._mirror.push()

    def before_commit(self) -> None:
        """Pushes the files of the run, in the order that must hold: a run that resumes from the step needs them.

        Raises:
          UserError: as `renew`, or the files cannot be written.
        """
        self._mirror.push()
        self._lease.renew()


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """Where a run keeps its files.

    Attributes:
      shown: the path or address, for messages.
      files: a directory on this machine for all files except checkpoints.
      store: the directory as a store, or None on a file system.
      bucket: what holds it, on process 0 and in a bucket.
    """

    shown: str
    files: Path
    store: Store | None = None
    bucket: Bucket | None = None

    @property
    def checkpoints(self) -> str:
        """The directory of the checkpoints, for `Checkpoints`."""
        return join(self.shown, CHECKPOINTS)

    def push(self, own: str) -> None:
        """Pushes the files of a run in a bucket, for a run that is about to end abruptly.

        Args:
          own: the file that processes other than process 0 push, which push nothing else.

        Raises:
          UserError: another run has taken over, or the files cannot be written.
        """
        if self.bucket is not None:
            self.bucket.push()
        elif self.store is not None:
            self.store.put(own, (self.files / own).read_bytes())

    def write_config(self, config: ExperimentConfig) -> None:
        """Writes config.json on process 0, once nothing refuses the run.

        Raises:
          UserError: another run has taken over, or the file cannot be written.
        """
        if jax.process_index() == 0:
            write_config(self.files, config)
            if self.bucket is not None:
                self.bucket.push()

    def path(self, *names: str) -> Path:
        """Returns the path or address of a file, for messages."""
        return step_path(join(self.shown, *names))


@contextlib.contextmanager
def open_run_directory(address: str, config: ExperimentConfig, report: Callable[[str], None]) -> Iterator[RunDirectory]:
    """Creates or opens the directory of a run, and holds it while the context is active.

    `RunDirectory.write_config` then writes `config.json`.

    Args:
      address: what `checkpoint_directory` returned.
      config: the resolved config, which `config.json` must agree with.
      report: called with one line for each change of the config, and before waiting for a lease.

    Raises:
      WorkdirError: the directory cannot be used, or another run holds it.
      ConfigError: it has checkpoints of another experiment.
      StorageError: the store does not answer.
    """
    if not is_url(address):
        with open_workdir(address, config, report=report) as path:
            yield RunDirectory(str(path), path)
        return
    store = open_store(address, "--workdir")
    if jax.process_index() != 0:
        with tempfile.TemporaryDirectory(prefix="xception_jax.") as scratch:
            yield RunDirectory(address, Path(scratch), store)
        return
    with hold(store, LEASE, report=report) as lease, Mirror(store, _PULLED, lease.prove) as mirror:
        check_config(mirror.directory, config, _has_checkpoints(store), report, address)
        yield RunDirectory(address, mirror.directory, store, Bucket(lease, mirror))


def saved_config(address: str | Path) -> ExperimentConfig | None:
    """Returns the config of a run that has checkpoints; None if there is no such run."""
    if is_url(address):
        store = open_store(str(address), "--workdir")
        return read_config(store) if _has_checkpoints(store) else None
    path = Path(address)
    return load_config(path / CONFIG) if has_checkpoints(path) and (path / CONFIG).is_file() else None


def read_config(store: Store) -> ExperimentConfig | None:
    """Returns the config of a run in a bucket; None if there is none.

    Raises:
      ConfigError: it is damaged.
      UserError: the store cannot be read.
    """
    content = store.read(CONFIG)
    if content is None:
        return None
    with reading("config of the run", join(store.root, CONFIG), "restore it from a copy", damaged=ConfigError):
        return from_json(content.decode())


def metrics_of_run(address: str) -> list[dict[str, Any]]:
    """Returns the entries of the metrics of a run.

    Raises:
      UserError: they cannot be read.
    """
    if not is_url(address):
        return read_metrics(Path(address, METRICS))
    content = open_run_store(address).read(METRICS)
    with tempfile.TemporaryDirectory(prefix="xception_jax.") as scratch:
        path = Path(scratch, METRICS)
        path.write_bytes(content or b"")
        return read_metrics(path)


def open_run_store(address: str) -> Store:
    """Opens the directory of a run in a bucket for reading.

    Raises:
      ConfigError: the address is not valid.
      InputMissingError: it cannot be used: credentials, permission, bucket or package are missing.
    """
    return open_store(
        checkpoint_directory(address, "the work directory", InputMissingError),
        "the work directory",
        unusable=InputMissingError,
    )


def _has_checkpoints(store: Store) -> bool:
    names = (name.split("/")[1] for name in store.list(f"{CHECKPOINTS}/"))
    return any(CHECKPOINT.fullmatch(name) for name in names)


def open_checkpoints(experiment: Experiment, directory: RunDirectory, report: Callable[[str], None]) -> Checkpoints:
    """Opens the checkpoints of a run, ranked by its main metric on the development split.

    Args:
      experiment: the run.
      directory: its directory.
      report: called with one line about each step that is set aside.
    """
    config = experiment.config
    return Checkpoints(
        directory.checkpoints,
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best if "dev" in experiment.sources else 0,
        best_metric=("ema_" if config.ema.decay > 0 else "") + main_metric(config).name,
        higher_is_better=main_metric(config).higher_is_better,
        regular_every=experiment.every(config.checkpoint.every),
        identity={
            "config": hashlib.sha256(to_json(config).encode()).hexdigest(),
            "dataset": experiment.data.fingerprint,
            "classes": json.dumps(experiment.data.class_names),
        },
        allow_dataset_change=config.checkpoint.allow_dataset_change,
        bucket=directory.bucket,
        report=report,
    )
