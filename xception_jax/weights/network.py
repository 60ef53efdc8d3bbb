"""A network with its weights and all that has to travel with them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from xception_jax.config import ModelConfig
from xception_jax.data.images import Preprocessing


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
      multi_label: an image may be of several classes, so that each has a probability of its own: a sigmoid.
    """

    model: ModelConfig
    variables: dict[str, Any]
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None
    source: str
    sha256: str
    multi_label: bool = False

    @property
    def probabilities(self) -> Literal["sigmoid", "softmax"]:
        """What makes probabilities of the logits; of a single class softmax would always say 1."""
        return "sigmoid" if self.multi_label or self.model.num_classes == 1 else "softmax"
