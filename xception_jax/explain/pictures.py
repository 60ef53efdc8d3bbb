"""Draws heat maps over the images that they explain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from xception_jax.data.images import Preprocessing
from xception_jax.evaluation import contact_sheet
from xception_jax.evaluation.contact_sheet import GREY, INK, TRACK, as_png, installed_fonts, shorten
from xception_jax.explain.explainer import Explained
from xception_jax.explain.options import Method

LONGEST = 1024  # longer side of a photograph in a picture of its own, in pixels

_SMALLEST = 320  # smaller images are enlarged to this longer side, so that the map is not drawn with their pixels
_DPI = 160
_PANEL = 4.0  # width of a photograph, and its maximum height, in inches
_MARGIN, _HEADER, _FOOTER, _BAR = 0.25, 0.55, 0.32, 0.14  # in inches
_BAR_LABELS = 1.3  # room for the labels of the colour bar, in inches
# Perceptually uniform: equal differences look equal, in print and to colour-blind readers as well.
_COLORS = {False: "inferno", True: "coolwarm"}
_CLIPPED = 0.5  # share of the pixels of a pixelwise map that may be beyond the ends of the colours, in percent
_SMOOTHING = 0.008  # standard deviation of the smoothing of pixelwise maps, as a share of their side


def display_values(heat: Float[np.ndarray, "h w"], method: Method) -> Float[np.ndarray, "h w"]:
    """Returns a map in units of its largest value: in [-1, 1], or [0, 1] for methods without a sign."""
    values: np.ndarray = np.nan_to_num(heat.astype(np.float64))
    if method.is_pixelwise:
        values = cv2.GaussianBlur(values, (0, 0), max(0.5, _SMOOTHING * len(values)))
    largest = np.percentile(np.abs(values), 100 - _CLIPPED) if method.is_pixelwise else np.abs(values).max()
    return np.clip(values / (largest or 1.0), -1.0 if method.is_signed else 0.0, 1.0)


def paint(
    image: UInt8[np.ndarray, "h w 3"], heat: Float[np.ndarray, "mh mw"], view: Preprocessing, method: Method
) -> UInt8[np.ndarray, "h w 3"]:
    """Paints a map over an image. What the network does not see of the image is faded."""
    height, width = image.shape[:2]
    top, left, box_height, box_width = view.visible_box(height, width)
    rows = slice(max(0, round(top)), max(0, round(top)) + max(1, round(box_height)))
    columns = slice(max(0, round(left)), max(0, round(left)) + max(1, round(box_width)))
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2) / 255
    painted = 0.3 * grey + 0.7
    seen = grey[rows, columns]
    values = display_values(heat, method)
    resized = cv2.resize(values, (seen.shape[1], seen.shape[0]), interpolation=cv2.INTER_CUBIC)
    painted[rows, columns] = _blend(seen, np.clip(resized, values.min(), values.max()), method)
    return np.round(255 * painted).astype(np.uint8)


def color_strip(method: Method, length: int = 256) -> UInt8[np.ndarray, "1 n 3"]:
    """Returns the colours of a map over middle grey, from its lowest to its highest value."""
    values = np.linspace(-1.0 if method.is_signed else 0.0, 1.0, length)[None]
    return np.round(255 * _blend(np.full((1, length, 3), 0.5), values, method)).astype(np.uint8)


def _blend(
    grey: Float[np.ndarray, "h w 3"], values: Float[np.ndarray, "h w"], method: Method
) -> Float[np.ndarray, "h w 3"]:
    colors = matplotlib.colormaps[_COLORS[method.is_signed]]((values + 1) / 2 if method.is_signed else values)
    # What has no effect leaves the photograph visible.
    opacity = (0.25 + 0.55 * np.abs(values))[..., None]
    return (1 - opacity) * grey + opacity * colors[..., :3]


def enlarged(image: UInt8[np.ndarray, "h w 3"], longest: int = _SMALLEST) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Enlarges a small image by a whole factor, so that its pixels stay visible."""
    factor = max(1, math.ceil(longest / max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_sheet(explained: Sequence[Explained], labels: Sequence[str], view: Preprocessing, method: Method) -> bytes:
    """Draws a contact sheet of images, each beside its map, and returns a PNG.

    Args:
      explained: explanations with thumbnails.
      labels: what each map explains.
      view: the preprocessing of the network.
      method: the method of the maps.
    """
    tiles = []
    for each, label in zip(explained, labels, strict=True):
        assert each.thumbnail is not None
        image = enlarged(each.thumbnail)
        gap = np.full((image.shape[0], max(4, image.shape[1] // 40), 3), 255, np.uint8)
        pair = np.concatenate([image, gap, paint(image, each.heat, view, method)], axis=1)
        tiles.append(contact_sheet.Tile(pair, each.path.name, label, each.probability))
    legend = contact_sheet.Legend(color_strip(method), *_ends(method))
    return contact_sheet.draw(tiles, legend=legend, cell=3.2, max_columns=5)


def draw_picture(explained: Explained, label: str, view: Preprocessing, method: Method, where: str) -> bytes:
    """Draws an image beside its map with class, probability and colour bar, and returns a PNG.

    Args:
      explained: an explanation with a thumbnail.
      label: what the map explains.
      view: the preprocessing of the network.
      method: the method of the map.
      where: the place in the network that the map belongs to.
    """
    assert explained.thumbnail is not None
    image = enlarged(explained.thumbnail)
    aspect = image.shape[0] / image.shape[1]
    panel_width, panel_height = (_PANEL, _PANEL * aspect) if aspect <= 1 else (_PANEL / aspect, _PANEL)
    width = 2 * panel_width + 3 * _MARGIN + _BAR + _BAR_LABELS
    height = panel_height + _HEADER + _FOOTER + 2 * _MARGIN
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def axes(left: float, bottom: float, size: tuple[float, float]) -> Axes:
        return figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))

    bottom, panel = _MARGIN + _FOOTER, (panel_width, panel_height)
    for column, shown in enumerate((image, paint(image, explained.heat, view, method))):
        picture = axes(_MARGIN + column * (panel_width + _MARGIN), bottom, panel)
        picture.imshow(shown, interpolation="antialiased", aspect="auto")
        picture.axis("off")
    _draw_bar(axes(2 * panel_width + 3 * _MARGIN, bottom, (_BAR, panel_height)), method)
    text = axes(0, 0, (width, height))
    text.set_xlim(0, width)
    text.set_ylim(0, height)
    text.axis("off")
    style: dict[str, Any] = {"parse_math": False, "family": installed_fonts(), "va": "baseline"}
    right = 2 * (panel_width + _MARGIN)
    heading, characters = height - _MARGIN - 0.2, round(11 * panel_width)
    text.text(_MARGIN, heading, shorten(label, characters), size=15, weight="bold", color=INK, **style)
    text.text(right, heading, f"{explained.probability:.1%}", size=15, color=INK, ha="right", **style)
    name = shorten(explained.path.name, round(14 * panel_width))
    text.text(_MARGIN, _MARGIN, name, size=8.5, color=GREY, **style)
    text.text(right, _MARGIN, f"{method.title}, {where}", size=8.5, color=GREY, ha="right", **style)
    return as_png(canvas)


def _ends(method: Method) -> tuple[str, str]:
    """Returns the meaning of the lowest and the highest colour."""
    return ("against the class", "for the class") if method.is_signed else ("no evidence", "most evidence")


def _draw_bar(axes: Axes, method: Method) -> None:
    low, high = _ends(method)
    axes.imshow(color_strip(method).transpose(1, 0, 2), aspect="auto", origin="lower", extent=(0, 1, 0, 1))
    axes.set_xticks([])
    axes.set_yticks([0, 0.5, 1], [low, "no effect" if method.is_signed else "", high], size=8.5, color=INK)
    axes.yaxis.tick_right()
    axes.tick_params(length=0, pad=5)
    for spine in axes.spines.values():
        spine.set_color(TRACK)
