"""Examples whose features have been computed: what the frozen layers of a network make of each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, Shaped

from xception_jax.data.buffers import Buffers
from xception_jax.data.loading import PADDING, Batch
from xception_jax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of all examples of a source, in its order.

    Attributes:
      image: the input of the classifier.
      label: labels as in a batch.
      damaged: whether the image could not be decoded; image and label are then those of a neighbour.
    """

    image: Float32[np.ndarray, "n c"]
    label: Shaped[np.ndarray, "n ..."]
    damaged: Bool[np.ndarray, " n"]


class FeatureSource:
    """A source with its features. Examples are read from the original source."""

    def __init__(self, source: Source, features: Features):
        self._source, self.info, self.features = source, source.info, features

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one example with its image."""
        return self._source[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads several examples with their images."""
        return self._source.__getitems__(indices)

    def column(self, name: str) -> list[Any] | None:
        """Reads one feature of all examples, such as their labels or file names."""
        return self._source.column(name)


class FeatureLoader:
    """Builds batches of features from their (epoch, index) pairs, in place of a `BatchLoader`.

    Args:
      features: the features.
      masked: whether batches have a mask, as in evaluation.
    """

    def __init__(self, features: Features, masked: bool):
        self._features, self._masked = features, masked

    def __call__(self, examples: Int64[np.ndarray, "b 2"], buffers: Buffers) -> Batch:
        """Returns a batch whose 'image' is [b, c]. Padding has the features of some example."""
        index = examples[:, 1].copy()
        batch: Batch = {name: getattr(self._features, name)[index] for name in ("image", "label", "damaged")}
        batch |= {"index": index, "damaged": batch["damaged"] & (index != PADDING)}
        return batch | {"mask": index != PADDING} if self._masked else batch
