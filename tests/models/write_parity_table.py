"""Writes docs/data/parity.csv, and prints the tables of docs/explanation/parity.md.

They say how far our networks are from those of Keras.

PYTHONPATH=. python tests/models/write_parity_table.py
"""

from __future__ import annotations

import csv
import importlib.metadata
import operator
import platform
import re
import sys
from pathlib import Path

import jax.numpy as jnp
from keras_weights import build_reference, keras_floatx
from parity import (
    Difference,
    difference,
    forward_differences,
    keras_outputs,
    keras_step,
    our_outputs,
    our_step,
    random_images,
)

SIZES = {"xception": (299, 224, 150, 71), "inception_v3": (299, 224, 150, 75)}
TITLES = {"xception": "Xception", "inception_v3": "Inception V3"}
STEP = "one training step"
CSV = Path(__file__).parents[2] / "docs" / "data" / "parity.csv"

Row = tuple[str, str, str, str, Difference]  # network, type, image size or step, output, difference


def measure() -> list[Row]:
    """Computes every difference that the tests bound."""
    rows: list[Row] = []

    def add(network, dtype, column, differences):
        rows.extend((network, dtype, column, name, found) for name, found in differences.items())
        print(f"{network}, {dtype}, {column}", file=sys.stderr)

    for network, sizes in SIZES.items():
        for dtype, dtype_sizes in (("float64", sizes), ("float32", (299,))):
            with keras_floatx(dtype):
                reference = build_reference(network, dtype)
                for size in dtype_sizes:
                    images = random_images(size, 1, dtype)
                    ours = our_outputs(reference.model, reference.variables, images)
                    differences = forward_differences(ours, keras_outputs(reference, images))
                    add(network, dtype, f"{size} px", {name: differences[name] for name in sorted(ours, key=in_depth)})
                if dtype == "float64":
                    images, labels = random_images(sizes[-1], 4, dtype, seed=3), jnp.array([3, 141, 592, 653])
                    ours = our_step(reference.model, reference.variables, images, labels)
                    add(network, dtype, STEP, step_differences(ours, keras_step(reference, images, labels)))
    return rows


def in_depth(name: str) -> tuple:
    """Sorts blocks by their number, then what comes after them."""
    number = re.search(r"\d+", name)
    return (0, int(number[0])) if number else (1, name != "pre_logits")


def step_differences(ours, theirs) -> dict[str, Difference]:
    """Returns the difference of the loss, and the worst of all gradients and of all running averages."""
    found = {"loss": difference(ours.loss, theirs.loss)}
    for name, collection in (("gradients", "params"), ("running averages", "batch_stats")):
        paths = [path for path in theirs.values if path[0] == collection]
        each = [difference(ours.values[path], theirs.values[path]) for path in paths]
        for kind in ("absolute", "relative"):
            found[f"{name}, worst {kind} of {len(each)} tensors"] = max(each, key=operator.attrgetter(kind))
    return found


def markdown(rows: list[Row], network: str) -> str:
    """Returns one line for each output and one column for each size: absolute differences."""
    table: dict[str, dict[str, Difference]] = {}
    for row_network, dtype, column, name, found in rows:
        if row_network == network and column != STEP:
            table.setdefault(name, {})[f"{column}, {dtype}"] = found
    columns = list(next(iter(table.values())))
    lines = [f"| {TITLES[network]} | largest value | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, cells in table.items():
        largest = max(found.largest for found in cells.values())
        lines.append(f"| {name} | {largest:.1f} | " + " | ".join(f"{cells[c].absolute:.1e}" for c in columns) + " |")
    return "\n".join(lines)


def step_markdown(rows: list[Row]) -> str:
    """Returns the table of the training steps; each line is about one tensor."""
    lines = ["| one training step, float64 | largest value | absolute | relative |", "|---|---|---|---|"]
    for network, _, column, name, found in rows:
        if column == STEP:
            cells = f"{found.largest:.2g} | {found.absolute:.1e} | {found.relative:.1e}"
            lines.append(f"| {TITLES[network]}: {name} | {cells} |")
    return "\n".join(lines)


def provenance() -> str:
    """Returns one line: the command, the versions and the processor."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "keras", "numpy")
    )
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = found[1] if found else platform.processor()
    return (
        f"`PYTHONPATH=. python tests/models/write_parity_table.py`; Python {platform.python_version()}, {versions} "
        f"(Keras on its JAX backend); {processor}"
    )


def main() -> None:
    rows = measure()
    CSV.parent.mkdir(parents=True, exist_ok=True)
    with CSV.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("network", "dtype", "images", "output", "absolute", "relative", "largest"))
        for network, dtype, column, name, found in rows:
            numbers = (f"{found.absolute:.3e}", f"{found.relative:.3e}", f"{found.largest:.6g}")
            writer.writerow((network, dtype, column, name, *numbers))
    print(provenance())
    for network in SIZES:
        print("\n" + markdown(rows, network))
    print("\n" + step_markdown(rows))


if __name__ == "__main__":
    main()
