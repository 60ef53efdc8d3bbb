"""What a network costs: parameters and multiply-adds, counted from the layers themselves."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax

from xception_jax.models.layers import Conv
from xception_jax.models.trace import trace_layers


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one network at one image size.

    Attributes:
      parameters: trainable ones.
      statistics: running averages of BatchNorm.
      multiply_adds: for one image, in convolutions and dense layers; padded positions count in full.
      multiply_adds_by_layer: the same by layer name.
    """

    parameters: int
    statistics: int
    multiply_adds: int
    multiply_adds_by_layer: dict[str, int]


def count_cost(model: nn.Module, image_size: int) -> Cost:
    """Traces the forward pass on one image of `image_size` x `image_size` pixels, without computing it."""
    by_layer: dict[str, int] = {}

    def visit(layer, images, output):
        if isinstance(layer, Conv | nn.Dense):
            positions = math.prod(output.shape[1:-1])
            by_layer["/".join(layer.path)] = positions * layer.get_variable("params", "kernel").size

    variables = trace_layers(model, image_size, visit)

    def size(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    return Cost(size(variables["params"]), size(variables["batch_stats"]), sum(by_layer.values()), by_layer)
