"""Writes the report of a run: results, judgement, mistakes, curves, cost and config in one HTML file."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from markupsafe import Markup

from xception_jax.config import FIELDS, ExperimentConfig, default_values, flatten, to_json
from xception_jax.files import write_atomically
from xception_jax.logs import goodput
from xception_jax.metrics import Metric, main_metric, metrics_of
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.judgement import Judgement
from xception_jax.metrics.predictions import Predictions
from xception_jax.names import printable
from xception_jax.reports.curves import Line, line_figure
from xception_jax.reports.environment import format_heading, make_environment
from xception_jax.reports.judgement import judgement_context
from xception_jax.reports.mistakes import MAX_CELL_IMAGES, MAX_IMAGES, Cards, errors_context
from xception_jax.reports.style import BLUE, GREY, VERMILION, themed


class RunInfo(TypedDict, total=False):
    """Facts about a run besides its config and metrics. Absent keys are left out of the report."""

    devices: str  # '8 x NVIDIA H100'
    parameters: int
    live_parameters: int  # without weights that meet only padding
    multiply_adds: int  # of a forward pass on one image
    live_multiply_adds: int  # without products of padding
    total_steps: int
    steps_per_epoch: float
    wall_seconds: float  # total over all starts of the run
    seconds_to_first_step: float  # of the last start
    time_spent: dict[str, float]  # seconds of each of `goodput.ACTIVITIES`, over all starts
    eval_images_per_second: float
    peak_memory_bytes: int  # of one device
    command: str
    commit: str
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Live:
    """A report of a run that goes on. The page reloads itself until it finds the report of the finished run.

    Attributes:
      written: when the report is written, in seconds since 1970.
      seconds: until the next report is expected; None if unknown.
    """

    written: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Judged:
    """The predictions on one split, and what is shown of them.

    Attributes:
      split: the split, such as 'test[:50%]'.
      predictions: the predictions.
      judgement: their judgement.
      images: uint8 [h, w, 3] by index; only those of `choose_examples` and `choose_cells` are shown.
      heat_maps: uint8 [h, w, 3] by index, shown beside the images.
    """

    split: str
    predictions: Predictions
    judgement: Judgement
    images: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    heat_maps: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)


def write_report(
    workdir: str | os.PathLike[str],
    *,
    config: ExperimentConfig,
    metrics: Sequence[dict[str, Any]],
    info: RunInfo,
    judged: Judged | None = None,
    class_names: Sequence[str] = (),
    live: Live | None = None,
) -> Path:
    """Writes `workdir`/report.html. Parts without input, such as after an interruption, are left out.

    Args:
      workdir: the work directory.
      config: the config of the run.
      metrics: the entries of metrics.jsonl.
      info: further facts.
      judged: predictions on the test split, or on the development split while the run goes on.
      class_names: names in the order of the classes; a class without a name is shown with its number.
      live: set while the run goes on.

    Returns:
      The path of the report.

    Raises:
      OSError: the report could not be written. An older report is then unchanged.
    """
    names = [*map(printable, class_names), *(f"class {i}" for i in range(len(class_names), config.num_classes))]
    last_step = max((entry["step"] for entry in metrics), default=0)
    context = {
        "title": printable(config.name or Path(workdir).resolve().name),
        "config": config,
        "config_json": to_json(config),
        "changes": _changes(config),
        "info": info,
        "live": live,
        "last_step": last_step,
        "interrupted": live is None and last_step < info.get("total_steps", 0),
        "measures": [metric for metric in metrics_of(config) if _was_measured(metric, metrics)],
        "result": _result(config, metrics, ("dev",) if live else ("dev", "test")),
        "figures": _figures(config, metrics, info.get("steps_per_epoch")),
        "multi_label": config.loss.multi_label,
        "time_spent": _time_spent(info.get("time_spent", {})),
        "train_images_per_second": _median(metrics, "images_per_second"),
        "judged": judged,
        "limits": (MAX_CELL_IMAGES, MAX_IMAGES),
    }
    if judged is not None:
        cards = Cards(judged.predictions, names, judged.images, judged.heat_maps)
        context |= judgement_context(judged.judgement, judged.predictions, names)
        context |= {
            "errors": errors_context(judged.predictions, names),
            "examples": cards.groups(),
            "cells": cards.cells(),
        }
    path = Path(workdir) / "report.html"
    write_atomically(path, make_environment(Path(__file__).parent).get_template("run.html").render(context).encode())
    return path


def _time_spent(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Returns (activity in words, seconds, share) of each activity of a run."""
    found = goodput.shares(seconds)
    return [(words, seconds[name], found[name]) for name, words in goodput.ACTIVITIES.items() if seconds.get(name)]


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


def _result(config: ExperimentConfig, metrics: Sequence[dict[str, Any]], kinds: Sequence[str]) -> dict[str, Any] | None:
    """Returns the last result on the last of `kinds` of splits that has one, as rows of a table."""
    splits = {"dev": config.data.eval_split, "test": config.data.test_split}
    entries = [entry for kind in kinds if splits[kind] for entry in metrics if entry["split"] == kind]
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
    named = {"split": splits[entry["split"]], "is_test": entry["split"] == "test"}
    return {**entry, "rows": rows, **named} if rows else None


def _figures(
    config: ExperimentConfig, metrics: Sequence[dict[str, Any]], steps_per_epoch: float | None
) -> list[dict[str, Any]]:
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
    drawn = [
        ("Loss", loss_note + ".", lines("loss"), False),
        (format_heading(main.title), "", lines(main.name), main.is_share),
        ("Learning rate", "", [Line("train", "learning_rate", "", raw)], False),
    ]
    figures = [
        (title, note, line_figure(metrics, shown, name=title, percent=percent, steps_per_epoch=steps_per_epoch))
        for title, note, shown, percent in drawn
    ]
    # Not escaped: the figures contain no names or values from outside.
    return [{"title": t, "note": note, "svg": Markup(themed(svg))} for t, note, svg in figures if svg]
