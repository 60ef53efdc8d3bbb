"""The cells of a study (arm x seed): their configs, directories, states and outcomes."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from xception_jax.config import ExperimentConfig, load_config, to_json
from xception_jax.errors import RESUMABLE_EXIT_CODES, SUCCESS_EXIT_CODE, BadDataError, ConfigError, UserError
from xception_jax.files import write_atomically
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.study.controls import ArmCost
from xception_jax.study.design import Study
from xception_jax.training.workdir import CHECKPOINTS, CONFIG, LOCK, METRICS
from xception_jax.user_files import read_json

RECORD = "cell.json"
LOG = "log.txt"
PREDICTIONS = "predictions_test.npz"
ACTIVATIONS = "activations.json"
KERNELS = "kernels.json"

State = Literal["waiting", "done", "stopped", "failed"]


def state_of(exit_code: int | None) -> State:
    """Returns the state of a cell whose process last ended with `exit_code`.

    Args:
      exit_code: as `subprocess` reports it, negative for a process that a signal killed; None if no process has ended.

    Returns:
      'waiting': the cell has not ended yet; 'done': it is complete; 'stopped': it was preempted or killed, and the
      next run of the study resumes it; 'failed': it ended with an error, and only --retry runs it again.
    """
    if exit_code is None:
        return "waiting"
    if exit_code == SUCCESS_EXIT_CODE:
        return "done"
    return "stopped" if exit_code < 0 or exit_code in RESUMABLE_EXIT_CODES else "failed"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
      arm: name of its arm.
      seed: seed of its training run.
      directory: its work directory.
      config: its config.
      trial: number of the trial if it belongs to a search.
      activations: whether it measures what enters the activations at its end, see activations.py.
    """

    arm: str
    seed: int
    directory: Path
    config: ExperimentConfig
    trial: int | None = None
    activations: bool = False

    @property
    def name(self) -> str:
        """Returns its name in messages."""
        return f"{self.arm} seed {self.seed}" if self.trial is None else f"{self.arm} trial {self.trial}"

    @property
    def config_hash(self) -> str:
        """Returns the first 16 hexadecimal digits of the SHA-256 of its config.json."""
        return hashlib.sha256(to_json(self.config).encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """Returns the record of its last end; {} if it has not ended yet.

        It has exit_code, attempts, seconds, cpu_seconds and reused_from.
        """
        try:
            record = read_json(self.directory / RECORD, dict)
        except (OSError, ValueError):
            return {}
        numbers = (record.get(name, 0) for name in ("exit_code", "attempts", "seconds", "cpu_seconds"))
        whole = isinstance(record.get("exit_code", 0), int)
        return record if whole and all(isinstance(value, int | float | None) for value in numbers) else {}

    def state(self) -> State:
        """Returns its state according to its record."""
        return state_of(self.record().get("exit_code"))

    def metrics_file(self) -> Path:
        """Returns the path of its metrics.jsonl, or of metrics.jsonl.xz if there is only that."""
        plain, compressed = self.directory / METRICS, self.directory / f"{METRICS}.xz"
        return compressed if compressed.exists() and not plain.exists() else plain

    def write_record(self, **values: Any) -> None:
        """Updates the record with `values`."""
        write_atomically(self.directory / RECORD, json.dumps(self.record() | values) + "\n")

    def prepare(self) -> None:
        """Creates the directory with config.json, the only input of the cell's process.

        Raises:
          ConfigError: the directory has a different config.
        """
        self.check_config()
        path = self.directory / CONFIG
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(path, to_json(self.config))

    def check_config(self) -> None:
        """Raises ConfigError if its directory has another config than the study gives it."""
        path = self.directory / CONFIG
        if path.exists() and to_json(load_config(path)) != to_json(self.config):
            raise ConfigError(
                f"cell {self.name} was started with a different config",
                str(path),
                "restore study.json if it was changed, move the directory away, or choose another study directory",
            )

    def take_over(self, other: Cell) -> None:
        """Copies the result of another cell with an equal config. Checkpoints are not copied."""
        self.prepare()
        for name in (other.metrics_file().name, PREDICTIONS, ACTIVATIONS, KERNELS):
            if (other.directory / name).exists():  # not in cells of earlier releases, or of studies that do not measure
                shutil.copyfile(other.directory / name, self.directory / name)
        self.write_record(**other.record() | {"config_hash": self.config_hash, "reused_from": other.config.name})

    def is_held(self) -> bool:
        """Returns whether a process is training in its directory, such as one that an earlier runner started."""
        try:
            lock = os.open(self.directory / LOCK, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False


def find_equal(cells: Iterable[Cell], others: Iterable[Cell]) -> list[tuple[Cell, Cell]]:
    """Pairs each cell that has not begun with the first finished one of `others` that has an equal config.

    The name of the run is ignored, because equal configs give equal results. A cell that measures activations needs a
    partner that did. Cells without such a partner are left out.
    """

    def key(cell: Cell) -> str:
        return json.dumps(json.loads(to_json(cell.config)) | {"name": ""})

    finished: dict[tuple[str, bool], Cell] = {}
    for cell in others:
        if cell.state() == "done" and cell.metrics_file().exists():
            for measured in {False, (cell.directory / ACTIVATIONS).exists()}:
                finished.setdefault((key(cell), measured), cell)
    begun = (CHECKPOINTS, RECORD)
    new = (cell for cell in cells if not any((cell.directory / name).exists() for name in begun))
    pairs = ((cell, finished.get((key(cell), cell.activations))) for cell in new)
    return [(cell, other) for cell, other in pairs if other is not None]


def study_cells(
    study: Study, costs: Mapping[str, ArmCost], root: Path, tuned: Mapping[str, Mapping[str, Any]]
) -> list[Cell]:
    """Returns all cells seed by seed, so that an unfinished study has complete pairs.

    Args:
      study: the study.
      costs: by arm.
      root: the study directory.
      tuned: the overrides that the search chose, by arm; empty without a search.
    """
    cells = []
    for seed in study.seeds:
        for arm in study.arms:
            config = _cell_config(study, arm.name, costs, seed, tuned.get(arm.name, {}))
            cells.append(Cell(arm.name, seed, _directory(root, arm.name, seed), config, None, study.activations))
    return cells


def _directory(root: Path, arm: str, seed: int) -> Path:
    return root / "cells" / arm / f"seed{seed}"


def search_cells(study: Study, costs: Mapping[str, ArmCost], root: Path) -> list[Cell]:
    """Returns the trials of the study's search. They have no test split."""
    if study.search is None:
        return []
    cells = []
    for number, trial in enumerate(study.trials):
        for arm in study.tried:
            config = _cell_config(study, arm.name, costs, study.search.seed, {**trial, "data.test_split": ""})
            directory = root / "search" / arm.name / f"trial{number}"
            cells.append(Cell(arm.name, study.search.seed, directory, config, number))
    return cells


def _cell_config(
    study: Study, arm_name: str, costs: Mapping[str, ArmCost], seed: int, tuned: Mapping[str, Any]
) -> ExperimentConfig:
    arm = study.arm(arm_name)
    arm = dataclasses.replace(arm, overrides=dict(arm.overrides) | dict(tuned))
    width = costs[arm_name].width_multiplier
    own = {"model.width_multiplier": width, "name": f"{study.name}, {arm_name}, seed {seed}"}
    return study.arm_config(arm, study.seeded_fields(seed) | own)


def choose_trials(study: Study, cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """Returns the overrides of the best trial of each arm, by accuracy on the development split.

    Several arms may decide together, by their mean accuracy (`Arm.tuned_as`). Trials that are not done are ignored. Of
    equal trials the first one is chosen. Arms for which no trial is done are left out.

    Raises:
      BadDataError: a finished trial has lost its accuracy.
    """
    known: dict[tuple[str, int], float] = {}
    for cell in cells:
        assert cell.trial is not None
        if cell.state() != "done":
            continue
        known[cell.arm, cell.trial] = final_outcome(cell, study.metric, "dev")["dev_accuracy"]
    chosen = {}
    for arm in study.arms:
        means = {
            number: statistics.fmean(known[name, number] for name in arm.deciding)
            for number in range(len(study.trials))
            if all((name, number) in known for name in arm.deciding)
        }
        if means:
            chosen[arm.name] = dict(study.trials[max(means, key=means.__getitem__)])
    return chosen


def started_trials(study: Study, costs: Mapping[str, ArmCost], root: Path) -> dict[str, dict[str, Any]]:
    """Returns the overrides of the trial with which the first cell of each arm was started; all cells of it keep them.

    Otherwise a trial that ends later, such as by --retry, would change what arms are said to have been trained with.
    Arms that decide together (`Arm.tuned_as`) keep them together.
    """
    started = {}
    for arm in study.arms:
        for seed in study.seeds:
            try:
                config = load_config(_directory(root, arm.name, seed) / CONFIG)
            except UserError:  # not started yet; `prepare` names what else is wrong
                continue
            trials = (dict(trial) for trial in study.trials)
            same = (trial for trial in trials if _cell_config(study, arm.name, costs, seed, trial) == config)
            if (trial := next(same, None)) is not None:
                started[arm.name] = trial
                break
    together = {frozenset(study.arm(name).deciding): trial for name, trial in started.items()}
    for arm in study.arms:
        if (trial := together.get(frozenset(arm.deciding))) is not None:
            started.setdefault(arm.name, trial)
    return started


TRAIN_STEPS = 50
"""Steps over which the training accuracy is averaged, or a few more; the last log interval may have a single one."""


def _train_accuracy(entries: Sequence[Mapping[str, Any]]) -> float | None:
    train = [(entry["step"], entry.get("top1")) for entry in entries if entry["split"] == "train"]
    right = steps = 0.0
    for (step, top1), (before, _) in zip(reversed(train), reversed([(0, None), *train][:-1]), strict=True):
        if top1 is not None and step > before:
            right, steps = right + (step - before) * top1, steps + step - before
        if steps >= TRAIN_STEPS:
            break
    return right / steps if steps else None


def read_outcome(cell: Cell, metric: str) -> dict[str, Any]:
    """Reads the outcome of a cell so far from its metrics.

    Returns:
      steps; test_accuracy and dev_accuracy (the metric in the last entry of each split); train_accuracy (top-1 on the
      augmented images of the last log intervals, of `TRAIN_STEPS` steps or more); images_per_second (median over
      training); seconds of wall time. Values that are not known yet are None.
    """
    entries = read_metrics(cell.metrics_file())
    last: dict[str, dict[str, Any]] = {entry["split"]: entry for entry in entries}
    train = [e["images_per_second"] for e in entries if e["split"] == "train" and e.get("images_per_second")]
    return {
        "steps": max((entry["step"] for entry in entries), default=0),
        "test_accuracy": last.get("test", {}).get(metric),
        "train_accuracy": _train_accuracy(entries),
        "dev_accuracy": last.get("dev", {}).get(metric),
        "images_per_second": statistics.median(train) if train else None,
        "seconds": max((entry.get("seconds", 0.0) for entry in entries), default=0.0),
    }


def final_outcome(cell: Cell, metric: str, split: Literal["dev", "test"]) -> dict[str, Any]:
    """Returns the `read_outcome` of a cell that is done.

    Raises:
      BadDataError: its accuracy on the split is lost.
      ConfigError: it was trained with another config than the study says.
    """
    cell.check_config()
    outcome = read_outcome(cell, metric)
    accuracy = outcome[f"{split}_accuracy"]
    if accuracy is None or not math.isfinite(accuracy):
        fix = f"restore its {METRICS}, or delete the directory to run it again"
        raise BadDataError(f"{cell.name} is done, but its accuracy is not known", str(cell.directory), fix)
    return outcome
