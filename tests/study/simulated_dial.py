"""Directories of dial studies whose cells were never trained: accuracies are given, files are those of a run."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np

from configs.studies.dial import get_study
from xception_jax.study.dial.banks import make_bank, measure
from xception_jax.study.dial.design import Row, counted_cells, tuning_cells
from xception_jax.study.dial.records import BANK_COLUMNS, BANKS, CELL_COLUMNS, CELLS, cell_record, state

BEST_RATE = 0.04
"""The rate that the cells choose which choose the rates, for all arms."""

MEASURED = ("accuracy", "train_accuracy", "loss", "seconds", "cpu_seconds", "pulled_within", "pulled_across")


def simulate(root, effect, *, size="cpu", seeds=(0, 1, 2, 3), bank_change=None, cell_change=None, arms=None, free=True):
    """Writes the directory of a study.

    Args:
      root: the directory.
      effect: returns the accuracy of (arm, bank name, measured dial across).
      size: size of the study.
      seeds: of the study.
      arms: names of the arms that the study has; by default all.
      free: whether arms are trained on the free bank.
      bank_change, cell_change: change a row of a cell that counts, given as a dict, before it is written.
    """
    study = dataclasses.replace(get_study(size), seeds=seeds)
    if arms is not None:
        study = dataclasses.replace(study, rows=tuple(row for row in study.rows if row.arm.name in arms))
    if not free:
        rows = (Row(row.arm, tuple(bank for bank in row.banks if bank.name != "free")) for row in study.rows)
        study = dataclasses.replace(study, rows=tuple(row for row in rows if row.banks))
    root.mkdir(parents=True, exist_ok=True)
    state(root, study)
    rng = np.random.default_rng(0)
    banks, cells = {}, []
    for cell in tuning_cells(study):
        accuracy = 0.9 - (0.1 if cell.rate != BEST_RATE else 0)
        cells.append(cell_record(study, cell, {name: accuracy for name in MEASURED} | {"curve": (0.5, accuracy)}))
    for cell in counted_cells(study, {row.arm.name: BEST_RATE for row in study.rows}):
        key = cell.bank.name, cell.seed
        if key not in banks:
            dial = dataclasses.asdict(measure(make_bank(cell.bank, cell.seed)))
            banks[key] = {
                "bank": cell.bank.name, "seed": cell.seed, "strength": 5.4, "bayes_error": 3e-4,
                "bayes_accuracy": 0.97 + rng.normal(0, 3e-4), "from_means": 0.17, "from_sums": 0.15, **dial,
            }  # fmt: skip
            (bank_change or dict)(banks[key])
        dial = banks[key]
        accuracy = effect(cell.arm, cell.bank.name, dial["across"]) + rng.normal(0, 1e-3)
        values = {
            "accuracy": accuracy, "train_accuracy": accuracy, "loss": 0.1, "curve": (0.5, accuracy), "seconds": 1.0,
            "cpu_seconds": 2.0, "pulled_within": dial["within"] + 0.02, "pulled_across": dial["across"] + 0.02,
        }  # fmt: skip
        row = cell_record(study, cell, values)
        (cell_change or dict)(row)
        cells.append(row)
    for name, columns, rows in ((BANKS, BANK_COLUMNS, banks.values()), (CELLS, CELL_COLUMNS, cells)):
        with open(root / name, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    return root
