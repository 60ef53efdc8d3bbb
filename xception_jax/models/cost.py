"""Counts the parameters and multiply-adds of a network from its layers: all of them, and the live ones.

A weight of a convolution is live if it meets a pixel in at least one position. On small maps many weights are not: on a
map of one pixel, eight of the nine taps of a 3 x 3 kernel only ever meet padding. A multiply-add is live unless its
input is padding. Both follow from kernel, stride, padding and size of the map, whatever computes the convolution.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax

from xception_jax.models.layers import Conv
from xception_jax.models.trace import trace_layers
from xception_jax.ops.padding import Pads, explicit_padding


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of one layer for one image.

    Attributes:
      parameters: number of trainable parameters.
      live_parameters: the same without the weights of a convolution that meet only padding.
      multiply_adds: number of multiply-adds of a convolution or a dense layer; 0 for other layers.
      live_multiply_adds: the same without products of padding.
    """

    parameters: int
    live_parameters: int
    multiply_adds: int
    live_multiply_adds: int


COSTS = tuple(field.name for field in dataclasses.fields(LayerCost))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a network at one image size. Its four costs are sums over the layers, see `LayerCost`.

    Attributes:
      layers: the cost of each layer that has parameters, by name.
      statistics: number of running averages of BatchNorm.
    """

    layers: dict[str, LayerCost]
    statistics: int

    @property
    def parameters(self) -> int:
        """Returns the number of trainable parameters."""
        return sum(layer.parameters for layer in self.layers.values())

    @property
    def live_parameters(self) -> int:
        """Returns the number of trainable parameters without weights that meet only padding."""
        return sum(layer.live_parameters for layer in self.layers.values())

    @property
    def multiply_adds(self) -> int:
        """Returns the number of multiply-adds for one image, including products with padding."""
        return sum(layer.multiply_adds for layer in self.layers.values())

    @property
    def live_multiply_adds(self) -> int:
        """Returns the number of multiply-adds for one image, without products with padding."""
        return sum(layer.live_multiply_adds for layer in self.layers.values())

    @property
    def multiply_adds_by_layer(self) -> dict[str, int]:
        """Returns the number of multiply-adds of each convolution and dense layer, including products with padding."""
        return {name: layer.multiply_adds for name, layer in self.layers.items() if layer.multiply_adds}


def count_cost(model: nn.Module, image_size: int) -> Cost:
    """Counts the cost of a forward pass on one image of `image_size` x `image_size` pixels, without running it.

    An auxiliary head, which only training computes, is included.
    """
    layers: dict[str, LayerCost] = {}

    def visit(layer: nn.Module, images: Any, output: Any) -> None:
        own = [value for value in layer.variables.get("params", {}).values() if hasattr(value, "shape")]
        if own:
            layers["/".join(layer.path)] = _layer_cost(layer, _size(own), images.shape, output.shape)

    variables = trace_layers(model, image_size, visit)
    return Cost(layers, _size(variables["batch_stats"]))


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _layer_cost(layer: nn.Module, parameters: int, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> LayerCost:
    if not isinstance(layer, Conv | nn.Dense):
        return LayerCost(parameters, parameters, 0, 0)
    weights = math.prod(layer.get_variable("params", "kernel").shape)
    products = weights * math.prod(outputs[1:-1])
    if not isinstance(layer, Conv):
        return LayerCost(parameters, parameters, products, products)
    window, size = layer.kernel_size, inputs[1:3]
    pads = explicit_padding(layer.padding, size, window, layer.stride)
    taps, positions = live_taps(size, window, layer.stride, pads)
    per_tap = weights // math.prod(window)
    return LayerCost(parameters, parameters - weights + per_tap * taps, products, per_tap * positions)


def live_taps(size: tuple[int, ...], window: tuple[int, ...], stride: int, pads: Pads) -> tuple[int, int]:
    """Counts where a window meets an image, rather than only its padding.

    Args:
      size: (height, width) of the image.
      window: (height, width) of the kernel.
      stride: stride of both rows and columns.
      pads: ((top, bottom), (left, right)).

    Returns:
      (taps, products): the number of taps of the window that meet a pixel in at least one position, and the number of
      pairs of a tap and a position that meet a pixel.
    """
    # An image is a rectangle, so a tap meets a pixel if and only if it does so along each axis.
    axes = [_meetings(*axis, stride, ends) for axis, ends in zip(zip(size, window, strict=True), pads, strict=True)]
    taps = math.prod(sum(count > 0 for count in counts) for counts in axes)
    return taps, math.prod(map(sum, axes))


def _meetings(size: int, window: int, stride: int, ends: tuple[int, int]) -> list[int]:
    """Returns, for each tap along one axis, the number of positions at which it meets a pixel."""
    before, after = ends
    last = (size + before + after - window) // stride  # position of the window
    counts = []
    for tap in range(window):
        # The smallest position with position * stride >= before - tap.
        first_inside = max(0, -((tap - before) // stride))
        last_inside = min(last, (size - 1 + before - tap) // stride)
        counts.append(max(0, last_inside - first_inside + 1))
    return counts
