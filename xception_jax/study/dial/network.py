"""Defines the networks of the dial study, and finds their widths at equal cost.

A network is a stack of blocks on a torus, each of one spatial or of one spatial and one pointwise convolution, then
BatchNorm and ReLU. Blocks between the first and the last add their input before the ReLU, and their BatchNorm starts
with a scale of zero: a deep network begins as one of two blocks, and trains. The classifier reads the maximum and the
mean of each channel. On a torus without strides every weight of a convolution meets every pixel, so equal weights in
the convolutions are equal multiply-adds, and all of them are live.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xception_jax import ops
from xception_jax.models.layers import BatchNorm
from xception_jax.study.dial.banks import CHANNELS, CLASSES, SIDE
from xception_jax.study.dial.task import WIDTH, wrap

SPATIAL, POINTWISE = "spatial", "pointwise"
FORMS = {
    "regular": (SPATIAL,),
    "depthwise_first": (SPATIAL, POINTWISE),
    "pointwise_first": (POINTWISE, SPATIAL),
}
CONTROLS = ("multiply_adds", "live_parameters")
DEPTHWISE = 0
"""Number of segments that stands for one per channel."""
_ROUNDING = 1e-5  # relative; activations have a variance of about one


@dataclasses.dataclass(frozen=True)
class DialArm:
    """One kind of network.

    Attributes:
      name: in tables.
      form: 'regular', 'depthwise_first' (spatial, then pointwise, whatever the segments) or 'pointwise_first'.
      depth: number of blocks.
      segments: number of segments of the channels in the spatial convolutions; `DEPTHWISE` for one per channel.
      multiplier: filters for each channel in depthwise convolutions.
      ends: whether a pointwise convolution is added to the first or the last block, where the stack has none.
      cost_depth: depth of the regular arm that costs as much; 0 for that of its own depth.
      longer: factor of the steps.
    """

    name: str
    form: str
    depth: int = 2
    segments: int = DEPTHWISE
    multiplier: int = 1
    ends: bool = False
    cost_depth: int = 0
    longer: int = 1


class TorusConv(nn.Module):
    """A convolution on a torus whose initial kernel preserves the variance of white noise, whatever the segments."""

    features: int
    side: int
    segments: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        channels = x.shape[-1] // self.segments
        deviation = (self.side * self.side * channels) ** -0.5
        shape = (self.side, self.side, channels, self.features)
        kernel = self.param("kernel", nn.initializers.normal(deviation), shape)
        padded = wrap(x, self.side // 2) if self.side > 1 else x
        return ops.conv(padded, kernel, segments=self.segments, padding="VALID")


class DialNetwork(nn.Module):
    """The network of an arm.

    Attributes:
      arm: the arm.
      widths: output channels of each block.
    """

    arm: DialArm
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b 12 12 c"], train: bool) -> Float[Array, "b k"]:
        for number, block in enumerate(_blocks(self.arm, self.widths), 1):
            block_input = x
            for name, features, segments in block:
                side = SIDE if name == SPATIAL else 1
                x = TorusConv(features, side, segments, name=f"block{number}_{name}")(x)
            in_middle = 1 < number < self.arm.depth
            scale_init = nn.initializers.zeros if in_middle else nn.initializers.ones
            x = BatchNorm(scale_init=scale_init, name=f"block{number}_bn")(x, train)
            x = nn.relu(x + block_input if in_middle else x)
        return nn.Dense(CLASSES, name="classifier")(jnp.concatenate([maximum(x), x.mean((1, 2))], axis=-1))


@jax.custom_vjp
def maximum(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Returns the maximum of each channel. Its gradient goes to the pixels that have it, in equal parts.

    JAX's own gradient of `max` looks for elements that equal the maximum. If the compiler computes `x` twice, with
    different rounding, there is none, and the gradient is 0 / 0. So elements within rounding of the maximum count.
    """
    return x.max((1, 2))


def _maximum_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    return x.max((1, 2)), (x, x.max((1, 2)))


def _maximum_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    x, largest = residuals
    hit = x >= (largest - _ROUNDING * jnp.abs(largest))[:, None, None]
    share = gradient / jnp.maximum(hit.sum((1, 2)), 1)
    return (jnp.where(hit, share[:, None, None], 0),)


maximum.defvjp(_maximum_forward, _maximum_backward)


_Layer = tuple[str, int, int]  # name in its block, output channels, segments


def _blocks(arm: DialArm, widths: tuple[int, ...]) -> list[list[_Layer]]:
    """Returns the convolutions of each block. Nothing stands between those of a block."""
    form = FORMS[arm.form]
    blocks: list[list[_Layer]] = []
    channels = CHANNELS
    for width in widths:
        block: list[_Layer] = []
        if arm.ends and not blocks and form[0] != POINTWISE:
            block.append(("front", channels := width, 1))
        for kind in form:
            if kind == POINTWISE or len(form) == 1:
                block.append((kind, channels := width, 1))
            else:
                segments = arm.segments or channels
                block.append((kind, channels := channels * arm.multiplier, segments))
        blocks.append(block)
    if arm.ends and form[-1] != POINTWISE:
        blocks[-1].append(("behind", widths[-1], 1))
    return blocks


@dataclasses.dataclass(frozen=True)
class DialCost:
    """The cost of a network.

    Attributes:
      widths: output channels of each block.
      weights: weights of the convolutions, all of them live.
      live_parameters: these, BatchNorm and the classifier.
      multiply_adds: multiply-adds of one image, convolutions and classifier.
    """

    widths: tuple[int, ...]
    weights: int
    live_parameters: int
    multiply_adds: int


def count(arm: DialArm, widths: tuple[int, ...]) -> DialCost:
    """Counts the cost of an arm with these widths."""
    weights, parameters, channels = 0, 0, CHANNELS
    for block in _blocks(arm, widths):
        for name, features, segments in block:
            weights += (SIDE * SIDE if name == SPATIAL else 1) * channels // segments * features
            channels = features
        parameters += 2 * channels  # scale and bias of BatchNorm
    read = 2 * channels * CLASSES
    return DialCost(widths, weights, weights + parameters + read + CLASSES, weights * WIDTH * WIDTH + read)


@functools.cache
def solve(arm: DialArm, control: str, target: int) -> DialCost:
    """Chooses the widths of an arm such that it costs as much as the reference.

    All blocks have the same width except the last one, which may be up to a third wider or narrower to meet the target.

    Args:
      arm: the arm.
      control: the attribute of `DialCost` that is made equal.
      target: its value for the reference.

    Returns:
      The nearest cost; of equally near ones, that with the most even widths. The narrowest may cost more than the
      target.
    """
    step = max(arm.segments, 1)
    last_step = step if FORMS[arm.form][-1] == SPATIAL and arm.form != "regular" else 1
    found = list[tuple[float, float, DialCost]]()
    for width in range(step, 512 + 1, step):
        if found and getattr(count(arm, (width,) * arm.depth), control) > 3 * target:
            break
        for last in range(last_step, 2 * width, last_step):
            if abs(last - width) <= width / 3:
                cost = count(arm, (*(width,) * (arm.depth - 1), last))
                off = abs(getattr(cost, control) / target - 1)
                found.append((round(off, 3) + 0.02 * abs(last / width - 1), off, cost))
    return min(found, key=lambda entry: entry[:2])[2]
