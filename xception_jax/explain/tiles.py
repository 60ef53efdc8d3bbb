"""Paints heat maps over images, for reports."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import UInt8

from xception_jax.data.images import thumbnail
from xception_jax.explain.endpoints import last_drawable
from xception_jax.explain.explainer import make_explainer
from xception_jax.explain.options import METHODS
from xception_jax.explain.pictures import enlarged, paint
from xception_jax.models import create_model
from xception_jax.weights import Network


def heat_maps(
    network: Network,
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    classes: Sequence[int] | None = None,
    *,
    method: str = "grad_cam",
    block: str | None = None,
    side: int = 160,
    batch_size: int = 16,
) -> list[UInt8[np.ndarray, "h2 w2 3"]]:
    """Returns each image with its map painted over it.

    Args:
      network: a network with a classifier.
      images: decoded images of any size.
      classes: the class to explain in each image; None is the most probable one.
      method: name of a method.
      block: name of an endpoint; None is that of `last_drawable`.
      side: longer side of a result, in pixels. Smaller images are enlarged by a whole factor at least to that.
      batch_size: images per batch.

    Raises:
      ValueError: there is not one class for each image, or the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}")
    if classes is not None and len(classes) != len(images):
        raise ValueError(f"there are {len(classes)} classes for {len(images)} images")
    view = network.preprocessing
    block = block or last_drawable(create_model(network.model), network.variables, view.size)
    explainer = make_explainer(network, method, block=block, batch_size=batch_size)
    size = min(batch_size, len(images))
    variables = jax.device_put(network.variables)
    painted = []
    for start in range(0, len(images), max(1, size)):
        chosen = images[start : start + size]
        pixels = np.zeros((size, view.size, view.size, 3), np.float32)
        for row, image in enumerate(chosen):
            view(image, pixels[row])
        labels = None
        if classes is not None:
            labels = np.zeros(size, np.int32)  # the padding explains any class
            labels[: len(chosen)] = classes[start : start + size]
            if network.has_single_logit:  # the logit of the second class, or its absence
                labels = np.where(labels == 0, ~labels, 0)
        maps = np.asarray(explainer(variables, pixels, classes=labels).maps)
        for image, heat in zip(chosen, maps, strict=False):  # the rest is padding
            shown = thumbnail(enlarged(image, side), side)
            painted.append(paint(shown, heat, view, METHODS[method]))
    return painted
