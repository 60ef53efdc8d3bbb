"""Defines the modules of figures 1 to 4 of the paper, and the separable convolution of Xception.

Figures 1, 2 and 3 show Inception modules, figure 4 the "extreme" one. All towers except the pooling tower of figure 1
start with a 1 x 1 convolution across channels. The 3 x 3 convolutions after it map correlations in space and across the
channels of a segment. The modules of figures 2 to 4 differ in the number of these segments. `SeparableConv` covers
this axis from a regular convolution to a depthwise one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xception_jax import ops
from xception_jax.models.layers import BatchNorm, Conv, Dtype

# A partial of `BatchNorm` that lacks only `name`.
Norm = Callable[..., nn.Module]


def _scaled(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Returns x / rms, with the root mean square of each image."""
    mean_square = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).mean((1, 2, 3), keepdims=True)
    return x * jax.lax.rsqrt(mean_square + _TINY).astype(x.dtype)


# Activations between the two convolutions: functions of the input and of `config.model.intermediate_slope`.
ACTIVATIONS: dict[str, Callable[[Array, float], Array]] = {
    "none": lambda x, slope: x,
    "relu": lambda x, slope: nn.relu(x),
    "elu": lambda x, slope: nn.elu(x),
    "leaky_relu": lambda x, slope: jnp.maximum(x, slope * x),
    "scaled": lambda x, slope: _scaled(x),
    "scaled_elu": lambda x, slope: nn.elu(_scaled(x)),  # an ELU is the identity on small values
}
_TINY = 1e-20  # an image of zeros stays one
BEFORE_ACTIVATION = "before_activation"  # name of what enters the activation, in the collection 'intermediates'


class SeparableConv(nn.Module):
    """A spatial convolution on channel segments, and a pointwise convolution across all channels.

    The defaults give the depthwise separable convolution of figure 5. `order='pointwise_first'` gives figure 4 with a
    segment for each channel, and figure 3 with three segments.

    Attributes:
      features: output channels.
      segments: number of channel segments of the spatial convolution, or 'depthwise' for one per channel.
      group_width: number of channels in each segment, which replaces `segments`; 'all' for one segment.
      order: 'depthwise_first' (spatial, then pointwise) or 'pointwise_first'.
      intermediate_activation: activation between the two convolutions (figure 10), one of `ACTIVATIONS`.
      intermediate_slope: slope of 'leaky_relu' for negative values.
      intermediate_norm: constructor of a BatchNorm between the two convolutions, before the activation; None for none.
      depth_multiplier: number of spatial filters per input channel of the spatial convolution. With 'pointwise_first'
        the pointwise convolution has features / depth_multiplier output channels.
      kernel_size: side of the spatial convolution.
      initialization: initialization of both kernels, one of `layers.INITIALIZERS`.
      dtype: dtype of the computation.
    """

    features: int
    segments: int | str = "depthwise"
    group_width: int | str | None = None
    order: str = "depthwise_first"
    intermediate_activation: str = "none"
    intermediate_slope: float = 0.1
    intermediate_norm: Norm | None = None
    depth_multiplier: int = 1
    kernel_size: int = 3
    initialization: str = "glorot"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h w f"]:
        conv = partial(Conv, initialization=self.initialization, dtype=self.dtype)
        if self.order == "pointwise_first":
            _require_multiple(self.features, self.depth_multiplier, "depth_multiplier")
            x = conv(self.features // self.depth_multiplier, name="pointwise")(x)
            return self._spatial(conv, self._between(x, train))
        x = self._between(self._spatial(conv, x), train)
        return conv(self.features, name="pointwise")(x)

    def _between(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        if self.intermediate_norm is not None:
            x = self.intermediate_norm(name="intermediate_bn")(x, train)
        self.sow("intermediates", BEFORE_ACTIVATION, x)  # only stored if the collection is mutable
        return ACTIVATIONS[self.intermediate_activation](x, self.intermediate_slope)

    def _spatial(self, conv: Callable[..., nn.Module], x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        channels = x.shape[-1]
        if self.group_width is not None:
            width = channels if self.group_width == "all" else int(self.group_width)
            _require_multiple(channels, width, "group_width")
            segments = channels // width
        else:
            segments = channels if self.segments == "depthwise" else int(self.segments)
        features = channels * self.depth_multiplier
        kernel_size = (self.kernel_size, self.kernel_size)
        return conv(features, kernel_size, segments=segments, name="spatial")(x)


class RegularConv(nn.Module):
    """A single dense convolution, which the paper does not have.

    Unlike in `SeparableConv(segments=1)`, no pointwise convolution follows.

    Attributes:
      features: output channels.
      kernel_size: side of the convolution.
      initialization: initialization of the kernel, one of `layers.INITIALIZERS`.
      dtype: dtype of the computation.
    """

    features: int
    kernel_size: int = 3
    initialization: str = "glorot"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool = False) -> Float[Array, "b h w f"]:
        kernel_size = (self.kernel_size, self.kernel_size)
        return Conv(self.features, kernel_size, initialization=self.initialization, dtype=self.dtype, name="spatial")(x)


class InceptionModule(nn.Module):
    """Figure 1: the canonical Inception module with four concatenated towers of equal width.

    Inside a tower, BN and ReLU follow every convolution as in Inception V3, except the last one. The module can
    therefore replace a separable convolution in Xception, where BN and ReLU follow outside.

    Attributes:
      features: output channels. If it is not divisible by 4, the last tower is wider.
      norm: constructor of BatchNorm.
      kernel_size: side of the spatial convolutions.
      initialization: initialization of the kernels, one of `layers.INITIALIZERS`.
      dtype: dtype of the computation.
    """

    features: int
    norm: Norm = BatchNorm
    kernel_size: int = 3
    initialization: str = "glorot"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w f"]:
        width = self.features // 4
        pointwise = partial(Conv, initialization=self.initialization, dtype=self.dtype)
        spatial = partial(pointwise, kernel_size=(self.kernel_size, self.kernel_size))

        def reduce(name: str) -> Array:
            return nn.relu(self.norm(name=f"{name}_bn")(pointwise(width, name=name)(x), train))

        tower_1x1 = pointwise(width, name="tower_1x1")(x)
        tower_3x3 = spatial(width, name="tower_3x3")(reduce("tower_3x3_reduce"))
        tower_double = spatial(width, name="tower_double_1")(reduce("tower_double_reduce"))
        tower_double = nn.relu(self.norm(name="tower_double_1_bn")(tower_double, train))
        tower_double = spatial(width, name="tower_double_2")(tower_double)
        tower_pool = pointwise(self.features - 3 * width, name="tower_pool")(ops.avg_pool(x))
        return jnp.concatenate([tower_1x1, tower_3x3, tower_double, tower_pool], axis=-1)


def _require_multiple(features: int, divisor: int, name: str) -> None:
    """Raises ValueError instead of leaving channels out."""
    if features % divisor:
        raise ValueError(f"{features} features are not a multiple of {name}={divisor}")


class SimplifiedInceptionModule(nn.Module):
    """Figure 2: concatenated towers of a 1 x 1 and a 3 x 3 convolution, without activations.

    It computes the same function as `SeparableConv` with as many segments as towers and the pointwise convolution
    first (figure 3). `figure_3_from_figure_2` converts the weights.

    Attributes:
      features: output channels.
      towers: number of towers.
      dtype: dtype of the computation.
    """

    features: int
    towers: int = 3
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        _require_multiple(self.features, self.towers, "towers")
        width = self.features // self.towers
        outputs = []
        for tower in range(self.towers):
            y = Conv(width, dtype=self.dtype, name=f"tower{tower}_1x1")(x)
            outputs.append(Conv(width, (3, 3), dtype=self.dtype, name=f"tower{tower}_3x3")(y))
        return jnp.concatenate(outputs, axis=-1)


def figure_3_from_figure_2(params: dict) -> dict:
    """Returns the `SeparableConv` parameters with which figure 3 equals figure 2 with `params`."""
    towers = range(sum(name.endswith("_1x1") for name in params))

    def concatenate(suffix: str) -> dict[str, Array]:
        return {"kernel": jnp.concatenate([params[f"tower{t}_{suffix}"]["kernel"] for t in towers], axis=-1)}

    return {"pointwise": concatenate("1x1"), "spatial": concatenate("3x3")}
