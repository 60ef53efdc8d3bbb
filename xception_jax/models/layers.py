"""Defines the layers that all networks share: convolution, BatchNorm and the classifier."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xception_jax import ops
from xception_jax.config import ModelConfig
from xception_jax.ops.padding import Padding

Dtype = jnp.dtype

# Keras's default for convolutions. For a depthwise kernel with 728 channels, its standard deviation is 1/19 of that of
# Flax's default.
glorot_uniform = nn.initializers.glorot_uniform()

# Of convolutions. Glorot's fans are those of the whole layer. With S segments, k x k taps and C channels they are
# k*k*C/S and k*k*C, which multiplies the variance by 2 / (1 + S). The other initializer keeps it for every S.
INITIALIZERS = {
    "glorot": glorot_uniform,
    "variance_preserving": nn.initializers.variance_scaling(1.0, "fan_in", "uniform"),
}


def param_dtype(dtype: Dtype) -> Dtype:
    """Returns the dtype of parameters and statistics: float32, or float64 if the computation is in float64."""
    return jnp.promote_types(dtype, jnp.float32)


class Conv(nn.Module):
    """A two-dimensional convolution, with any number of channel segments.

    Attributes:
      features: number of filters.
      kernel_size: (height, width).
      stride: stride of both rows and columns.
      padding: 'SAME', 'VALID' or 'SYMMETRIC'.
      segments: number of equal groups of channels that are convolved separately. If it is the number of channels, this
        is a depthwise convolution.
      use_bias: whether to add a learned constant per filter.
      initialization: initialization of the kernel, one of `INITIALIZERS`.
      dtype: dtype of the computation.
    """

    features: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: Padding = "SAME"
    segments: int = 1
    use_bias: bool = False
    initialization: str = "glorot"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow f"]:
        shape = (*self.kernel_size, x.shape[-1] // self.segments, self.features)
        kernel = self.param("kernel", INITIALIZERS[self.initialization], shape, param_dtype(self.dtype))
        y = ops.conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            segments=self.segments,
            stride=self.stride,
            padding=self.padding,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), param_dtype(self.dtype))
            y = y + bias.astype(self.dtype)
        return y


class BatchNorm(nn.Module):
    """Normalizes each channel by its mean and variance over all pixels of a group of images.

    In training, the batch is divided into groups of consecutive images. Each group is normalized by its own statistics,
    and the running averages move towards the mean of the statistics of all groups. The variance is biased, as in Keras.

    Attributes:
      momentum: share of the running averages that a step keeps.
      epsilon: constant added to the variance.
      use_scale: whether to learn a factor per channel (gamma). The constant (beta) is always learned.
      statistics: 'global' for a single group, 'device' for one group per device of the ambient mesh, which needs no
        communication, or the number of images in each group.
      dtype: dtype of the result. Statistics are always computed in float32 or float64.
      scale_init: initializes the factor (gamma).
    """

    momentum: float = 0.99
    epsilon: float = 1e-3
    use_scale: bool = True
    statistics: str | int = "global"
    dtype: Dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        channels, dtype = x.shape[-1:], param_dtype(self.dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, dtype)
        # Loaded weights may be float16 or bfloat16.
        beta = self.param("bias", nn.initializers.zeros, channels, dtype).astype(dtype)
        gamma = self.param("scale", self.scale_init, channels, dtype).astype(dtype) if self.use_scale else 1.0
        if not train:
            factor = jax.lax.rsqrt(running_var.value.astype(dtype) + self.epsilon) * gamma
            return (x * factor + (beta - running_mean.value.astype(dtype) * factor)).astype(self.dtype)

        # Average over each image first: reshaping the whole activation into groups would copy it on a TPU.
        groups = self._num_groups(x.shape[0])
        values = x.astype(dtype)

        def over_group(values: Float[Array, "b h w c"]) -> Float[Array, "g c"]:
            return values.mean((1, 2)).reshape(groups, -1, *channels).mean(1)

        mean = over_group(values)
        # Both averages take one pass over x, and one all-reduce if the group spans devices.
        var = jnp.maximum(over_group(jnp.square(values)) - jnp.square(mean), 0.0)
        if not self.is_initializing():
            for running, batch in ((running_mean, mean), (running_var, var)):
                running.value += (1 - self.momentum) * (batch.mean(0) - running.value)
        factor = jax.lax.rsqrt(var + self.epsilon) * gamma
        factor, constant = (
            jnp.repeat(each, x.shape[0] // groups, axis=0)[:, None, None] for each in (factor, beta - mean * factor)
        )
        return (values * factor + constant).astype(self.dtype)

    def _num_groups(self, batch: int) -> int:
        if self.statistics == "global":
            return 1
        if self.statistics == "device":
            # The batch is sharded over all axes of the mesh, in order, so a group is the shard of one device. Inside
            # `jax.shard_map`, x is such a shard. Without an ambient mesh, there is one group.
            mesh = jax.sharding.get_abstract_mesh()
            divisor = groups = math.prod(mesh.shape[axis] for axis in mesh.axis_names if axis not in mesh.manual_axes)
        else:
            divisor = int(self.statistics)
            groups = batch // divisor
        if batch % divisor:
            raise ValueError(f"a batch of {batch} images does not fit statistics={self.statistics!r}")
        return groups


def norm_of(config: ModelConfig) -> partial[BatchNorm]:
    """Returns the constructor of the BatchNorm layers of a network, which takes their name."""
    norm = config.batch_norm
    return partial(
        BatchNorm,
        momentum=norm.momentum,
        epsilon=norm.epsilon,
        use_scale=norm.scale,
        statistics=norm.statistics,
        dtype=jnp.dtype(config.dtype),
    )


class Head(nn.Module):
    """Global average pooling, fully connected layers if any, dropout and logistic regression (sections 3, 4.3, 4.5.1).

    Returns (logits [b, num_classes], pre_logits [b, c]), both in float32 or float64.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> tuple[Float[Array, "b n"], Float[Array, "b c"]]:
        config = self.config
        dense = partial(nn.Dense, kernel_init=glorot_uniform)
        dtype = param_dtype(jnp.dtype(config.dtype))
        x = x.mean((1, 2), dtype=dtype)
        for layer in range(1, config.fc_layers + 1):
            x = nn.relu(dense(config.fc_width, dtype=jnp.dtype(config.dtype), param_dtype=dtype, name=f"fc{layer}")(x))
        pre_logits = x.astype(dtype)
        x = nn.Dropout(config.dropout_rate, deterministic=not train)(pre_logits)
        return dense(config.num_classes, dtype=dtype, param_dtype=dtype, name="predictions")(x), pre_logits
