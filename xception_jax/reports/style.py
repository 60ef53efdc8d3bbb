"""The style of all figures in reports. Figures are SVG and have the same bytes for the same numbers."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xception_jax.names import printable

# Okabe and Ito (2008), distinguishable with any kind of colour vision; neighbours in COLORS differ in lightness.
GREY, BLUE, VERMILION, GREEN = "#8a8a8a", "#0072b2", "#d55e00", "#009e73"
COLORS = (BLUE, VERMILION, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#000000")
QUIET = "#555555"  # labels
ZERO, MARGIN = "#999999", "#eeeeee"  # the line at no difference, and the band of differences that do not matter
_GRID, _PAPER = "#e6e6e6", "#fefefe"
FONT_SIZE = 12  # of all text, in pixels where a figure has its natural size; style.css never shrinks it

# In a page the colours are variables of style.css, which differ in a light and a dark theme. Files keep the colours.
_VARIABLES = {
    **{
        GREY: "grey",
        BLUE: "blue",
        VERMILION: "vermilion",
        GREEN: "green",
        QUIET: "quiet",
        ZERO: "line",
        MARGIN: "band",
    },
    **{"#cc79a7": "pink", "#e69f00": "orange", "#56b4e9": "sky", "#000000": "black", _GRID: "grid", _PAPER: "paper"},
}

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "xception_jax",  # otherwise ids are random
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "text.parse_math": False,  # a dollar sign in a name does not start a formula
    "font.size": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "legend.title_fontsize": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": ZERO,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.facecolor": _PAPER,  # lines below a legend shine through
    "legend.edgecolor": "none",
    "legend.framealpha": 0.75,
    "legend.handlelength": 2.4,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a figure, whose points the page shows under the pointer.

    Attributes:
      label: its name.
      color: its colour in the figure.
      points: (x, y) of each point.
    """

    label: str
    color: str
    points: Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Readout:
    """What a page shows of a figure under the pointer.

    Attributes:
      series: the lines.
      x, y: names of the axes.
      percent: whether y is a share; `x_percent` says so of x.
      nearest: shows the nearest point of all lines, instead of the point of each line at the same x.
      steps_per_epoch: x is a step, which is also shown in epochs.
    """

    series: Sequence[Series]
    x: str
    y: str
    percent: bool = False
    x_percent: bool = False
    nearest: bool = False
    steps_per_epoch: float | None = None


def draw_svg(
    width: float,
    height: float,
    box: tuple[float, float, float, float],
    draw: Callable[[Axes], Readout | None],
) -> str:
    """Returns a figure as an <svg> element that can be placed in a page beside others.

    Args:
      width: width of the figure, in points.
      height: height of the figure, in points.
      box: (left, bottom, width, height) of the axes as shares of the figure. It is fixed, so that figures side by side
        align.
      draw: draws on the axes, and may return what to show under the pointer.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes(box)
        readout = draw(axes)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph", UserWarning)  # browsers have other fonts than this machine
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    # Matplotlib numbers the groups of every figure from 1. Nothing refers to them, and ids must be unique in a page.
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    if readout is None:
        return text
    left, bottom = box[0] * width, (1 - box[1]) * height
    data = {
        "box": [left, bottom, left + box[2] * width, bottom - box[3] * height],  # of the axes, from the lower left
        "limits": [axes.get_xlim()[0], axes.get_ylim()[0], axes.get_xlim()[1], axes.get_ylim()[1]],
        **{name: value for name, value in vars(readout).items() if name != "series"},
        "series": [
            {
                "label": line.label,
                "color": _variable(line.color),
                "points": [[_short(x), _short(y)] for x, y in line.points],
            }
            for line in readout.series
        ],
    }
    return text.replace("<svg ", f'<svg data-readout="{html.escape(json.dumps(data))}" ', 1)


def legend_label(name: str) -> str:
    """Returns a name for a legend. Matplotlib leaves out those that begin with an underscore."""
    return f" {printable(name)}" if name.startswith("_") else printable(name)


def themed(svg: str) -> str:
    """Returns a figure for a page, whose style sheet sets its colours and never draws it below its natural width."""
    colored = re.sub("|".join(_VARIABLES), lambda found: _variable(found[0]), svg)
    return re.sub(
        r'<svg (.*?viewBox="0 0 ([\d.]+) )', r'<svg style="--natural: \2px" \1', colored, count=1, flags=re.DOTALL
    )


def _variable(color: str) -> str:
    return f"var(--figure-{_VARIABLES[color]})" if color in _VARIABLES else color


def _short(value: float) -> float:
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


def on_white(svg: str) -> str:
    """Returns a figure for a file of its own, which a dark page may show."""
    return svg.replace("<svg ", '<svg style="background: white" ', 1)
