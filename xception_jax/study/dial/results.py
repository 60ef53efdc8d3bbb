"""Collects the accuracies of a dial study by arm, bank and seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from xception_jax.study.dial.banks import BankSpec
from xception_jax.study.dial.design import COUNTED, DialStudy, counted_cells
from xception_jax.study.dial.records import BANKS, CELLS, read_dial, read_records, record_key


@dataclasses.dataclass(frozen=True)
class DialResults:
    """All records of a study.

    Attributes:
      root: its directory.
      study: the study.
      history: history of its design.
      cells: rows of cells.csv.
      banks: rows of banks.csv.
    """

    root: Path
    study: DialStudy
    history: Sequence[Mapping[str, Any]]
    cells: Sequence[Mapping[str, str]]
    banks: Sequence[Mapping[str, str]]

    @property
    def counted(self) -> list[Mapping[str, str]]:
        """Returns the rows of the cells that count."""
        return [row for row in self.cells if row["stage"] == COUNTED]

    @property
    def planned(self) -> set[tuple[str, ...]]:
        """Returns the keys of the counted cells that the design has."""
        return {cell.key for cell in counted_cells(self.study, {})}

    @property
    def done(self) -> set[tuple[str, ...]]:
        """Returns the keys of the counted cells that are done."""
        return {record_key(CELLS, row) for row in self.counted}

    @property
    def complete(self) -> bool:
        """Returns whether all counted cells are done.

        Before that, no accuracy is shown: whoever knew some could stop, or change, what is still to come.
        """
        return self.planned <= self.done

    def of_cells(self, column: str, arm: str, bank: str) -> Float[np.ndarray, " seeds"]:
        """Returns a column of cells.csv for the counted cells of an arm on a bank, by seed; NaN for missing cells."""
        rows = (row for row in self.counted if (row["arm"], row["bank"]) == (arm, bank))
        return self._by_seed({row["seed"]: float(row[column]) for row in rows})

    def accuracy(self, arm: str, bank: str) -> Float[np.ndarray, " seeds"]:
        """Returns the accuracy of the counted cells of an arm on a bank, by seed; NaN for missing cells."""
        return self.of_cells("accuracy", arm, bank)

    def of_banks(self, column: str, bank: str) -> Float[np.ndarray, " seeds"]:
        """Returns a column of banks.csv, by seed; NaN for missing ones."""
        return self._by_seed({row["seed"]: float(row[column]) for row in self.banks if row["bank"] == bank})

    def _by_seed(self, values: Mapping[str, float]) -> Float[np.ndarray, " seeds"]:
        return np.array([values.get(str(seed), np.nan) for seed in self.study.seeds])

    def banks_of(self, *arms: str) -> tuple[BankSpec, ...]:
        """Returns the banks on which all these arms are trained."""
        rows = {row.arm.name: row.banks for row in self.study.rows}
        if not set(arms) <= set(rows):
            return ()
        return tuple(bank for bank in rows[arms[0]] if all(bank in rows[arm] for arm in arms))

    def dial_of(self, family: str, *arms: str) -> tuple[BankSpec, ...]:
        """Returns the banks of one family by angle, the free one included, on which all these arms are trained."""
        angles = (bank for bank in self.banks_of(*arms) if bank.unit == "angle")
        banks = [bank for bank in angles if bank.family == family or bank.name == "free"]
        return tuple(sorted(banks, key=lambda bank: bank.dial))


def collect_dial(root: Path) -> DialResults:
    """Reads a study directory.

    Raises:
      InputMissingError: there is no dial study.
      BadDataError: a file is damaged.
    """
    study, history = read_dial(root)
    return DialResults(root, study, history, read_records(root, CELLS), read_records(root, BANKS))
