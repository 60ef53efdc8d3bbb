"""Draws the metrics of a run over its steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from xception_jax.reports.style import QUIET, draw_svg

_MAX_POINTS = 400  # a figure this wide cannot show more
_FEW_POINTS = 12  # each gets a marker

_Values = Float[np.ndarray, " points"]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a figure.

    Attributes:
      split: the split whose entries are drawn.
      name: the metric.
      label: its name in the legend.
      style: arguments of `Axes.plot`.
    """

    split: str
    name: str
    label: str
    style: dict[str, Any]


def _thin(steps: _Values, values: _Values) -> tuple[_Values, _Values]:
    """Averages neighbours until at most `_MAX_POINTS` are left. Unlike picking points, this smooths noise."""
    if len(steps) <= _MAX_POINTS:
        return steps, values
    starts = np.linspace(0, len(steps), _MAX_POINTS, endpoint=False).astype(int)
    sizes = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def _series(metrics: Sequence[dict[str, Any]], line: Line) -> tuple[_Values, _Values]:
    """Returns the steps and the finite values of a line."""
    points = [
        (entry["step"], entry[line.name]) for entry in metrics if entry["split"] == line.split and line.name in entry
    ]
    finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    steps, values = np.array(finite, float).reshape(-1, 2).T
    return steps, values


def line_figure(metrics: Sequence[dict[str, Any]], lines: Sequence[Line], *, percent: bool = False) -> str | None:
    """Draws values over steps.

    Args:
      metrics: entries of metrics.jsonl; values that are not finite are skipped.
      lines: what to draw.
      percent: the values are shares and are labelled in percent.

    Returns:
      SVG, 340 x 230 points; or None if there is nothing to draw.
    """
    series = [(line, *_series(metrics, line)) for line in lines]
    if not any(len(steps) for _, steps, _ in series):
        return None

    def draw(axes: Axes) -> None:
        for line, steps, values in series:
            if len(steps):
                marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) <= _FEW_POINTS else {}
                axes.plot(*_thin(steps, values), label=line.label, **(marker | line.style))
        axes.set_xlabel("step", color=QUIET)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.tick_params(length=3)
        axes.margins(x=0.02)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(lines) > 1:
            axes.legend(loc="best")

    return draw_svg(340, 230, (0.13, 0.17, 0.85, 0.76), draw)
