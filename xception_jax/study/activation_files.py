"""Reads what a cell measured in front of its activations; activations.py writes it. JAX is not needed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xception_jax.names import csv_cell
from xception_jax.study.cells import ACTIVATIONS, Cell
from xception_jax.user_files import read_json, reading

ACTIVATION_COLUMNS = ("dead_start", "dead_end", "rms_start", "rms_end")  # of cells.csv
MOMENTS = ("start", "end")
ROW = ("arm", "seed", "moment", "layer", "map", "channels", "dead", "rms")
_TINY = 1e-30  # a layer whose channels are all zero has no logarithm


def read_activations(workdir: Path) -> dict[str, Any]:
    """Returns what `write_activations` wrote, or {} if there is nothing.

    Raises:
      BadDataError: the file is damaged.
    """
    path = workdir / ACTIVATIONS
    if not path.exists():
        return {}
    with reading("file of activations", path, "delete it; the cell then counts without it"):
        found = read_json(path, dict)
        for moment in MOMENTS:
            for layer in found[moment]:
                if not 0 <= layer["dead"] <= 1 or not 0 <= layer["rms"] < math.inf:
                    raise ValueError(f"layer {layer['layer']!r} has impossible values")
        return found


def activation_columns(found: Mapping[str, Any]) -> dict[str, float | None]:
    """Returns the columns of a cell: over layers, the mean share of dead channels and the geometric mean of the rms."""
    values = {}
    for moment in MOMENTS:
        layers = found.get(moment, ())
        dead, rms = [layer["dead"] for layer in layers], [layer["rms"] for layer in layers]
        values[f"dead_{moment}"] = float(np.mean(dead)) if dead else None
        values[f"rms_{moment}"] = float(np.exp(np.mean(np.log(np.maximum(rms, _TINY))))) if rms else None
    return {name: values[name] for name in ACTIVATION_COLUMNS}


def activations_csv(cells: Iterable[Cell]) -> str:
    """Returns what finished cells measured as CSV, a row for each layer at each moment; '' if none measured."""
    rows = []
    for cell in cells:
        if cell.state() == "done":
            found = read_activations(cell.directory)
            for moment in MOMENTS:
                rows += [{"arm": cell.arm, "seed": cell.seed, "moment": moment} | row for row in found.get(moment, ())]
    if not rows:
        return ""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ROW, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()
