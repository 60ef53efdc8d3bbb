"""Defines Inception V3, the baseline of the paper: the canonical network, and the 2016 graph of table 3.

TF-Slim and current versions of Keras have the canonical network. The 2016 graph was the first that Keras released. It
differs in the ways that `InceptionV3` lists, and has 23,626,728 parameters, the number in table 3.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from xception_jax import ops
from xception_jax.config import InceptionV3Config
from xception_jax.models.layers import Conv, Head, glorot_uniform, norm_of, param_dtype
from xception_jax.ops.padding import Padding

KernelSize = tuple[int, int]


class InceptionV3(nn.Module):
    """Inception V3 (Szegedy et al. 2015, arXiv 1512.00567), with eleven modules `mixed0` to `mixed10`.

    With `config.name='inception_v3_2016'` it is the 2016 graph: convolutions with bias, ReLU before BN, BN with a scale
    (`config.batch_norm.scale`), 32 filters in the pool projection of mixed1 and mixed2, 160 filters in the first
    convolution of the double 7 x 7 tower of mixed7, and average pooling in mixed8.

    `config.aux_head` adds an auxiliary classifier after mixed7, which returns `endpoints['aux_logits']` in training.
    With `config.padding='symmetric'`, average pooling counts the padding, as in PyTorch ports.
    """

    config: InceptionV3Config

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], train: bool = False
    ) -> tuple[Float[Array, "b n"], dict[str, Array]]:
        """Returns (logits [b, num_classes], endpoints) for images in [-1, 1].

        `endpoints` has the output of each module, `mixed0` to `mixed10`, and `pre_logits` [b, 2048], the input of the
        classifier before dropout.
        """
        layers = _Layers(self.config, train)
        x = _stem(layers, images)  # [b, 35, 35, 192]
        x = _mixed_0_to_2(layers, x)  # [b, 35, 35, 288]
        x = _mixed_3(layers, x)  # [b, 17, 17, 768]
        x = _mixed_4_to_7(layers, x)
        # Its kernel has the size of the map, so that it fits images of one size only.
        if self.config.aux_head and (train or self.is_initializing()):
            aux_logits = _aux_head(layers, x)
            if train:
                layers.endpoints["aux_logits"] = aux_logits
        x = _mixed_8(layers, x)  # [b, 8, 8, 1280]
        x = _mixed_9_and_10(layers, x)  # [b, 8, 8, 2048]
        logits, layers.endpoints["pre_logits"] = Head(self.config, name="head")(x, train)
        return logits, layers.endpoints


class _Layers:
    """Builds the layers of one call. Their parameters belong to the calling network, under the names given here.

    Attributes:
      endpoints: the output of each module so far.
      is_2016_graph: whether it is the 2016 graph.
    """

    def __init__(self, config: InceptionV3Config, train: bool):
        self.config, self.endpoints = config, dict[str, Array]()
        self.is_2016_graph = config.name == "inception_v3_2016"
        self._train = train

    def conv(
        self, x: Array, features: int, kernel_size: KernelSize, name: str, *, stride: int = 1, padding: Padding = "SAME"
    ) -> Array:
        """Applies a convolution with BN and ReLU."""
        dtype = jnp.dtype(self.config.dtype)
        features = max(1, round(features * self.config.width_multiplier))
        x = Conv(features, kernel_size, stride, padding, use_bias=self.is_2016_graph, dtype=dtype, name=name)(x)
        norm = norm_of(self.config)(name=f"{name}_bn")
        return norm(nn.relu(x), self._train) if self.is_2016_graph else nn.relu(norm(x, self._train))

    def tower(self, x: Array, name: str, *layers: tuple[int, KernelSize], last_stride: int = 1) -> Array:
        """Applies one convolution per (features, kernel_size). The last one is not padded if it is strided."""
        for i, (features, kernel_size) in enumerate(layers):
            if last_stride > 1 and i == len(layers) - 1:
                x = self.conv(x, features, kernel_size, f"{name}_{i}", stride=last_stride, padding="VALID")
            else:
                x = self.conv(x, features, kernel_size, f"{name}_{i}")
        return x

    def pooled(self, x: Array, features: int, name: str) -> Array:
        """Applies average pooling and a 1 x 1 convolution."""
        average = ops.avg_pool(x, count_padding=self.config.padding == "symmetric")
        return self.conv(average, features, (1, 1), f"{name}_pool_0")

    def concatenate(self, name: str, *towers: Array) -> Array:
        """Returns the output of a module."""
        self.endpoints[name] = jnp.concatenate(towers, axis=-1)
        return self.endpoints[name]


def _stem(layers: _Layers, images: Array) -> Array:
    x = layers.conv(images, 32, (3, 3), "stem_0", stride=2, padding="VALID")  # [b, 149, 149, 32]
    x = layers.conv(x, 32, (3, 3), "stem_1", padding="VALID")
    x = layers.conv(x, 64, (3, 3), "stem_2")  # [b, 147, 147, 64]
    x = ops.max_pool(x, padding="VALID")
    x = layers.conv(x, 80, (1, 1), "stem_3", padding="VALID")
    x = layers.conv(x, 192, (3, 3), "stem_4", padding="VALID")
    return ops.max_pool(x, padding="VALID")


def _mixed_0_to_2(layers: _Layers, x: Array) -> Array:
    is_2016_graph = layers.is_2016_graph
    for module, projection in ((0, 32), (1, 32 if is_2016_graph else 64), (2, 32 if is_2016_graph else 64)):
        name = f"mixed{module}"
        x = layers.concatenate(
            name,
            layers.tower(x, f"{name}_1x1", (64, (1, 1))),
            layers.tower(x, f"{name}_5x5", (48, (1, 1)), (64, (5, 5))),
            layers.tower(x, f"{name}_3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
            layers.pooled(x, projection, name),
        )
    return x


def _mixed_3(layers: _Layers, x: Array) -> Array:
    return layers.concatenate(
        "mixed3",
        layers.tower(x, "mixed3_3x3", (384, (3, 3)), last_stride=2),
        layers.tower(x, "mixed3_3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3)), last_stride=2),
        ops.max_pool(x, padding="VALID"),
    )


def _mixed_4_to_7(layers: _Layers, x: Array) -> Array:
    """Applies modules whose 7 x 7 convolutions are factorized into 1 x 7 and 7 x 1."""
    for module, features in ((4, 128), (5, 160), (6, 160), (7, 192)):
        name, f = f"mixed{module}", features
        first = 160 if layers.is_2016_graph and module == 7 else f
        double = ((first, (1, 1)), (f, (7, 1)), (f, (1, 7)), (f, (7, 1)), (192, (1, 7)))
        x = layers.concatenate(
            name,
            layers.tower(x, f"{name}_1x1", (192, (1, 1))),
            layers.tower(x, f"{name}_7x7", (f, (1, 1)), (f, (1, 7)), (192, (7, 1))),
            layers.tower(x, f"{name}_7x7dbl", *double),
            layers.pooled(x, 192, name),
        )
    return x


def _aux_head(layers: _Layers, x: Array) -> Array:
    """Applies the auxiliary classifier of Szegedy et al., section 4, as in TF-Slim, to x [b, 17, 17, 768]."""
    config = layers.config
    if min(x.shape[1:3]) < 5:
        raise ValueError(f"the auxiliary head needs images of at least 107 x 107, but mixed7 is {x.shape[1:3]}")
    x = ops.avg_pool(x, 5, 3, "VALID")  # [b, 5, 5, 768]
    x = layers.conv(x, 128, (1, 1), "aux_0")
    _, height, width, _ = x.shape
    x = layers.conv(x, 768, (height, width), "aux_1", padding="VALID")  # [b, 1, 1, 768]
    dtype = param_dtype(jnp.dtype(config.dtype))
    dense = nn.Dense(
        config.num_classes, dtype=dtype, param_dtype=dtype, kernel_init=glorot_uniform, name="aux_predictions"
    )
    return dense(x[:, 0, 0].astype(dtype))


def _mixed_8(layers: _Layers, x: Array) -> Array:
    seven = ((192, (1, 1)), (192, (1, 7)), (192, (7, 1)), (192, (3, 3)))
    return layers.concatenate(
        "mixed8",
        layers.tower(x, "mixed8_3x3", (192, (1, 1)), (320, (3, 3)), last_stride=2),
        layers.tower(x, "mixed8_7x7x3", *seven, last_stride=2),
        ops.avg_pool(x, 3, 2, "VALID") if layers.is_2016_graph else ops.max_pool(x, padding="VALID"),
    )


def _mixed_9_and_10(layers: _Layers, x: Array) -> Array:
    """Applies modules whose last convolution is split into parallel 1 x 3 and 3 x 1."""
    for module in (9, 10):
        name = f"mixed{module}"
        tower_1x1 = layers.tower(x, f"{name}_1x1", (320, (1, 1)))
        tower_3x3 = layers.tower(x, f"{name}_3x3", (384, (1, 1)))
        tower_double = layers.tower(x, f"{name}_3x3dbl", (448, (1, 1)), (384, (3, 3)))
        x = layers.concatenate(
            name,
            tower_1x1,
            layers.conv(tower_3x3, 384, (1, 3), f"{name}_3x3_1x3"),
            layers.conv(tower_3x3, 384, (3, 1), f"{name}_3x3_3x1"),
            layers.conv(tower_double, 384, (1, 3), f"{name}_3x3dbl_1x3"),
            layers.conv(tower_double, 384, (3, 1), f"{name}_3x3dbl_3x1"),
            layers.pooled(x, 192, name),
        )
    return x
