"""Formats the results of an evaluation as text, and as tables of classes and of mistakes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from xception_jax.metrics import Metric
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.judgement import ClassScores, Judgement
from xception_jax.metrics.predictions import Predictions, class_average_precision, most_confused
from xception_jax.metrics.resampling import Estimate
from xception_jax.names import csv_cell, printable, printable_path
from xception_jax.user_files import write_output

MISTAKES_FIELDS = ("file", "index", "group", "label", "predicted", "probability", "label_probability")

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
    where = printable_path(metrics["source"]) + (f", checkpoint {metrics['step']}" if "step" in metrics else "")
    images = f"{metrics['count']:,} images"
    if metrics.get("unlabelled"):
        images += f", {metrics['unlabelled']:,} of them without a label"
    if metrics.get("damaged"):
        images += f"; {metrics['damaged']:,} damaged, left out"
    lines = [where, f"{printable(metrics['dataset'])}, {printable(metrics['split'])}: {images}"]
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
    text = f"{metrics[key]:.4f}" if math.isfinite(metrics[key]) else "-"
    if f"{key}_interval" in metrics:
        low, high = metrics[f"{key}_interval"]
        text += f"  [{low:.4f}, {high:.4f}]"
    if metrics.get(f"{key}_at_limit"):
        text += "  at its limit"  # of the search interval
    return text


def class_rows(predictions: Predictions, judgement: Judgement, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns one row per class, with the number of its images and how well they are recognized.

    All rows have precision, recall, f1, roc_auc, average_precision and equal_error_rate, and for each threshold
    that was chosen on the development split the threshold, sensitivity and specificity. Single-label rows also have
    right (number of correct predictions), accuracy, low and high (95 % Wilson interval), confused_with (the most
    frequent wrong prediction) and confused (its count). Without all probabilities, the average_precision of multi-label
    rows is a lower bound, and other areas are None, as are values of classes without images.
    """
    hits = predictions.classes[predictions.right & predictions.labelled, 0]
    right = np.bincount(hits, minlength=len(names))
    rows: list[dict[str, Any]] = [
        {
            "class": scores.label,
            "name": names[scores.label],
            "images": scores.support,
            **(_decisions(scores.support, int(right[scores.label])) if not predictions.multi_label else {}),
            **{field: _known(getattr(scores, field).value) for field in _FIELDS},
        }
        for scores in judgement.classes
    ]
    if predictions.multi_label and predictions.all_probabilities is None:
        for row, precision in zip(rows, class_average_precision(predictions), strict=True):
            row["average_precision"] = _known(float(precision))
    if not predictions.multi_label:
        confused: dict[int, tuple[int, int]] = {}
        for label, wrong, count in most_confused(predictions, len(predictions.label)):
            confused.setdefault(label, (wrong, count))
        for label, row in enumerate(rows):
            wrong, times = confused.get(label, (-1, 0))
            row |= {"confused_with": names[wrong] if times else None, "confused": times}
    for point in judgement.points:
        aim = point.threshold.aim
        rows[point.threshold.label] |= {
            f"{aim}_threshold": point.threshold.value,
            f"{aim}_sensitivity": _known(point.sensitivity.value),
            f"{aim}_specificity": _known(point.specificity.value),
        }
    return rows


_FIELDS = ("precision", "recall", "f1", "roc_auc", "average_precision", "equal_error_rate")


def _decisions(images: int, right: int) -> dict[str, Any]:
    accuracy = right / images if images else None
    low, high = wilson_interval(accuracy, images) if accuracy is not None else (None, None)
    return {"right": right, "accuracy": accuracy, "low": low, "high": high}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def write_csv(path: str, rows: Sequence[dict[str, Any]], fields: Sequence[str] = ()) -> None:
    """Writes rows to a CSV file with a header. A field that a row lacks is empty. Names do not become formulas.

    Args:
      path: the file.
      rows: at least one row, unless `fields` are given.
      fields: the columns; by default those of any row, in the order of their first occurrence.

    Raises:
      StorageError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(
        text, fields or list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    write_output("table", path, text.getvalue())


def judgement_as_dict(judgement: Judgement, names: Sequence[str]) -> dict[str, Any]:
    """Returns the numbers of a judgement for `evaluate --json`, with the names of the classes."""

    def row(scores: ClassScores) -> dict[str, Any]:
        fields = {name: value for name, value in vars(scores).items() if isinstance(value, Estimate)}
        return {"class": scores.label, "name": names[scores.label], "images": scores.support, **_flat(fields)}

    points = [
        {
            "class": point.threshold.label,
            "name": names[point.threshold.label],
            "aim": point.threshold.aim,
            "at": point.threshold.at,
            "threshold": point.threshold.value,
            **_flat({"sensitivity": point.sensitivity, "specificity": point.specificity}),
        }
        for point in judgement.points
    ]
    result = {
        "images": judgement.count,
        "groups": judgement.groups,
        "bootstrap_draws": judgement.draws,
        **_flat(judgement.overall),
        "classes": [row(scores) for scores in judgement.classes],
        "thresholds": points,
    }
    if judgement.by_group is not None:
        group = judgement.by_group
        estimates = _flat({"accuracy": group.accuracy, "roc_auc": group.roc_auc})
        result["by_group"] = {"count": group.count, "mixed": group.mixed, **estimates}
    return result


def _flat(estimates: dict[str, Estimate]) -> dict[str, Any]:
    """Returns each value, followed by its interval under the name with '_interval' if there is one."""
    flat: dict[str, Any] = {}
    for name, value in estimates.items():
        flat[name] = value.value
        if value.low is not None:
            flat[f"{name}_interval"] = (value.low, value.high)
    return flat
