"""Formats a judgement as text for the terminal. Wide results are in --json and --per_class."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from xception_jax.metrics.judgement import ClassScores, Judgement, OperatingPoint
from xception_jax.metrics.resampling import Estimate
from xception_jax.names import printable, printable_path

MOST_CLASSES = 20  # rows of the table
_MOST_POINTS = 4  # classes whose thresholds are printed
_MOST_MISTAKES = 10
_NAME = 24  # columns of a name

OVERALL = {
    "accuracy": "accuracy",
    "macro_precision": "precision, mean of classes",
    "macro_recall": "recall, mean of classes",
    "macro_f1": "F1, mean of classes",
    "weighted_f1": "F1, weighted by images",
    "roc_auc": "area under ROC",
    "average_precision": "average precision",
    "equal_error_rate": "equal error rate",
}
CLASS_FIELDS = {
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "roc_auc": "ROC",
    "average_precision": "AP",
    "equal_error_rate": "EER",
}


def as_text(
    judgement: Judgement, names: Sequence[str], mistakes: Sequence[dict[str, Any]], thresholds_split: str = ""
) -> str:
    """Formats a judgement.

    Args:
      judgement: the judgement.
      names: names of the classes.
      mistakes: rows of all mistakes, the most confident first.
      thresholds_split: the split that the thresholds were chosen on.
    """
    points = _points(judgement, names, thresholds_split)
    blocks = [_overall(judgement), _classes(judgement, names), points, _groups(judgement)]
    return "\n\n".join(block for block in [*blocks, _mistakes(mistakes)] if block)


def interval_note(judgement: Judgement) -> str:
    """Says what the intervals are: '95 % intervals: bootstrap over 40 groups, 2,000 draws'."""
    units = f"{judgement.count:,} images" if judgement.groups is None else f"{judgement.groups:,} groups"
    return f"95 % intervals: bootstrap over {units}, {judgement.draws:,} draws" if judgement.draws else ""


def shown_classes(judgement: Judgement, most: int) -> list[ClassScores]:
    """Returns all classes if there are at most `most`, else those with images and the lowest F1, worst first."""
    if len(judgement.classes) <= most:
        return list(judgement.classes)
    found = [scores for scores in judgement.classes if scores.support]
    return sorted(found, key=lambda scores: scores.f1.value)[:most]


def shown_fields(shown: Sequence[ClassScores]) -> dict[str, str]:
    """Returns the titles of the figures that are known of at least one of these classes, by field."""
    return {
        field: title
        for field, title in CLASS_FIELDS.items()
        if any(not math.isnan(getattr(scores, field).value) for scores in shown)
    }


def aim_text(point: OperatingPoint) -> str:
    """Returns what the threshold of a point was chosen for: 'specificity 0.95'."""
    aim = point.threshold.aim.replace("_", " ")
    return aim if point.threshold.at is None else f"{aim} {point.threshold.at:g}"


def overall_rows(judgement: Judgement) -> list[tuple[str, Estimate]]:
    """Returns the title and the value of each result over all classes.

    Without groups the accuracy is left out: it stands above the judgement, with Wilson's interval.
    """
    hidden = () if judgement.groups is not None else ("accuracy",)
    return [
        (title, judgement.overall[name])
        for name, title in OVERALL.items()
        if name in judgement.overall and name not in hidden
    ]


def _overall(judgement: Judgement) -> str:
    lines = [interval_note(judgement)] if judgement.draws else []
    return "\n".join([*lines, *(f"{title:<28}{_cell(value)}" for title, value in overall_rows(judgement))])


def _classes(judgement: Judgement, names: Sequence[str]) -> str:
    shown = shown_classes(judgement, MOST_CLASSES)
    fields = shown_fields(shown)
    lines = []
    if len(shown) < len(judgement.classes):
        lines.append(f"the {len(shown)} of {len(judgement.classes):,} classes with the lowest F1")
    lines.append(f"{'class':<{_NAME}}  {'images':>7}" + "".join(f"  {title:>9}" for title in fields.values()))
    for scores in shown:
        cells = "".join(f"  {_number(getattr(scores, field).value):>9}" for field in fields)
        lines.append(f"{_fit(names[scores.label])}  {scores.support:>7,}{cells}")
    return "\n".join(lines)


def _points(judgement: Judgement, names: Sequence[str], split: str) -> str:
    if not judgement.points:
        return ""
    if len({point.threshold.label for point in judgement.points}) > _MOST_POINTS:
        return f"thresholds chosen on {printable(split)}: in --json and --per_class"
    lines = [
        f"at thresholds chosen on {printable(split)}",
        f"{'class':<{_NAME}}  {'chosen for':<18}  threshold  {'sensitivity':<24}  specificity",
    ]
    lines += [
        f"{_fit(names[point.threshold.label])}  {aim_text(point):<18}  {point.threshold.value:>9.4f}  "
        f"{_cell(point.sensitivity):<24}  {_cell(point.specificity)}"
        for point in judgement.points
    ]
    return "\n".join(lines)


def _groups(judgement: Judgement) -> str:
    group = judgement.by_group
    if group is None:
        return ""
    left_out = f" ({group.mixed:,} with several labels left out)" if group.mixed else ""
    lines = [f"{group.count:,} groups by the mean probability of their images{left_out}"]
    lines.append(f"{'accuracy':<28}{_cell(group.accuracy)}")
    if not math.isnan(group.roc_auc.value):
        lines.append(f"{'area under ROC':<28}{_cell(group.roc_auc)}")
    return "\n".join(lines)


def _mistakes(mistakes: Sequence[dict[str, Any]]) -> str:
    if not mistakes:
        return ""
    shown = mistakes[:_MOST_MISTAKES]
    which = f"the {len(shown)} most confident of " if len(shown) < len(mistakes) else ""
    lines = [f"mistakes: {which}{len(mistakes):,}"]
    lines += [
        f"{'-' if row['probability'] is None else format(row['probability'], '.2%'):>8}  "
        f"{_fit('not finite' if row['predicted'] is None else row['predicted'])}  not {_fit(row['label'])}  "
        f"{printable_path(row['file'] or 'image {:,}'.format(row['index']))}"
        for row in shown
    ]
    return "\n".join(lines)


def _cell(value: Estimate) -> str:
    text = _number(value.value)
    return text if value.low is None or value.high is None else f"{text}  [{value.low:.4f}, {value.high:.4f}]"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _fit(name: str) -> str:
    """Cuts and pads a name to the width of its column. Wide characters take two cells."""
    cut, width = "", 0
    for character in printable(name):
        cells = 1 + (unicodedata.east_asian_width(character) in "WF")
        if width + cells > _NAME:
            return f"{cut[:-1]}…" + " " * (_NAME - width)
        cut, width = cut + character, width + cells
    return cut + " " * (_NAME - width)
