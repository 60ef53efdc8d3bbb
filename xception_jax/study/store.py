"""Reads and writes a study directory.

study.json                   the study as data, the width and cost of each arm, the history of additions
cells/<arm>/seed<seed>/      the work directory of a cell, with cell.json (how it ended) and log.txt
search/<arm>/trial<number>/  the same for a trial of a search
report.html, report.md, figures/, cells.csv
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xception_jax.config import to_json
from xception_jax.errors import ConfigError, InputMissingError
from xception_jax.files import write_atomically
from xception_jax.logs.metrics_log import json_ready
from xception_jax.study.cells import Cell, choose_trials, search_cells, started_trials, study_cells
from xception_jax.study.controls import ArmCost, arm_cost, solve_costs
from xception_jax.study.design import Study
from xception_jax.study.study_file import study_from_json, study_to_json
from xception_jax.training.manifest import seal_of, sealed
from xception_jax.training.workdir import hold_directory
from xception_jax.user_files import read_json, reading, writing

STUDY = "study.json"


@dataclasses.dataclass(frozen=True)
class StoredStudy:
    """A study as its directory stores it.

    Attributes:
      root: the directory.
      study: the study.
      costs: the width and cost of each arm.
      history: changes of the design, oldest first: {'time', 'change', 'cells_done'}.
    """

    root: Path
    study: Study
    costs: Mapping[str, ArmCost]
    history: tuple[Mapping[str, Any], ...]

    def search(self) -> list[Cell]:
        """Returns the trials of the search, if there is one."""
        return search_cells(self.study, self.costs, self.root)

    def tuned(self) -> dict[str, dict[str, Any]]:
        """Returns the overrides that the search has chosen, by arm; empty without a search."""
        if not self.study.search:
            return {}
        return choose_trials(self.study, self.search()) | started_trials(self.study, self.costs, self.root)

    def cells(self) -> list[Cell]:
        """Returns all cells, with the overrides that the search has chosen so far."""
        return study_cells(self.study, self.costs, self.root, self.tuned())


def read_study(root: Path) -> StoredStudy:
    """Reads a study directory. No code from it is run.

    Raises:
      InputMissingError: there is no study.
      BadDataError: study.json is damaged.
    """
    root = root.absolute()
    if not (root / STUDY).exists():
        raise InputMissingError("there is no study", str(root), "name the --workdir of `xception-jax study run`")
    with reading("study", root / STUDY, "restore it from a copy"):
        data = read_json(root / STUDY, dict)
        if data.get("kind") == "dial":
            what = "this command does not work with a dial study"
            raise ConfigError(what, str(root / STUDY), "use `study run`, `study report` or `study kernels`")
        if (seal := data.pop("sha256", None)) is not None and seal != seal_of(data):
            raise ValueError("it was changed after the study was stated")
        study = study_from_json(data["study"])
        costs = {arm.name: _read_cost(study, arm.name, data["costs"][arm.name]) for arm in study.arms}
        return StoredStudy(root, study, costs, tuple(_read_event(event) for event in data["history"]))


@contextlib.contextmanager
def open_study(root: Path, study: Study, report: Callable[[str], None]) -> Iterator[StoredStudy]:
    """Creates or opens a study directory, and holds its lock while the context lasts.

    Args:
      root: the directory.
      study: the study as its file describes it now.
      report: called with a line for each addition since the last run, and with the progress of the control.

    Raises:
      WorkdirError: another runner holds the directory, or it cannot be written.
      ConfigError: the directory has cells of a different study, or no width satisfies the control.
    """
    root = root.absolute()
    with hold_directory(root):
        stored = read_study(root) if (root / STUDY).exists() else None
        if stored is not None and not _has_cells(root):
            stored = None  # nothing was measured, so the design may still change
        additions: list[str] = []
        if stored is not None:
            additions, refused = changes(stored.study, study)
            if refused:
                raise ConfigError(
                    f"the study has changed since its first cells: {len(refused)} differences",
                    str(root / STUDY),
                    "undo the changes or choose another study directory; only seeds and arms may be added",
                    refused,
                )
        for line in additions:
            report(f"added since the last run here: {line}")
        costs = solve_costs(study, {} if stored is None else stored.costs, report)
        history = [*(stored.history if stored else ())]
        if stored is None or additions:
            done = 0 if stored is None else sum(cell.state() == "done" for cell in stored.cells())
            change = "added " + ", ".join(additions) if additions else "stated"
            time = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            history.append({"time": time, "change": change, "cells_done": done})
        now = StoredStudy(root, study, costs, tuple(history))
        write_study(now)
        yield now


def _read_cost(study: Study, arm: str, data: dict[str, Any]) -> ArmCost:
    """Returns a stored cost. Studies of earlier releases lack the live costs, which are then counted."""
    data = {name: math.nan if value is None else value for name, value in data.items()}
    if not all(isinstance(value, int | float) for value in data.values()):
        raise ValueError(f"the cost of {arm!r} has a value that is not a number")
    if "live_parameters" in data:
        return ArmCost(**data)
    return arm_cost(study, study.arm(arm), data["width_multiplier"])


def _read_event(event: dict[str, Any]) -> dict[str, Any]:
    kinds = {"time": str, "change": str, "cells_done": int}
    if {name: type(value) for name, value in event.items()} != kinds:
        raise ValueError(f"an entry of the history has not exactly {', '.join(kinds)}")
    return event


def write_study(stored: StoredStudy) -> None:
    """Writes study.json."""
    data = {
        "study": study_to_json(stored.study),
        "costs": {name: json_ready(dataclasses.asdict(cost)) for name, cost in stored.costs.items()},
        "history": list(stored.history),
    }
    write_atomically(stored.root / STUDY, sealed(data))


def _has_cells(root: Path) -> bool:
    return any(next(root.glob(f"{part}/*/*"), None) for part in ("cells", "search"))


def write_report_files(root: Path, files: Mapping[str, str | bytes]) -> None:
    """Writes files of a report into a study directory, by name relative to it; figures are in figures/.

    Raises:
      StorageError: a file cannot be written.
    """
    with writing("directory of figures", root / "figures"):
        (root / "figures").mkdir(exist_ok=True)
    for name, content in files.items():
        with writing("report of the study", root / name, "free some space, then run the same command again"):
            write_atomically(root / name, content)


def changes(stored: Study, now: Study) -> tuple[list[str], list[str]]:
    """Compares a study with its stored version.

    Returns:
      (additions, refused): one line for each added seed or arm, which are always allowed, and one line for every other
      difference. A comparison may be added together with one of its arms.
    """
    additions: list[str] = []
    refused: list[str] = []
    old_arms = {arm.name: arm for arm in stored.arms}
    new_names = [arm.name for arm in now.arms if arm.name not in old_arms]
    additions += [f"arm {name}" for name in new_names]
    additions += [f"seed {seed}" for seed in now.seeds if seed not in stored.seeds]
    refused += [f"seed {seed} was removed" for seed in stored.seeds if seed not in now.seeds]
    now_arms = {arm.name: arm for arm in now.arms}
    for name, arm in old_arms.items():
        if name not in now_arms:
            refused.append(f"arm {name} was removed")
        elif arm != now_arms[name]:
            before, after = dataclasses.asdict(arm), dataclasses.asdict(now_arms[name])
            changed = [
                f"{field} {before[field]} -> {after[field]}" for field in before if before[field] != after[field]
            ]
            refused.append(f"arm {name}: {', '.join(changed)}")
    for comparison in now.comparisons:
        if comparison not in stored.comparisons and not {comparison.arm, comparison.baseline} & set(new_names):
            refused.append(f"comparison {comparison.name} ({comparison.expected}) is new, but its arms are not")
    refused += [f"comparison {c.name} was removed" for c in stored.comparisons if c not in now.comparisons]
    if to_json(stored.config) != to_json(now.config):
        refused.append("the base config")
    for field in dataclasses.fields(Study):
        if field.name in ("arms", "seeds", "comparisons", "interactions", "config", "budget"):
            continue
        before, after = getattr(stored, field.name), getattr(now, field.name)
        if before != after:
            refused.append(f"{field.name}: {before!r} -> {after!r}")
    refused += _changed_interactions(stored, now, set(new_names))
    return additions, refused


def _changed_interactions(stored: Study, now: Study, new_names: set[str]) -> list[str]:
    """Returns one line for each interaction that was changed in another way than by adding new arms."""
    before = {entry.name: entry for entry in stored.interactions}
    after = {entry.name: entry for entry in now.interactions}
    lines = [f"interaction {name} was removed" for name in before if name not in after]
    for name, entry in after.items():
        old = before.get(name)
        if old and (old.expected != entry.expected or not set(old.pairs) <= set(entry.pairs)):
            lines.append(f"interaction {name} was changed")
        added = set(entry.pairs) - set(old.pairs if old else ())
        if any(not new_names & set(pair) for pair in added) or (not old and not added):
            lines.append(f"interaction {name} has new pairs, but their arms are not new")
    return lines
