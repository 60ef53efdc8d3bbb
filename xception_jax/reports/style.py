"""The style of all figures in reports. Figures are SVG and have the same bytes for the same numbers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito (2008), distinguishable with any kind of colour vision; neighbours in COLORS differ in lightness.
GREY, BLUE, VERMILION, GREEN = "#8a8a8a", "#0072b2", "#d55e00", "#009e73"
COLORS = (BLUE, VERMILION, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#000000")
QUIET = "#555"  # labels
ZERO, MARGIN = "#999", "#eee"  # the line at no difference, and the band of differences that do not matter

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "xception_jax",  # otherwise ids are random
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.limits": (-2, 4),  # larger and smaller powers of ten are written once, above the axis
    "grid.color": "#e6e6e6",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
}


def draw_svg(width: float, height: float, box: tuple[float, float, float, float], draw: Callable[[Axes], None]) -> str:
    """Returns a figure as an <svg> element that can be placed in a page beside others.

    Args:
      width: of the figure, in points.
      height: of the figure, in points.
      box: (left, bottom, width, height) of the axes as shares of the figure. It is fixed, so that figures side by side
        align.
      draw: draws on the axes.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure.add_axes(box))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    # Matplotlib numbers the groups of every figure from 1. Nothing refers to them, and ids must be unique in a page.
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
