"""Draws the metrics of a run over its steps, and the curves of a judgement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

from xception_jax.reports.style import COLORS, QUIET, ZERO, Readout, Series, draw_svg, legend_label

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


def line_figure(
    metrics: Sequence[dict[str, Any]],
    lines: Sequence[Line],
    *,
    name: str = "",
    percent: bool = False,
    steps_per_epoch: float | None = None,
) -> str | None:
    """Draws values over steps, with epochs above the figure.

    Args:
      metrics: entries of metrics.jsonl; values that are not finite are skipped.
      lines: what to draw.
      name: name of the values.
      percent: the values are shares and are labelled in percent.
      steps_per_epoch: to label epochs; without it there are only steps.

    Returns:
      SVG, 340 x 250 points; or None if there is nothing to draw.
    """
    series = [(line, *_thin(*_series(metrics, line))) for line in lines]
    series = [(line, steps, values) for line, steps, values in series if len(steps)]
    if not series:
        return None

    def draw(axes: Axes) -> Readout:
        for line, steps, values in series:
            marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) <= _FEW_POINTS else {}
            axes.plot(steps, values, label=line.label, **(marker | line.style))
        axes.set_xlabel("step", color=QUIET)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _style(axes, percent=percent)
        if steps_per_epoch:
            above = axes.secondary_xaxis(
                "top", functions=(lambda x: np.asarray(x) / steps_per_epoch, lambda x: np.asarray(x) * steps_per_epoch)
            )
            above.set_xlabel("epoch", color=QUIET)
            above.xaxis.set_major_locator(
                MaxNLocator(5, integer=max(s[-1] for _, s, _ in series) > 3 * steps_per_epoch)
            )
            above.spines["top"].set_visible(False)
            above.tick_params(length=0, pad=2)
        if len(lines) > 1:
            axes.legend(loc="best")
        shown = [_readout(line.label or name, line.style["color"], steps, values) for line, steps, values in series]
        return Readout(shown, "step", name, percent=percent, steps_per_epoch=steps_per_epoch)

    return draw_svg(340, 250, (0.17, 0.17, 0.8, 0.67), draw)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line between shares, such as an ROC curve.

    Attributes:
      label: its name in the legend.
      x, y: its points.
      weights: number of images of each point, which sets its size; None draws no points.
    """

    label: str
    x: _Values
    y: _Values
    weights: _Values | None = None


def share_figure(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    legend: Literal["lower left", "lower right"] = "lower right",
    diagonal: bool = False,
) -> str:
    """Draws curves in the unit square.

    Args:
      curves: at most as many as there are colours.
      x_label: name of the x axis.
      y_label: name of the y axis.
      legend: where the legend is.
      diagonal: draws the line y = x.
    """

    def draw(axes: Axes) -> Readout:
        if diagonal:
            axes.plot([0, 1], [0, 1], color=ZERO, linewidth=1, linestyle=(0, (2, 2)))
        for curve, color in zip(curves, COLORS, strict=False):
            axes.plot(
                curve.x,
                curve.y,
                color=color,
                linewidth=1.6 if curve.weights is None else 0.8,
                label=legend_label(curve.label),
            )
            if curve.weights is not None:
                axes.scatter(curve.x, curve.y, 4 + 90 * curve.weights / curve.weights.max(), color=color, linewidths=0)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel(x_label, color=QUIET)
        axes.set_ylabel(y_label, color=QUIET)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        _style(axes, percent=True)
        if len(curves) > 1:
            axes.legend(loc=legend)
        shown = [_readout(c.label, color, c.x, c.y) for c, color in zip(curves, COLORS, strict=False)]
        return Readout(shown, x_label, y_label, percent=True, x_percent=True, nearest=True)

    return draw_svg(340, 300, (0.2, 0.16, 0.76, 0.8), draw)


def _style(axes: Axes, *, percent: bool) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(6))
    # Plain numbers: the default writes a power of ten above the axis.
    axes.yaxis.set_major_formatter(PercentFormatter(1.0) if percent else FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(length=3)
    axes.margins(x=0.02)


def _readout(label: str, color: str, x: _Values, y: _Values) -> Series:
    return Series(label, color, list(zip(x.tolist(), y.tolist(), strict=True)))
