"""A network with its weights and all that has to travel with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ml_collections import ConfigDict

Interpolation = Literal["bilinear", "bicubic", "antialiased_bilinear", "antialiased_bicubic"]


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
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Returns what a file describes; fields that are not given have their defaults.

        Raises:
          ValueError, TypeError: a field is unknown, of the wrong type or out of range.
        """
        given: dict[str, Any] = {
            name: tuple(map(float, value)) if isinstance(value, list | tuple) else value
            for name, value in fields.items()
        }
        new = cls(**given)
        numbers = (new.crop, *new.mean, *new.std)
        if not all(isinstance(number, float | int) and math.isfinite(number) for number in numbers):
            raise ValueError("crop, mean and std must be numbers")
        if not isinstance(new.size, int) or new.size < 1 or not 0 < new.crop <= 1 or min(new.std) <= 0:
            raise ValueError("size, crop and std must be above 0, and crop at most 1")
        if (len(new.mean), len(new.std)) != (3, 3) or new.interpolation not in get_args(Interpolation):
            raise ValueError("mean and std must have three values, and the interpolation be known")
        return new


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
