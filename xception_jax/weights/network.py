"""A network with its weights and the metadata that travels with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from xception_jax.config import ModelConfig
from xception_jax.data.images import Preprocessing

MAX_SIDE = 4096
"""Largest side of a network's input, in pixels, that a file may ask for: images are allocated before they are read."""

MIN_CROP = 0.1
"""Smallest visible share of an image's side that a file may ask for."""

MIN_STD = 1e-6
"""Smallest number by which a file may have pixels from 0 to 1 divided."""

MAX_MEAN = 1e6
"""Largest number that a file may have subtracted from pixels from 0 to 1."""


def described_preprocessing(fields: Mapping[str, Any]) -> Preprocessing:
    """Builds the preprocessing that a file describes.

    Raises:
      ValueError, TypeError, OverflowError: a field is unknown, has the wrong type or is out of range.
    """
    preprocessing = Preprocessing.from_fields(fields)
    if preprocessing.size > MAX_SIDE:
        raise ValueError(f"images of {preprocessing.size} pixels are larger than {MAX_SIDE}")
    if preprocessing.crop < MIN_CROP:  # images are resized to size / crop
        raise ValueError(f"the crop {preprocessing.crop:g} is below {MIN_CROP:g}")
    if min(preprocessing.std) < MIN_STD or max(map(abs, preprocessing.mean)) > MAX_MEAN:
        raise ValueError(f"pixels cannot be scaled by mean {preprocessing.mean} and std {preprocessing.std}")
    return preprocessing


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with its weights.

    Attributes:
      model: a resolved `config.model`; `create_model(network.model)` builds the module.
      variables: {'params', 'batch_stats'}, NumPy arrays.
      preprocessing: how images are prepared for the network.
      classes: class names in the order of the labels, or None if they are unknown.
      source: the file or work directory that the weights were read from.
      sha256: SHA-256 of the file; for a checkpoint, of its manifest.
      multi_label: whether an image can belong to several classes; `predict` then applies a sigmoid.
    """

    model: ModelConfig
    variables: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    source: str
    sha256: str
    multi_label: bool = False

    @property
    def has_single_logit(self) -> bool:
        """Whether one logit decides between two classes: it is the logit of the second."""
        return self.model.num_classes == 1 and not self.multi_label

    @property
    def num_classes(self) -> int:
        """Number of classes that the network tells apart: a single logit separates two, of which it is the second."""
        return 2 if self.has_single_logit else self.model.num_classes

    @property
    def probabilities(self) -> Literal["sigmoid", "softmax"]:
        """The function that turns logits into probabilities; softmax over a single class would always return 1."""
        return "sigmoid" if self.multi_label or self.model.num_classes == 1 else "softmax"


def both_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of both classes of a single logit; if only the second has one, the first is its absence."""
    return (f"not {names[0]}", names[0]) if len(names) == 1 else tuple(names)


class Imported(NamedTuple):
    """A network from a file of another library."""

    network: Network  # with the default size of images and no SHA-256
    image_shape: tuple[int, int] | None  # height and width of the network's input, or None if the file has none
    notes: list[str]  # what was left out or assumed, for the user
