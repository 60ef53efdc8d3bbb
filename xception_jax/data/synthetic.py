"""Synthetic images for measuring throughput."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg

from xception_jax.data.sources import SourceInfo

SYNTHETIC = "synthetic"
"""The name of the dataset."""

_CLASSES = 1000
_IMAGES = 64
_SHAPE = (375, 500)  # height and width of a typical ImageNet photograph


class SyntheticSource:
    """Serves 64 random JPEG images as large as those of ImageNet over and over, with random labels.

    Args:
      num_examples: number of examples.
      split: name of the split in `info`; it does not change the examples.
    """

    def __init__(self, num_examples: int, split: str):
        self._images = _random_images()
        parameters = [num_examples, _IMAGES, _SHAPE, _CLASSES]
        self.info = SourceInfo(
            name=SYNTHETIC,
            split=split,
            num_classes=_CLASSES,
            class_names=tuple(str(label) for label in range(_CLASSES)),
            multi_label=False,
            fingerprint=hashlib.sha256(json.dumps(parameters).encode()).hexdigest(),
            num_examples=num_examples,
        )

    def __len__(self) -> int:
        """Number of examples."""
        return self.info.num_examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns an example; image and label depend only on the index."""
        label = index * 2_654_435_761 % 2**32 * _CLASSES >> 32
        return {"image": self._images[index % _IMAGES], "label": label, "index": index}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns several examples."""
        return [self[index] for index in indices]

    def column(self, name: str) -> list[Any] | None:
        """Returns the labels, or None for any other feature."""
        return [self[index]["label"] for index in range(len(self))] if name == "label" else None


@functools.cache
def _random_images() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    height, width = _SHAPE
    images = []
    for _ in range(_IMAGES):
        # Smooth shapes with a little noise have as many bytes as a photograph, so decoding is as expensive.
        shapes = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
        noise = rng.integers(0, 24, (height, width, 1), np.uint8)
        images.append(simplejpeg.encode_jpeg(cv2.add(shapes, np.repeat(noise, 3, 2)), quality=90, colorspace="RGB"))
    return tuple(images)
