"""Xception: figure 5 of Chollet 2017, and every variation of it that the paper or its open questions ask for."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from xception_jax import ops
from xception_jax.models.layers import BatchNorm, Conv, Dtype, Head
from xception_jax.models.modules import InceptionModule, Norm, SeparableConv, channel_divisor


class Xception(nn.Module):
    """36 convolutional layers in 14 modules, with linear residuals around all but the first and the last.

    The attributes are the fields of `config.model` (xception_jax/fields.py). Where `segments` or `group_width`
    do not divide a layer's channels, the channels are rounded to the nearest multiple.
    """

    num_classes: int = 1000
    width_multiplier: float = 1.0
    middle_blocks: int = 8
    segments: int | str = "depthwise"
    group_width: int | None = None
    order: str = "depthwise_first"
    intermediate_activation: str = "none"
    module: str = "separable"
    residual: bool = True
    depth_multiplier: int = 1
    kernel_size: int = 3
    stem: str = "imagenet"
    fc_layers: int = 0
    fc_width: int = 4096
    dropout_rate: float = 0.5
    norm: Norm = BatchNorm
    padding: str = "same"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"], train: bool = False):
        """Returns (logits [b, num_classes], endpoints) for images in [-1, 1].

        `endpoints` holds the output of each module, `block1` to `block14` with eight middle modules, and
        `pre_logits` [b, 2048], what the classifier sees before dropout.
        """
        width = self._width
        endpoints = {}

        def conv_bn(x, features, name, **kwargs):
            x = Conv(features, dtype=self.dtype, name=name, **kwargs)(x)
            return self.norm(name=f"{name}_bn")(x, train)

        def sepconv_bn(x, features, name):
            return self.norm(name=f"{name}_bn")(self._module(features, name)(x, train), train)

        def shortcut(x, features, block):
            return conv_bn(x, features, f"block{block}_shortcut", stride=2) if self.residual else 0.0

        def pool(x):
            return ops.max_pool(x, padding="SAME" if self.padding == "same" else "SYMMETRIC")

        # Entry flow.
        stem = {"stride": 2, "padding": "VALID"} if self.stem == "imagenet" else {}
        x = nn.relu(conv_bn(images, width(32), "block1_conv1", kernel_size=(3, 3), **stem))  # [b, 149, 149, 32]
        stem.pop("stride", None)
        x = nn.relu(conv_bn(x, width(64), "block1_conv2", kernel_size=(3, 3), **stem))  # [b, 147, 147, 64]
        endpoints["block1"] = x

        for block, features in ((2, width(128)), (3, width(256)), (4, width(728))):
            residual = shortcut(x, features, block)
            if block > 2:
                x = nn.relu(x)
            x = sepconv_bn(x, features, f"block{block}_sepconv1")
            x = sepconv_bn(nn.relu(x), features, f"block{block}_sepconv2")
            x = pool(x) + residual  # [b, 74, 74, 128], [b, 37, 37, 256], [b, 19, 19, 728]
            endpoints[f"block{block}"] = x

        # Middle flow.
        for block in range(5, 5 + self.middle_blocks):
            residual = x if self.residual else 0.0
            for layer in (1, 2, 3):
                x = sepconv_bn(nn.relu(x), width(728), f"block{block}_sepconv{layer}")
            x = x + residual
            endpoints[f"block{block}"] = x

        # Exit flow.
        block = 5 + self.middle_blocks
        residual = shortcut(x, width(1024), block)
        x = sepconv_bn(nn.relu(x), width(728), f"block{block}_sepconv1")
        x = sepconv_bn(nn.relu(x), width(1024), f"block{block}_sepconv2")
        x = pool(x) + residual  # [b, 10, 10, 1024]
        endpoints[f"block{block}"] = x

        block += 1
        x = nn.relu(sepconv_bn(x, width(1536), f"block{block}_sepconv1"))
        x = nn.relu(sepconv_bn(x, width(2048), f"block{block}_sepconv2"))  # [b, 10, 10, 2048]
        endpoints[f"block{block}"] = x

        head = Head(self.num_classes, self.fc_layers, self.fc_width, self.dropout_rate, self.dtype, name="head")
        logits, endpoints["pre_logits"] = head(x, train)
        return logits, endpoints

    def _width(self, channels: int) -> int:
        divisor = channel_divisor(self.segments, self.group_width, self.order, self.depth_multiplier)
        return max(1, round(channels * self.width_multiplier / divisor)) * divisor

    def _module(self, features: int, name: str):
        """Returns what stands where figure 5 has a separable convolution, called with (x, train)."""
        if self.module == "inception":
            return InceptionModule(features, self.norm, self.kernel_size, self.dtype, name=name)
        separable = SeparableConv(
            features,
            segments=self.segments,
            group_width=self.group_width,
            order=self.order,
            intermediate_activation=self.intermediate_activation,
            depth_multiplier=self.depth_multiplier,
            kernel_size=self.kernel_size,
            dtype=self.dtype,
            name=name,
        )
        return lambda x, train: separable(x)
