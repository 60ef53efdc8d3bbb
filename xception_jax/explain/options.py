"""Names the methods and their options. Does not import JAX, so that a command line can be checked without it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Method:
    """How a method is used and how its maps are drawn.

    Attributes:
      title: its name in text.
      options: the options that it reads.
      is_signed: whether negative values, which are evidence against the class, are drawn as well.
      is_pixelwise: whether the map has a value per pixel of the input, which is noisy and smoothed for display.
    """

    title: str
    options: tuple[str, ...]
    is_signed: bool
    is_pixelwise: bool


METHODS = {
    "grad_cam": Method("Grad-CAM", ("block",), is_signed=False, is_pixelwise=False),
    "hires_cam": Method("HiResCAM", ("block",), is_signed=True, is_pixelwise=False),
    "integrated_gradients": Method("Integrated gradients", ("steps", "baseline"), is_signed=True, is_pixelwise=True),
}

BASELINES = {"black": 0.0, "grey": 0.5, "white": 1.0}
"""Levels of all pixels of the image where the path of integrated gradients starts."""

STEPS = 64
"""Points on that path."""
