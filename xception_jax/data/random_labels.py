"""Replaces the labels of a source by random ones, a control for label-independent learning.

Zhang et al. 2017, 1611.03530.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from xception_jax.data.sources import Source, TfdsSource
from xception_jax.errors import ConfigError

_CHUNK = 64  # examples that are read in one call, to read all labels


class RandomLabels:
    """A source whose labels are drawn uniformly: a function of the seed and the bytes of the image.

    An image has the same label in every epoch, split, process and run, and equal images have equal labels. Name and
    fingerprint tell the source from the original one, so that a run never resumes with other labels.

    Args:
      source: the original source, with one label for each image.
      seed: seed of the labels.

    Raises:
      ConfigError: images have any number of labels.
    """

    def __init__(self, source: Source, seed: int):
        if source.info.multi_label:
            what = f"images of {source.info.name} have any number of labels, which random ones cannot replace"
            raise ConfigError(what, "config.data.random_labels", "set it to -1")
        self._source, self._seed = source, seed
        self.directory = getattr(source, "directory", None)  # synthetic images have none
        fingerprint = hashlib.sha256(f"{source.info.fingerprint} random labels {seed}".encode()).hexdigest()
        name = f"{source.info.name} with random labels (seed {seed})"
        self.info = dataclasses.replace(source.info, name=name, fingerprint=fingerprint)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one example."""
        return self._relabelled(self._source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Reads several examples in one call."""
        return [self._relabelled(example) for example in self._source.__getitems__(indices)]

    def overlaps(self, split: str) -> bool:
        """Returns whether another split has images of this one, see `TfdsSource.overlaps`."""
        return isinstance(self._source, TfdsSource) and self._source.overlaps(split)

    def column(self, name: str) -> list[Any] | None:
        """Returns the random labels, or any other feature of the original source."""
        if name != "label":
            return self._source.column(name)
        chunks = (range(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK))
        return [example["label"] for chunk in chunks for example in self.__getitems__(chunk)]

    def _relabelled(self, example: dict[str, Any]) -> dict[str, Any]:
        key = self._seed.to_bytes(8, "little")
        digest = hashlib.blake2b(example["image"], digest_size=8, key=key).digest()
        return example | {"label": int.from_bytes(digest, "little") % self.info.num_classes}
