"""The cells of a study, arm x seed: their configs, their directories, and what each of them came to."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from xception_jax.config import ExperimentConfig, from_json, to_json
from xception_jax.errors import RESUMABLE_EXIT_CODES, SUCCESS_EXIT_CODE, ConfigError
from xception_jax.files import write_atomically
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.study.controls import ArmCost
from xception_jax.study.design import Study
from xception_jax.training.workdir import CHECKPOINTS, CONFIG, LOCK

RECORD = "cell.json"
LOG = "log.txt"

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
      seed: of everything random in it.
      directory: its work directory.
      config: resolved.
      trial: which trial of a search it is, if any.
    """

    arm: str
    seed: int
    directory: Path
    config: ExperimentConfig
    trial: int | None = None

    @property
    def name(self) -> str:
        """How a person calls it."""
        return f"{self.arm} seed {self.seed}" if self.trial is None else f"{self.arm} trial {self.trial}"

    @property
    def config_hash(self) -> str:
        """The first digits of the SHA-256 over config.json."""
        return hashlib.sha256(to_json(self.config).encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """Returns what was noted when the cell last ended: exit_code, attempts, seconds, reused_from; {} before."""
        try:
            return json.loads((self.directory / RECORD).read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def state(self) -> State:
        """Returns what is known of the cell from its record."""
        return state_of(self.record().get("exit_code"))

    def write_record(self, **values: Any) -> None:
        """Notes how the cell ended."""
        write_atomically(self.directory / RECORD, json.dumps(self.record() | values) + "\n")

    def prepare(self) -> None:
        """Creates the directory with the config, which is all that the cell's process reads.

        Raises:
          ConfigError: the directory has another config.
        """
        path = self.directory / CONFIG
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomically(path, to_json(self.config))
        elif to_json(from_json(path.read_text())) != to_json(self.config):
            raise ConfigError(
                f"cell {self.name} was started with another config",
                str(path),
                "move its directory away, or choose another study directory",
            )

    def take_over(self, other: Cell) -> None:
        """Copies what another cell of the same config has measured, without its checkpoints, as this one's result."""
        self.prepare()
        shutil.copyfile(other.directory / "metrics.jsonl", self.directory / "metrics.jsonl")
        self.write_record(**other.record() | {"config_hash": self.config_hash, "reused_from": other.config.name})

    def is_held(self) -> bool:
        """Whether a process trains in its directory: one that an earlier runner started, perhaps."""
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
    """Returns the cells that have not begun, each with the first finished one among the others of the same config.

    The name of the run does not count: equal configs have equal results.
    """

    def key(cell: Cell) -> str:
        return json.dumps(json.loads(to_json(cell.config)) | {"name": ""})

    finished: dict[str, Cell] = {}
    for cell in others:
        if cell.state() == "done":
            finished.setdefault(key(cell), cell)
    begun = (CHECKPOINTS, RECORD)
    new = (cell for cell in cells if not any((cell.directory / name).exists() for name in begun))
    pairs = ((cell, finished.get(key(cell))) for cell in new)
    return [(cell, other) for cell, other in pairs if other is not None]


def study_cells(
    study: Study, costs: Mapping[str, ArmCost], root: Path, tuned: Mapping[str, Mapping[str, Any]]
) -> list[Cell]:
    """Returns all cells, seed by seed, so that an unfinished study has whole pairs.

    Args:
      study: with its arms and seeds.
      costs: by arm.
      root: the study directory.
      tuned: by arm, what the search chose; empty without one.
    """
    cells = []
    for seed in study.seeds:
        for arm in study.arms:
            config = _cell_config(study, arm.name, costs, seed, tuned.get(arm.name, {}))
            cells.append(Cell(arm.name, seed, root / "cells" / arm.name / f"seed{seed}", config))
    return cells


def search_cells(study: Study, costs: Mapping[str, ArmCost], root: Path) -> list[Cell]:
    """Returns the trials of the study's search; they never see the test split."""
    if study.search is None:
        return []
    cells = []
    for number, trial in enumerate(study.search.trials):
        for arm in study.arms:
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
    own = {"seed": seed, "model.width_multiplier": width, "name": f"{study.name}, {arm_name}, seed {seed}"}
    return study.arm_config(arm, own)


def choose_trials(study: Study, cells: list[Cell]) -> dict[str, dict[str, Any]]:
    """Returns what the search found best for each arm: the accuracy on the development split decides.

    A trial that diverged loses; of equals the first is taken. An arm without any finished trial is left out.
    """
    assert study.search is not None
    best: dict[str, tuple[float, int]] = {}
    for cell in cells:
        assert cell.trial is not None
        if cell.state() != "done":
            continue
        accuracy = read_outcome(cell, study.metric)["dev_accuracy"]
        if accuracy is not None and (cell.arm not in best or (accuracy, -cell.trial) > best[cell.arm]):
            best[cell.arm] = (accuracy, -cell.trial)
    return {arm: dict(study.search.trials[-negative]) for arm, (_, negative) in best.items()}


def read_outcome(cell: Cell, metric: str) -> dict[str, Any]:
    """Returns what a cell's metrics.jsonl says so far; None for what is not there.

    Returns:
      steps; test_accuracy and dev_accuracy (the metric at the last step of each split); images_per_second (median over
      the training); seconds of wall time.
    """
    entries = read_metrics(cell.directory / "metrics.jsonl")
    last: dict[str, dict[str, Any]] = {entry["split"]: entry for entry in entries}
    train = [e["images_per_second"] for e in entries if e["split"] == "train" and e.get("images_per_second")]
    return {
        "steps": max((entry["step"] for entry in entries), default=0),
        "test_accuracy": last.get("test", {}).get(metric),
        "dev_accuracy": last.get("dev", {}).get(metric),
        "images_per_second": statistics.median(train) if train else None,
        "seconds": max((entry.get("seconds", 0.0) for entry in entries), default=0.0),
    }
