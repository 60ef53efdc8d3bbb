"""Counts the parameters and multiply-adds of a network from its layers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax

from xception_jax.models.layers import Conv
from xception_jax.models.trace import trace_layers


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a network at one image size.

    Attributes:
      parameters: number of trainable parameters.
      statistics: number of running averages of BatchNorm.
      multiply_adds: number of multiply-adds of convolutions and dense layers for one image, including products with
        padding.
      multiply_adds_by_layer: the same number for each layer, by name.
    """

    parameters: int
    statistics: int
    multiply_adds: int
    multiply_adds_by_layer: dict[str, int]


def count_cost(model: nn.Module, image_size: int) -> Cost:
    """Counts the cost of a forward pass on one image of `image_size` x `image_size` pixels, without running it."""
    by_layer: dict[str, int] = {}

    def visit(layer: nn.Module, images: Any, output: Any) -> None:
        if isinstance(layer, Conv | nn.Dense):
            positions = math.prod(output.shape[1:-1])
            by_layer["/".join(layer.path)] = positions * layer.get_variable("params", "kernel").size

    variables = trace_layers(model, image_size, visit)

    def size(tree: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    return Cost(size(variables["params"]), size(variables["batch_stats"]), sum(by_layer.values()), by_layer)
