"""Defines Xception (figure 5 of Chollet 2017), and variants for the experiments and open questions of the paper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from xception_jax import ops
from xception_jax.config import XceptionConfig
from xception_jax.models.layers import Conv, Head, norm_of
from xception_jax.models.modules import InceptionModule, RegularConv, SeparableConv


class Xception(nn.Module):
    """36 convolutional layers in 14 modules, with linear residuals around all modules except the first and the last.

    The convolutions of shortcuts are not counted. If the channels of a layer are not divisible by `config.segments` or
    `config.group_width`, they are rounded to the nearest multiple. `config.stem_width` and `config.head_width` fix both
    ends of the network, whatever its width.
    """

    config: XceptionConfig

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], train: bool = False
    ) -> tuple[Float[Array, "b n"], dict[str, Array]]:
        """Returns (logits [b, num_classes], endpoints) for images in [-1, 1].

        `endpoints` has the output of each module, `block1` to `block14` with eight middle modules, and `pre_logits`,
        the input of the classifier before dropout: [b, 2048], or [b, 4096] with `config.fc_layers`.
        """
        config, width = self.config, self._width
        dtype, norm = jnp.dtype(config.dtype), norm_of(config)
        endpoints = {}

        def conv_bn(x: Array, features: int, name: str, **kwargs: Any) -> Array:
            x = Conv(features, initialization=config.initialization, dtype=dtype, name=name, **kwargs)(x)
            return norm(name=f"{name}_bn")(x, train)

        def sepconv_bn(x: Array, features: int, name: str) -> Array:
            return norm(name=f"{name}_bn")(self._module(features, name)(x, train), train)

        def shortcut(x: Array, features: int, block: int, stride: int) -> Array | float:
            return conv_bn(x, features, f"block{block}_shortcut", stride=stride) if config.residual else 0.0

        def pool(x: Array, stride: int) -> Array:
            return x if stride == 1 else ops.max_pool(x, padding="SAME" if config.padding == "same" else "SYMMETRIC")

        # Entry flow.
        stride, padding = (2, "VALID") if config.stem == "imagenet" else (1, "SAME")
        stem_width, stem_output = width(32), width(64)
        if config.stem_width is not None:
            stem_width, stem_output = config.stem_width, 2 * config.stem_width
        if config.stem == "module":
            x = nn.relu(sepconv_bn(images, stem_width, "block1_conv1"))
            x = nn.relu(sepconv_bn(x, stem_output, "block1_conv2"))
        else:
            conv3x3_bn = partial(conv_bn, kernel_size=(3, 3), padding=padding)
            x = nn.relu(conv3x3_bn(images, stem_width, "block1_conv1", stride=stride))  # [b, 149, 149, 32]
            x = nn.relu(conv3x3_bn(x, stem_output, "block1_conv2"))  # [b, 147, 147, 64]
        endpoints["block1"] = x

        for block, channels, stride in zip((2, 3, 4), (128, 256, 728), config.strides[:3], strict=True):
            features = width(channels)
            residual = shortcut(x, features, block, stride)  # figure 5 can be read as a chain of shortcuts
            if block > 2:  # block1 ends in a ReLU
                x = nn.relu(x)
            x = sepconv_bn(x, features, f"block{block}_sepconv1")
            x = sepconv_bn(nn.relu(x), features, f"block{block}_sepconv2")
            x = pool(x, stride) + residual  # [b, 74, 74, 128], [b, 37, 37, 256], [b, 19, 19, 728]
            endpoints[f"block{block}"] = x

        # Middle flow.
        for block in range(5, 5 + config.middle_blocks):
            residual = x if config.residual else 0.0
            for layer in (1, 2, 3):
                x = sepconv_bn(nn.relu(x), width(728), f"block{block}_sepconv{layer}")
            x = x + residual
            endpoints[f"block{block}"] = x

        # Exit flow.
        block, stride = 5 + config.middle_blocks, config.strides[3]
        residual = shortcut(x, width(1024), block, stride)
        x = sepconv_bn(nn.relu(x), width(728), f"block{block}_sepconv1")
        x = sepconv_bn(nn.relu(x), width(1024), f"block{block}_sepconv2")
        x = pool(x, stride) + residual  # [b, 10, 10, 1024]
        endpoints[f"block{block}"] = x

        block += 1
        before, features = width(1536), width(2048)
        if config.head_width is not None:
            before, features = self._rounded(0.75 * config.head_width), config.head_width
        x = nn.relu(sepconv_bn(x, before, f"block{block}_sepconv1"))
        x = nn.relu(sepconv_bn(x, features, f"block{block}_sepconv2"))  # [b, 10, 10, 2048]
        endpoints[f"block{block}"] = x

        logits, endpoints["pre_logits"] = Head(config, name="head")(x, train)
        return logits, endpoints

    def _width(self, channels: int) -> int:
        return self._rounded(channels * self.config.width_multiplier)

    def _rounded(self, channels: float) -> int:
        divisor = self.config.channel_divisor
        return max(1, round(channels / divisor)) * divisor

    def _module(self, features: int, name: str) -> nn.Module:
        """Returns the module in place of a separable convolution of figure 5, to be called with (x, train)."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        common = {
            "kernel_size": config.kernel_size, "initialization": config.initialization, "dtype": dtype, "name": name
        }  # fmt: skip
        return MODULES[config.module](config, features, common)


def _separable(config: XceptionConfig, features: int, common: dict[str, Any]) -> nn.Module:
    return SeparableConv(
        features,
        segments=config.segments,
        group_width=config.group_width,
        order=config.order,
        intermediate_activation=config.intermediate_activation,
        intermediate_slope=config.intermediate_slope,
        intermediate_norm=norm_of(config) if config.intermediate_batch_norm else None,
        depth_multiplier=config.depth_multiplier,
        **common,
    )


# What stands in place of a separable convolution of figure 5.
MODULES: dict[str, Callable[[XceptionConfig, int, dict[str, Any]], nn.Module]] = {
    "separable": _separable,
    "inception": lambda config, features, common: InceptionModule(features, norm_of(config), **common),
    "regular": lambda config, features, common: RegularConv(features, **common),
}
