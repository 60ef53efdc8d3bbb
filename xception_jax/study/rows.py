"""Returns the raw data of a study: a row of values for each cell, as in cells.csv."""

from __future__ import annotations

import dataclasses
from typing import Any

from xception_jax.study.activation_files import ACTIVATION_COLUMNS, activation_columns, read_activations
from xception_jax.study.cells import Cell, final_outcome, read_outcome
from xception_jax.study.store import StoredStudy

COLUMNS = (
    "arm", "seed", "exit_code", "test_accuracy", "dev_accuracy", "train_accuracy", "width_multiplier", "parameters",
    "live_parameters", "multiply_adds", "live_multiply_adds", "channels_per_segment", "images_per_second", "steps",
    "seconds", "cpu_seconds", "learning_rate", "weight_decay", "config_hash", "reused_from",
    *ACTIVATION_COLUMNS,
)  # fmt: skip
ACCURACIES = ("test_accuracy", "dev_accuracy", "train_accuracy")


def row_of(stored: StoredStudy, cell: Cell) -> dict[str, Any]:
    """Returns the row of a cell, with None for values that are not known.

    Raises:
      BadDataError: the cell is done, but has lost its test accuracy.
    """
    cost, config = stored.costs[cell.arm], cell.config
    metric = stored.study.metric
    outcome = final_outcome(cell, metric, "test") if cell.state() == "done" else read_outcome(cell, metric)
    record = cell.record()
    values = (
        dataclasses.asdict(cost)
        | outcome
        | {
            "arm": cell.arm,
            "seed": cell.seed,
            "exit_code": record.get("exit_code"),
            "cpu_seconds": record.get("cpu_seconds"),
            "learning_rate": config.schedule.learning_rate,
            "weight_decay": config.optimizer.weight_decay,
            "config_hash": cell.config_hash,
            "reused_from": record.get("reused_from", ""),
        }
        | activation_columns(read_activations(cell.directory) if cell.activations else {})
    )
    return {name: values[name] for name in COLUMNS}
