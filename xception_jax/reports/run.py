"""Writes the report of a run: its results, curves, errors, examples, cost and config in one HTML file."""

from __future__ import annotations

import base64
import io
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from markupsafe import Markup
from PIL import Image

from xception_jax.config import FIELDS, ExperimentConfig, default_values, flatten, to_json
from xception_jax.files import write_atomically
from xception_jax.metrics import Metric, main_metric, metrics_of
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import (
    Predictions,
    class_average_precision,
    confusion_matrix,
    expected_calibration_error,
    most_confused,
)
from xception_jax.reports.curves import Line, line_figure
from xception_jax.reports.environment import format_heading, make_environment
from xception_jax.reports.style import BLUE, GREY, VERMILION

_MAX_CLASSES = 30  # a larger confusion matrix is not readable
_MAX_ROWS = 20
_THUMBNAIL = 160  # pixels


class RunInfo(TypedDict, total=False):
    """Facts about a run besides its config and metrics. Absent keys are left out of the report."""

    devices: str  # '8 x NVIDIA H100'
    parameters: int
    multiply_adds: int  # of a forward pass on one image
    total_steps: int
    wall_seconds: float  # total over all starts of the run
    seconds_to_first_step: float  # of the last start
    eval_images_per_second: float
    peak_memory_bytes: int  # of one device
    command: str
    commit: str
    versions: dict[str, str]


def choose_examples(predictions: Predictions, count: int = 12) -> tuple[list[int], list[int]]:
    """Returns the indices of the examples in a report: an even sample, and the most confident mistakes."""
    number = min(count, len(predictions.index))
    sample = np.linspace(0, len(predictions.index), number, endpoint=False).astype(int)
    wrong = np.flatnonzero(predictions.labelled & ~predictions.right)
    surest = wrong[np.argsort(-predictions.probabilities[wrong, 0], kind="stable")][:count]
    return predictions.index[sample].tolist(), predictions.index[surest].tolist()


def write_report(
    workdir: str | os.PathLike[str],
    *,
    config: ExperimentConfig,
    metrics: Sequence[dict[str, Any]],
    info: RunInfo,
    predictions: Predictions | None = None,
    class_names: Sequence[str] = (),
    images: Mapping[int, np.ndarray] | None = None,
) -> Path:
    """Writes `workdir`/report.html. Parts without input, such as after an interruption, are left out.

    Args:
      workdir: the work directory.
      config: the config of the run.
      metrics: the entries of metrics.jsonl.
      info: further facts.
      predictions: predictions on the test split.
      class_names: names in the order of the classes; a class without a name is shown with its number.
      images: uint8 [h, w, 3] by index; only those of `choose_examples` are shown.

    Returns:
      The path of the report.

    Raises:
      OSError: the report could not be written. An older report is then unchanged.
    """
    names = [*class_names, *(f"class {i}" for i in range(len(class_names), config.model.num_classes))]
    multi_label = config.loss.multi_label
    last_step = max((entry["step"] for entry in metrics), default=0)
    context = {
        "title": config.name or Path(workdir).resolve().name,
        "config": config,
        "config_json": to_json(config),
        "changes": _changes(config),
        "info": info,
        "last_step": last_step,
        "interrupted": last_step < info.get("total_steps", 0),
        "measures": [metric for metric in metrics_of(config) if _was_measured(metric, metrics)],
        "result": _result(config, metrics),
        "figures": _figures(config, metrics),
        "multi_label": multi_label,
        "errors": None if predictions is None else _errors(predictions, names),
        "examples": _examples(predictions, names, images) if predictions is not None and images else [],
        "train_images_per_second": _median(metrics, "images_per_second"),
    }
    path = Path(workdir) / "report.html"
    write_atomically(path, make_environment(Path(__file__).parent).get_template("run.html").render(context).encode())
    return path


def _median(metrics: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [entry[name] for entry in metrics if entry["split"] == "train" and entry.get(name) is not None]
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else None


def _changes(config: ExperimentConfig) -> list[tuple[str, Any, Any, str]]:
    """Returns (field, value, default, source of the default) of each field that differs from its default."""
    defaults = default_values(config)
    return [
        (name, value, defaults[name], FIELDS[name].source)
        for name, value in flatten(config).items()
        if value != defaults[name] and name != "name"
    ]


def _was_measured(metric: Metric, metrics: Sequence[dict[str, Any]]) -> bool:
    return any(prefix + metric.name in entry for entry in metrics for prefix in ("", "ema_"))


def _result(config: ExperimentConfig, metrics: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the result on the test split, or else the last one on the development split, as rows of a table."""
    entries = [entry for split in ("dev", "test") for entry in metrics if entry["split"] == split]
    if not entries:
        return None
    entry = entries[-1]
    rows = []
    # The Polyak average comes first because the paper evaluates it. Taking the better one would select on test data.
    for label, prefix in (("Polyak average", "ema_"), ("last weights", "")):
        values = {name.removeprefix(prefix): value for name, value in entry.items() if name.startswith(prefix)}
        main = values.get(main_metric(config).name)
        if main is not None:
            low, high = wilson_interval(main, entry.get("count", 0))
            rows.append({"label": label, "averaged": bool(prefix), "main": main, "low": low, "high": high, **values})
    split = {"test": config.data.test_split, "dev": config.data.eval_split}[entry["split"]]
    return {**entry, "rows": rows, "split": split, "is_test": entry["split"] == "test"} if rows else None


def _figures(config: ExperimentConfig, metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    train, raw, average = (
        {"color": GREY, "linewidth": 1},
        {"color": BLUE, "linewidth": 1.6},
        {"color": VERMILION, "linewidth": 1.6, "linestyle": (0, (4, 2))},
    )
    main = main_metric(config)

    def lines(name: str) -> list[Line]:
        return [
            Line("train", name, "training", train),
            Line("dev", name, "development", raw),
            Line("dev", f"ema_{name}", "development, Polyak average", average),
        ]

    smoothing = config.loss.label_smoothing
    loss_note = "The training loss is over augmented images" + (
        f" with label smoothing {smoothing:g}" * bool(smoothing)
    )
    figures = [
        ("Loss", loss_note + ".", line_figure(metrics, lines("loss"))),
        (format_heading(main.title), "", line_figure(metrics, lines(main.name), percent=main.is_share)),
        ("Learning rate", "", line_figure(metrics, [Line("train", "learning_rate", "", raw)])),
    ]
    # Not escaped: the figures contain no names or values from outside.
    return [{"title": t, "note": note, "svg": Markup(svg)} for t, note, svg in figures if svg]


def _errors(predictions: Predictions, names: list[str]) -> dict[str, Any]:
    """Returns the errors by class: a confusion matrix, the most confused pairs, or average precisions."""
    n, right = int(predictions.labelled.sum()), int(predictions.right.sum())
    errors: dict[str, Any] = {"n": n, "right": right, "share": right / n if n else math.nan, "depth": 0}
    if predictions.multi_label:
        precisions, counts = class_average_precision(predictions), predictions.label.sum(axis=0)
        order = [int(c) for c in np.argsort(-np.nan_to_num(precisions, nan=-1), kind="stable") if counts[c]]
        shown = order if len(order) <= _MAX_CLASSES else order[: _MAX_ROWS // 2] + order[-_MAX_ROWS // 2 :]
        rows = [(names[c], int(counts[c]), float(precisions[c])) for c in shown]
        return errors | {
            "kind": "precision",
            "rows": rows,
            "classes": len(order),
            "depth": predictions.classes.shape[1],
        }
    errors["calibration"] = expected_calibration_error(predictions)
    if len(names) > _MAX_CLASSES:
        totals = np.bincount(predictions.label, minlength=len(names))
        pairs = [(names[a], names[b], k, k / totals[a]) for a, b, k in most_confused(predictions, _MAX_ROWS)]
        return errors | {"kind": "pairs", "rows": pairs}
    matrix = confusion_matrix(predictions, len(names))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # Opacity of the cells. Mistakes are rare, and the square root makes them visible beside the diagonal.
    tints = np.where(np.eye(len(names), dtype=bool), shares, np.sqrt(shares)).round(3)
    cells = [list(zip(*row, strict=True)) for row in zip(matrix.tolist(), tints.tolist(), strict=True)]
    return errors | {"kind": "matrix", "rows": list(zip(names, cells, strict=True))}


def _examples(
    predictions: Predictions, names: list[str], images: Mapping[int, np.ndarray]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Returns groups of examples, each with its heading and one card per image."""
    position = {int(index): i for i, index in enumerate(predictions.index)}

    def card(index: int) -> dict[str, Any]:
        i = position[index]
        label = predictions.label[i]
        true = np.flatnonzero(label) if predictions.multi_label else [label]
        best = list(zip(predictions.classes[i], predictions.probabilities[i], strict=True))
        guesses = [(names[c], float(p), c in true) for c, p in (best[:3] if predictions.multi_label else best[:1])]
        return {
            "index": index,
            "source": _data_uri(images[index]),
            "pixelated": max(images[index].shape[:2]) <= 64,
            "right": bool(predictions.right[i]),
            "true": ", ".join(names[c] for c in true) or "no label",
            "guesses": guesses,
        }

    sample, mistakes = choose_examples(predictions)
    groups = [("Even sample", sample), ("Most confident mistakes", mistakes)]
    shown = [(title, [card(index) for index in chosen if index in images]) for title, chosen in groups]
    return [(title, cards) for title, cards in shown if cards]


def _data_uri(pixels: np.ndarray) -> str:
    """Returns a small version of an image for the `src` of an <img> element."""
    image = Image.fromarray(pixels.squeeze())
    buffer = io.BytesIO()
    if max(image.size) <= 64:
        image.save(buffer, "PNG")
    else:  # JPEG makes photographs ten times smaller
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        image.save(buffer, "JPEG", quality=85)
    kind = "png" if max(pixels.shape[:2]) <= 64 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
