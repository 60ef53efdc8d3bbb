"""The modules of the paper's figures 1 to 4, and the separable convolution that Xception is built of.

Figures 1, 2 and 3 are Inception modules; figure 4 is the "extreme" one. All of them first look at correlations
across channels (1 x 1), then at spatial ones (3 x 3), and differ in how many segments the channels are cut into
in between: `SeparableConv` is that axis, from a regular convolution to a depthwise one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from xception_jax import ops
from xception_jax.models.layers import BatchNorm, Conv, Dtype

# A constructor of BatchNorm with everything but its name filled in.
Norm = Callable[..., nn.Module]

ACTIVATIONS: dict[str, Callable] = {"none": lambda x: x, "relu": nn.relu, "elu": nn.elu}


class SeparableConv(nn.Module):
    """A spatial convolution on channel segments, and a pointwise convolution across all channels.

    With the defaults this is the depthwise separable convolution of figure 5. `order='pointwise_first'` with all
    channels as segments is figure 4, with three segments figure 3.

    Attributes:
      features: output channels.
      segments: channel segments of the spatial convolution, or 'depthwise' for one each.
      group_width: channels in each segment instead, the same in every layer.
      order: 'depthwise_first' (spatial, then pointwise) or 'pointwise_first'.
      intermediate_activation: between the two: 'none', 'relu' or 'elu' (figure 10).
      depth_multiplier: spatial filters for each channel that enters the spatial convolution. With
        'pointwise_first' the pointwise convolution makes features / depth_multiplier channels.
      kernel_size: side of the spatial convolution.
    """

    features: int
    segments: int | str = "depthwise"
    group_width: int | None = None
    order: str = "depthwise_first"
    intermediate_activation: str = "none"
    depth_multiplier: int = 1
    kernel_size: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        activation = ACTIVATIONS[self.intermediate_activation]
        if self.order == "pointwise_first":
            x = Conv(self.features // self.depth_multiplier, dtype=self.dtype, name="pointwise")(x)
            return self._spatial(activation(x))
        x = activation(self._spatial(x))
        return Conv(self.features, dtype=self.dtype, name="pointwise")(x)

    def _spatial(self, x):
        channels = x.shape[-1]
        if self.group_width is not None:
            segments = channels // self.group_width
        else:
            segments = channels if self.segments == "depthwise" else int(self.segments)
        features = channels * self.depth_multiplier
        kernel_size = (self.kernel_size, self.kernel_size)
        return Conv(features, kernel_size, segments=segments, dtype=self.dtype, name="spatial")(x)


class InceptionModule(nn.Module):
    """Figure 1: the canonical Inception module, four towers of equal width, concatenated.

    Inside a tower every convolution is followed by BN and ReLU as in Inception V3. The last one of each tower is
    left linear and without BN, so that the module can stand where a separable convolution stands in Xception
    (which has its BN and ReLU outside), and only the module changes.

    Attributes:
      features: output channels; with a remainder modulo 4 the last tower is the wider one.
      norm: constructor of BatchNorm.
      kernel_size: side of the spatial convolutions.
    """

    features: int
    norm: Norm = BatchNorm
    kernel_size: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w f"]:
        width = self.features // 4
        pointwise = partial(Conv, dtype=self.dtype)
        spatial = partial(Conv, kernel_size=(self.kernel_size, self.kernel_size), dtype=self.dtype)

        def reduce(name):
            return nn.relu(self.norm(name=f"{name}_bn")(pointwise(width, name=name)(x), train))

        tower_1x1 = pointwise(width, name="tower_1x1")(x)
        tower_3x3 = spatial(width, name="tower_3x3")(reduce("tower_3x3_reduce"))
        tower_double = spatial(width, name="tower_double_1")(reduce("tower_double_reduce"))
        tower_double = nn.relu(self.norm(name="tower_double_1_bn")(tower_double, train))
        tower_double = spatial(width, name="tower_double_2")(tower_double)
        tower_pool = pointwise(self.features - 3 * width, name="tower_pool")(ops.avg_pool(x))
        return jnp.concatenate([tower_1x1, tower_3x3, tower_double, tower_pool], axis=-1)


class SimplifiedInceptionModule(nn.Module):
    """Figure 2: towers of 1 x 1 then 3 x 3, concatenated, without activations.

    As a function it equals `SeparableConv` with as many segments and the pointwise convolution first (figure 3);
    `figure_3_from_figure_2` maps the weights.
    """

    features: int
    towers: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        width = self.features // self.towers
        outputs = []
        for tower in range(self.towers):
            y = Conv(width, dtype=self.dtype, name=f"tower{tower}_1x1")(x)
            outputs.append(Conv(width, (3, 3), dtype=self.dtype, name=f"tower{tower}_3x3")(y))
        return jnp.concatenate(outputs, axis=-1)


def figure_3_from_figure_2(params: dict) -> dict:
    """Returns the `SeparableConv` parameters that make figure 3 compute what figure 2 does with `params`."""
    towers = range(sum(name.endswith("_1x1") for name in params))

    def concatenate(suffix):
        return {"kernel": jnp.concatenate([params[f"tower{t}_{suffix}"]["kernel"] for t in towers], axis=-1)}

    return {"pointwise": concatenate("1x1"), "spatial": concatenate("3x3")}


def channel_divisor(segments: int | str, group_width: int | None, order: str, depth_multiplier: int) -> int:
    """Returns what the channels of a layer must be divisible by for `SeparableConv` to have equal segments."""
    divisor = group_width or (1 if segments == "depthwise" else int(segments))
    return divisor * depth_multiplier if order == "pointwise_first" else divisor
