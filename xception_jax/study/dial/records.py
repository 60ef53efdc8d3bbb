"""Reads and writes the directory of a dial study.

study.json                     the design as data, and when it was stated and extended
banks.csv                      one row for each bank and seed: strength, Bayes accuracy, measured dial, marginals
cells.csv                      one row for each finished cell
networks/                      the variables of each counted cell, as .npz, written before its row
report.md, figures/
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xception_jax.errors import ConfigError, InputMissingError
from xception_jax.files import write_atomically
from xception_jax.study.dial.banks import BankSpec
from xception_jax.study.dial.design import ADDABLE, COUNTED, DialCell, DialStudy, Row, Tuning, check_dial
from xception_jax.study.dial.network import DialArm
from xception_jax.study.dial.training import Recipe
from xception_jax.user_files import read_json, read_text, reading, writing

STUDY, BANKS, CELLS, NETWORKS = "study.json", "banks.csv", "cells.csv", "networks"
_KIND = "dial"

CELL_COLUMNS = (
    "stage", "arm", "bank", "seed", "rate", "form", "depth", "segments", "multiplier", "ends", "widths", "weights",
    "live_parameters", "multiply_adds", "steps", "accuracy", "train_accuracy", "loss", "curve", "pulled_within",
    "pulled_across", "seconds", "cpu_seconds", "design",
)  # fmt: skip
BANK_COLUMNS = (
    "bank", "seed", "strength", "bayes_accuracy", "bayes_error", "within", "across", "rank_within", "rank_across",
    "from_means", "from_sums",
)  # fmt: skip
_KEYS = {CELLS: ("stage", "arm", "bank", "seed"), BANKS: ("bank", "seed")}

_TEXTS = {"stage", "arm", "bank", "form", "ends", "widths", "curve", "design"}  # columns that are not numbers

Record = dict[str, str]


def is_dial(root: Path) -> bool:
    """Returns whether a directory holds a dial study."""
    try:
        return read_json(root / STUDY, dict).get("kind") == _KIND
    except (OSError, ValueError):
        return False


def read_dial(root: Path) -> tuple[DialStudy, tuple[Mapping[str, Any], ...]]:
    """Reads the design of a study directory, and its history.

    Raises:
      InputMissingError: there is no dial study.
      BadDataError: study.json is damaged.
    """
    if not is_dial(root):
        raise InputMissingError("there is no dial study", str(root), "name the --workdir of `xception-jax study run`")
    with reading("study", root / STUDY, "restore it from a copy"):
        data = read_json(root / STUDY, dict)
        return check_dial(_from_design(data["study"]), STUDY), tuple(data["history"])


def _from_design(data: Mapping[str, Any]) -> DialStudy:
    tuning = data["tuning"]
    return DialStudy(
        **dict(data)
        | {
            "rows": tuple(Row(DialArm(**row["arm"]), _specs(row["banks"])) for row in data["rows"]),
            "seeds": tuple(data["seeds"]),
            "recipe": Recipe(**data["recipe"]),
            "tuning": Tuning(tuple(tuning["rates"]), _specs(tuning["banks"]), tuning["seed"]),
        }
    )


def _specs(banks: list[dict[str, Any]]) -> tuple[BankSpec, ...]:
    return tuple(BankSpec(**bank) for bank in banks)


def state(root: Path, study: DialStudy) -> None:
    """Stores the design of a study, before its first cell.

    Raises:
      ConfigError: there are cells of another design. Seeds may be added, and rates as long as no cell counts.
    """
    history: tuple[Mapping[str, Any], ...] = ()
    if (root / STUDY).exists() and not is_dial(root):
        what = "the directory has another study, or its study.json is damaged"
        raise ConfigError(what, str(root / STUDY), "choose another study directory, or restore it from a copy")
    change, records = "stated", read_records(root, CELLS)
    counted = sum(row["stage"] == COUNTED for row in records)
    if (records or read_records(root, BANKS)) and (root / STUDY).exists():
        before, history = read_dial(root)
        change = ", ".join(_additions(before, study, not counted, root))
        if not change:
            return
    entry = {
        "time": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "change": change,
        "cells_done": counted,
        "design": study.design_hash(),
    }
    data = {"kind": _KIND, "study": study.design(), "history": [*history, entry]}
    with writing("study", root / STUDY):
        write_atomically(root / STUDY, json.dumps(data, indent=1) + "\n")


def _additions(before: DialStudy, after: DialStudy, rates_too: bool, root: Path) -> list[str]:
    """Returns what was added to a study. Raises ConfigError if anything else has changed."""
    if rates_too and set(before.tuning.rates) <= set(after.tuning.rates):
        tuning = dataclasses.replace(before.tuning, rates=after.tuning.rates)
    else:
        tuning = before.tuning
    then, now = dataclasses.replace(before, tuning=tuning).design(), after.design()
    removed = sorted(set(before.seeds) - set(after.seeds))
    details = [name for name in now if name not in ADDABLE and now[name] != then[name]]
    details += [f"seed {seed} was removed" for seed in removed]
    if details:
        raise ConfigError(
            "the study has changed since its first cells",
            str(root / STUDY),
            "undo the changes or choose another study directory; seeds may be added, and rates until a cell counts",
            details,
        )
    pairs = {"seeds": (before.seeds, after.seeds), "rates": (before.tuning.rates, after.tuning.rates)}
    return [f"added {what} {sorted(set(b) - set(a))}" for what, (a, b) in pairs.items() if set(b) - set(a)]


def read_records(root: Path, name: str) -> list[Record]:
    """Returns the rows of cells.csv or banks.csv; [] if there is no such file.

    Raises:
      BadDataError: the file is damaged.
    """
    path = root / name
    if not path.exists():
        return []
    with reading("table", path, "restore it from a copy, or delete it to compute it again"):
        rows = list(csv.DictReader(io.StringIO(read_text(path))))
        columns = CELL_COLUMNS if name == CELLS else BANK_COLUMNS
        for row in rows:
            if tuple(row) != columns or None in row.values():
                raise ValueError(f"a row has other columns than {', '.join(columns)}")
            for column in set(columns) - _TEXTS:
                float(row[column])
        twice = [key for key, count in Counter(record_key(name, row) for row in rows).items() if count > 1]
        if twice:
            raise ValueError(f"two rows are about {' '.join(twice[0])}")
        return rows


def add_record(root: Path, name: str, row: Mapping[str, Any]) -> None:
    """Adds a row to cells.csv or banks.csv, or replaces the one of the same cell or bank.

    Raises:
      StorageError: the file cannot be written.
    """
    columns = CELL_COLUMNS if name == CELLS else BANK_COLUMNS
    new = {column: _text(row[column]) for column in columns}
    rows = [old for old in read_records(root, name) if record_key(name, old) != record_key(name, new)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, new])
    with writing("table", root / name):
        write_atomically(root / name, buffer.getvalue())


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def save_network(root: Path, cell: DialCell, variables: Mapping[str, np.ndarray]) -> None:
    """Writes the variables of a cell's network to networks/ARM.BANK.SEED.npz.

    Raises:
      StorageError: the file cannot be written.
    """
    path = network_path(root, cell.arm, cell.bank.name, cell.seed)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = dict(variables)  # NumPy's types do not tell its options from arrays
    np.savez_compressed(buffer, **arrays)
    with writing("network", path):
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, buffer.getvalue())


def network_path(root: Path, arm: str, bank: str, seed: int) -> Path:
    """Returns the file with the variables of a counted cell's network."""
    return root / NETWORKS / f"{arm}.{bank}.{seed}.npz"


def record_key(name: str, row: Mapping[str, str]) -> tuple[str, ...]:
    """Returns what identifies a row; for a cell, that is `DialCell.key`."""
    key = tuple(row[column] for column in _KEYS[name])
    return (*key, row["rate"] if row["stage"] != COUNTED else "") if name == CELLS else key


def done(root: Path) -> set[tuple[str, ...]]:
    """Returns the keys of the finished cells."""
    return {record_key(CELLS, row) for row in read_records(root, CELLS)}


def cell_record(study: DialStudy, cell: DialCell, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row of a cell."""
    arm, cost = study.arm(cell.arm), study.costs()[cell.arm]
    return {
        **dataclasses.asdict(arm),
        **dataclasses.asdict(cost),
        **values,
        "stage": cell.stage,
        "arm": cell.arm,
        "bank": cell.bank.name,
        "seed": cell.seed,
        "rate": cell.rate,
        "steps": study.steps(arm),
        "design": study.design_hash(),
    }
