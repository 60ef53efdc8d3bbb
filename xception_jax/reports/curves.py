"""The curves of a report, as SVG that is the same to the byte for the same numbers."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

# Okabe and Ito (2008): told apart with any kind of colour vision. The lines differ in dash and width as well.
GREY, BLUE, VERMILION = "#8a8a8a", "#0072b2", "#d55e00"

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "xception_jax",  # otherwise ids are random
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-2, 4),  # other powers of ten stand once, above the axis
    "grid.color": "#e6e6e6",
    "xtick.color": "#555",
    "ytick.color": "#555",
    "legend.frameon": False,
    "legend.handlelength": 2.4,
}
_MAX_POINTS = 400  # more than a figure this wide can show


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a figure: a value of the entries of a split, and how it is drawn."""

    split: str
    name: str
    label: str
    style: dict[str, Any]


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighbours until at most `_MAX_POINTS` are left, so that noise is smoothed and not sampled."""
    if len(steps) <= _MAX_POINTS:
        return steps, values
    starts = np.linspace(0, len(steps), _MAX_POINTS, endpoint=False).astype(int)
    sizes = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def _series(metrics: Sequence[dict[str, Any]], line: Line) -> tuple[np.ndarray, np.ndarray]:
    points = [
        (entry["step"], entry[line.name]) for entry in metrics if entry["split"] == line.split and line.name in entry
    ]
    finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    steps, values = np.array(finite, float).reshape(-1, 2).T
    return steps, values


def to_svg(figure: Figure) -> str:
    """Returns an <svg> element that can stand in a page beside others."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    # Groups are numbered from 1 in every figure and referred to by nothing: ids must be unique in a page.
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])


def line_figure(metrics: Sequence[dict[str, Any]], lines: Sequence[Line], *, percent: bool = False) -> str | None:
    """Draws values over steps.

    Args:
      metrics: entries of metrics.jsonl; values that are not finite leave no point.
      lines: what to draw.
      percent: the values are shares.

    Returns:
      SVG, 340 x 230 points; or None if there is nothing to draw.
    """
    series = [(line, *_series(metrics, line)) for line in lines]
    if not any(len(steps) for _, steps, _ in series):
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(340 / 72, 230 / 72))
        axes = figure.add_axes((0.13, 0.17, 0.85, 0.76))  # fixed, so that figures side by side align
        for line, steps, values in series:
            if len(steps):
                # With few points, say where they are.
                marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(steps) <= 12 else {}
                axes.plot(*_thin(steps, values), label=line.label, **(marker | line.style))
        _finish(axes, percent, legend=len(lines) > 1)
        return to_svg(figure)


def _finish(axes: Axes, percent: bool, legend: bool) -> None:
    axes.set_xlabel("step", color="#555")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(length=3)
    axes.margins(x=0.02)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if legend:
        axes.legend(loc="best")
