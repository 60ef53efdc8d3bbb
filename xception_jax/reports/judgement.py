"""Prepares the judgement of a classifier for the report: tables and curves. `evaluate` prints the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from xception_jax.evaluation.judgement_text import aim_text, interval_note, overall_rows, shown_classes, shown_fields
from xception_jax.metrics import ranking
from xception_jax.metrics.judgement import ClassScores, Judgement
from xception_jax.metrics.predictions import Predictions, confidence_bins
from xception_jax.reports.curves import Curve, share_figure
from xception_jax.reports.style import themed

_MOST_CLASSES = 30  # rows of the table
_MOST_CURVES = 5  # in one figure
_MOST_POINTS = 200  # of a curve


def judgement_context(judgement: Judgement, predictions: Predictions, names: Sequence[str]) -> dict[str, Any]:
    """Returns what the template shows of a judgement."""
    shown = shown_classes(judgement, _MOST_CLASSES)
    fields = shown_fields(shown)
    return {
        "judgement": judgement,
        "note": interval_note(judgement),
        "overall": overall_rows(judgement),
        "fields": fields,
        "rows": [
            (names[scores.label], scores.support, [getattr(scores, field) for field in fields]) for scores in shown
        ],
        "points": [(names[point.threshold.label], aim_text(point), point) for point in judgement.points],
        "figures_of_judgement": _figures(judgement, predictions, names),
    }


def _figures(judgement: Judgement, predictions: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    # The curve of one of two classes tells that of the other, unless an image can belong to both.
    alone = len(judgement.classes) == 2 and not predictions.multi_label
    found = [scores for scores in judgement.classes if judgement.rankings and not math.isnan(scores.roc_auc.value)]
    chosen = found[-1:] if alone else sorted(found, key=lambda scores: scores.roc_auc.value)[:_MOST_CURVES]
    note = f"The {len(chosen)} classes with the smallest area." if len(found) > len(chosen) else ""
    if alone and chosen:
        note = f"{names[1]} is the positive class."
    figures: list[tuple[str, str, str]] = []
    if chosen:
        rates = [_rates(judgement, scores) for scores in chosen]
        roc = [
            Curve(_label(names, scores, scores.roc_auc.value, alone=len(chosen) == 1), *_thin(false, true))
            for scores, (true, false, _) in zip(chosen, rates, strict=True)
        ]
        figures.append(
            ("ROC", note, share_figure(roc, "false positive rate", "true positive rate (sensitivity)", diagonal=True))
        )
        precision = [
            Curve(_label(names, scores, scores.average_precision.value, alone=len(chosen) == 1), *_thin(true, p))
            for scores, (true, _, p) in zip(chosen, rates, strict=True)
        ]
        figures.append(
            ("Precision and recall", note, share_figure(precision, "recall", "precision", legend="lower left"))
        )
    if not predictions.multi_label and (bins := confidence_bins(predictions)):
        x, y, counts = np.array([[entry.confidence, entry.accuracy, entry.count] for entry in bins]).T
        note = (
            "The share of correct images in each fifteenth of the probability of the best class; larger points have "
            "more images. Below the dashed line the network is overconfident."
        )
        curve = Curve("images", x, y, counts)
        figures.append(("Calibration", note, share_figure([curve], "probability", "correct", diagonal=True)))
    # Not escaped: matplotlib escapes the names of classes in the text of an SVG.
    return [{"title": title, "note": note, "svg": Markup(themed(svg))} for title, note, svg in figures]


def _rates(judgement: Judgement, scores: ClassScores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns true positive rate, false positive rate and precision at each threshold."""
    found = judgement.rankings[scores.label]
    counts = ranking.count(found, np.ones((len(found.order), 1)))
    true, false = counts.rates()
    precision = counts.true / (counts.true + counts.false)
    return true[:, 0], false[:, 0], np.concatenate([precision[:1, 0], precision[:, 0]])


def _label(names: Sequence[str], scores: ClassScores, area: float, *, alone: bool) -> str:
    name = names[scores.label]
    name = name if len(name) <= 18 else f"{name[:17]}…"
    return name if alone else f"{name} {area:.3f}"


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= _MOST_POINTS:
        return x, y
    kept = np.linspace(0, len(x) - 1, _MOST_POINTS).astype(int)
    return x[kept], y[kept]
