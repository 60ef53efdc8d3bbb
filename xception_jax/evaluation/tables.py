"""Formats the results of an evaluation as text and as a table of classes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from xception_jax.errors import StorageError
from xception_jax.files import write_atomically
from xception_jax.metrics import Metric
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import Predictions, class_average_precision, most_confused

_SETS = {"": "weights", "ema_": "Polyak average"}


def as_text(metrics: dict[str, Any], prefixes: Sequence[str], measured: Sequence[Metric]) -> str:
    """Formats the metrics of an evaluation as text.

    Args:
      metrics: values by name, as printed by `evaluate --json`.
      prefixes: metric prefixes of the sets of variables, one column each.
      measured: the metrics of the evaluation.
    """
    rows = {metric.name: metric.title for metric in measured} | {
        "real_top1": "ReaL top-1",
        "real_top5": "ReaL top-5",
        "calibration_error": "calibration error",
        "temperature": "temperature",
        "calibration_error_after": "calibration error, scaled",
    }
    where = metrics["source"] + (f", checkpoint {metrics['step']}" if "step" in metrics else "")
    images = f"{metrics['count']:,} images"
    for name, meaning in (("unlabelled", "without a label"), ("damaged", "damaged")):
        images += f", {metrics[name]:,} of them {meaning}" if metrics.get(name) else ""
    lines = [where, f"{metrics['dataset']}, {metrics['split']}: {images}"]
    real_count = next((metrics[f"{prefix}real_count"] for prefix in prefixes if f"{prefix}real_count" in metrics), None)
    if real_count is not None:
        lines.append(f"ReaL labels for {real_count:,} of them")
    lines.append(f"{'':28}" + "".join(f"{_SETS[prefix]:<28}" for prefix in prefixes).rstrip())
    for key, label in rows.items():
        cells = [_cell(metrics, f"{prefix}{key}") for prefix in prefixes]
        if any(cells):
            lines.append(f"{label:<28}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
    return "\n".join(lines)


def _cell(metrics: dict[str, Any], key: str) -> str:
    if key not in metrics:
        return ""
    text = f"{metrics[key]:.4f}"
    if f"{key}_interval" in metrics:
        low, high = metrics[f"{key}_interval"]
        text += f"  [{low:.4f}, {high:.4f}]"
    if metrics.get(f"{key}_at_limit"):
        text += "  at its limit"  # of the search interval
    return text


def class_rows(predictions: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns one row per class, with the number of its images and how well they are recognized.

    Single-label rows have right (number of correct predictions), accuracy, low and high (95 % Wilson interval),
    confused_with (the most frequent wrong prediction) and confused (its count). Multi-label rows have
    average_precision, a lower bound unless all classes were saved. Values of classes without images are None.
    """
    if predictions.multi_label:
        images, precisions = predictions.label.sum(axis=0), class_average_precision(predictions)
        return [
            {
                "class": label,
                "name": names[label],
                "images": int(images[label]),
                "average_precision": None if math.isnan(precisions[label]) else float(precisions[label]),
            }
            for label in range(len(names))
        ]
    images = np.bincount(predictions.label, minlength=len(names))
    right = np.bincount(predictions.label[predictions.right], minlength=len(names))
    confused: dict[int, tuple[int, int]] = {}
    for label, wrong, count in most_confused(predictions, len(predictions.label)):
        confused.setdefault(label, (wrong, count))
    rows = []
    for label in range(len(names)):
        count = int(images[label])
        accuracy = int(right[label]) / count if count else None
        low, high = wilson_interval(accuracy, count) if accuracy is not None else (None, None)
        wrong, times = confused.get(label, (-1, 0))
        rows.append(
            {
                "class": label,
                "name": names[label],
                "images": count,
                "right": int(right[label]),
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "confused_with": names[wrong] if times else None,
                "confused": times,
            }
        )
    return rows


def write_csv(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows with the same fields to a CSV file with a header.

    Raises:
      StorageError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_atomically(path, text.getvalue())
    except OSError as error:
        raise StorageError(f"the table cannot be written: {error.strerror}", path, "choose another path") from None
