"""A network with its weights and all that has to travel with them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a network.

    Attributes:
      size: side of the square input, in pixels.
      crop: central share of the image's sides that is seen.
      interpolation: how the crop is resized.
      mean: subtracted from the pixels, one value a channel, after scaling to [0, 1].
      std: the result is divided by it. The defaults scale to [-1, 1], as Keras and this code base do.
    """

    size: int = 299
    crop: float = 0.875
    interpolation: Literal["bilinear", "bicubic", "antialiased_bilinear", "antialiased_bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with its weights.

    Attributes:
      model: a resolved `config.model`; `create_model(network.model)` makes the module.
      variables: {'params', 'batch_stats'}, NumPy arrays.
      preprocessing: what an image goes through before it.
      classes: the names of the classes, or None where they are unknown.
      source: the file or work directory that it was read from.
      sha256: of the file; of a checkpoint, of its manifest.
    """

    model: ConfigDict
    variables: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    source: str
    sha256: str
