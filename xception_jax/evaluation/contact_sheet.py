"""Draws a contact sheet: thumbnails of images with their predicted classes."""

from __future__ import annotations

import dataclasses
import io
import math
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from xception_jax.names import printable

_DPI = 160
_CELL = 2.0  # width of an image, in inches
_CAPTION = 0.62  # height of a caption, in inches
_GAP = 0.22  # in inches
_LEGEND, _LEGEND_BAR = 0.1, 1.4  # height of the legend beside the gap, and width of its bar, in inches
_LEGEND_TEXT = 1.0  # width of the text at its right, in inches
_SMALL = 160  # images with a longer side below this are drawn without smoothing, in pixels
_MAX_COLUMNS = 8
_NAME_LENGTH, _FILE_LENGTH = 24, 34  # characters that fit below an image
# The default font of matplotlib lacks Chinese, Japanese and Korean. At least one of these fonts is usually available on
# Linux, macOS or Windows.
_FONTS = (
    *("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "IPAGothic"),
    *("Droid Sans Fallback", "Hiragino Sans", "PingFang SC", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Yu Gothic", "Microsoft YaHei", "Malgun Gothic"),
)
INK, GREY, TRACK, BLUE = "#1a1a1a", "#767676", "#e8e8e8", "#0072b2"


@dataclasses.dataclass(frozen=True)
class Tile:
    """One image of a sheet.

    Attributes:
      image: thumbnail, uint8 RGB.
      file: file name.
      label: name of the most probable class.
      probability: probability of that class, in [0, 1].
    """

    image: UInt8[np.ndarray, "h w 3"]
    file: str
    label: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Legend:
    """A bar of colours below a sheet, with the meaning of its ends."""

    strip: UInt8[np.ndarray, "1 n 3"]
    low: str
    high: str


def draw(
    tiles: Sequence[Tile], legend: Legend | None = None, *, cell: float = _CELL, max_columns: int = _MAX_COLUMNS
) -> bytes:
    """Draws the tiles in rows, and returns a PNG.

    Args:
      tiles: the tiles.
      legend: the meaning of the colours in the images.
      cell: width of a tile, and maximum height of its image, in inches.
      max_columns: number of tiles in a row.
    """
    columns = min(max_columns, math.ceil(math.sqrt(1.5 * _CELL / cell * len(tiles))))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    # Most photographs are wider than tall, so a row is only as tall as its tallest image.
    heights = [cell * max(min(tile.image.shape[0] / tile.image.shape[1], 1.0) for tile in row) for row in rows]
    footer = _LEGEND if legend else 0.0
    width, height = columns * (cell + _GAP) + _GAP, sum(heights) + len(rows) * (_CAPTION + _GAP) + _GAP + footer
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    top = height - _GAP
    for row, row_height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            left, bottom = (_GAP + column * (cell + _GAP)) / width, top - row_height
            picture = figure.add_axes((left, bottom / height, cell / width, row_height / height))
            _draw_image(picture, tile.image, row_height / cell)
            caption = (left, (bottom - _CAPTION) / height, cell / width, _CAPTION / height)
            _draw_caption(figure.add_axes(caption), tile)
        top -= row_height + _CAPTION + _GAP
    if legend:
        _draw_legend(figure.add_axes((0, 0, 1, (_LEGEND + _GAP) / height)), legend, width)
    return as_png(canvas)


def as_png(canvas: FigureCanvasAgg) -> bytes:
    """Returns a drawing as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters missing in all installed fonts are drawn as boxes
        canvas.print_png(buffer)
    return buffer.getvalue()


def _draw_image(axes: Axes, image: np.ndarray, aspect: float) -> None:
    """Draws an image at the bottom of a box of width 1 and height `aspect`."""
    height, width = image.shape[:2]
    longer = max(width, height / aspect)
    # Small images are not smoothed, so that the sheet shows the pixels that the network sees.
    axes.imshow(image, interpolation="nearest" if max(height, width) < _SMALL else "antialiased")
    axes.set_xlim((width - longer) / 2 - 0.5, (width + longer) / 2 - 0.5)
    axes.set_ylim(height - 0.5, height - longer * aspect - 0.5)
    axes.axis("off")


def _draw_caption(axes: Axes, tile: Tile) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.axis("off")
    # A dollar sign in a name does not start a formula.
    style: dict[str, Any] = {"parse_math": False, "va": "baseline", "family": installed_fonts()}
    axes.text(0, 0.62, shorten(tile.label, _NAME_LENGTH), size=8.5, weight="bold", color=INK, **style)
    axes.text(1, 0.62, f"{tile.probability:.0%}", size=8.5, color=INK, ha="right", **style)
    axes.add_patch(Rectangle((0, 0.44), 1, 0.06, color=TRACK, linewidth=0))
    if math.isfinite(tile.probability):
        axes.add_patch(Rectangle((0, 0.44), tile.probability, 0.06, color=BLUE, linewidth=0))
    axes.text(0, 0.16, shorten(tile.file, _FILE_LENGTH), size=6, color=GREY, **style)


def _draw_legend(axes: Axes, legend: Legend, width: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(0, 1)
    axes.axis("off")
    style: dict[str, Any] = {"parse_math": False, "va": "center", "size": 8.5, "color": INK}
    left, right = width - _GAP - _LEGEND_TEXT - _LEGEND_BAR, width - _GAP - _LEGEND_TEXT
    axes.imshow(legend.strip, extent=(left, right, 0.4, 0.8), aspect="auto")
    axes.text(left - 0.1, 0.6, legend.low, ha="right", **style)
    axes.text(right + 0.1, 0.6, legend.high, ha="left", **style)


def installed_fonts() -> list[str]:
    """Returns the installed fonts of `_FONTS`. Matplotlib would print a warning for each of the others."""
    installed = font_manager.get_font_names()
    return [name for name in _FONTS if name in installed]


def shorten(text: str, length: int) -> str:
    """Shortens a name in the middle, because file names often end in a number. Wide characters count as two.

    What cannot be drawn is shown escaped.
    """
    text = printable(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    length = length * len(text) // (len(text) + wide) if wide else length
    kept = length - 1
    return text if len(text) <= length else f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
