"""The fields of each network: `config.model`.

To add a network, add its dataclass here, a line in `NETWORKS`, and its module in models/. The dataclasses are apart
from the modules because a config is checked, and `--help` printed, before JAX is imported.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from xception_jax.config.fields import choice, choice_or_integer, flag, integer, number, strides
from xception_jax.config.section import Section
from xception_jax.errors import ConfigError

IMAGE_CHANNELS = 3
_OTHER_MODULES = {"module": ("inception", "regular")}  # these have no segments, and nothing between two convolutions
_TOWERS = 4  # of an Inception module


@dataclasses.dataclass(frozen=True)
class BatchNormConfig(Section):
    """Batch normalization, see `models.layers.BatchNorm`."""

    path: ClassVar[str] = "model.batch_norm."

    momentum: float = number(0.99, 0.0, 1.0, "reference: Keras; weight of the past in the running averages")
    epsilon: float = number(1e-3, 0.0, 1.0, "reference: Keras; added to the variance", above=True)
    scale: bool = flag(True, "paper: table 3 counts it; default of inception_v3: False, as in Keras")
    statistics: str | int = choice_or_integer("global", ("global", "device"), 1, "inferred: the paper's is per device")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The fields that all networks have."""

    path: ClassVar[str] = "model."

    name: str = ""
    num_classes: int = integer(1000, 1, "paper: section 4, ImageNet; number of classes")
    width_multiplier: float = number(
        1.0, 0.0, 64.0, "paper: figure 5 has 1; factor of the number of channels of every layer", above=True
    )
    fc_layers: int = integer(0, 0, "paper: section 4.5.1; fully connected layers in front of the classifier (JFT: 2)")
    fc_width: int = integer(4096, 1, "paper: section 4.5.1; units of each of these layers", unless={"fc_layers": (0,)})
    dropout_rate: float = number(
        0.5, 0.0, 0.99, "paper: section 4.3 (ImageNet 0.5, JFT none); dropout in front of the classifier"
    )
    padding: str = choice("same", ("same", "symmetric"), "reference: Keras; 'symmetric' is what PyTorch ports do")
    dtype: str = choice(
        "float32", ("float32", "bfloat16", "float64"), "local: dtype of activations; parameters have at least 32 bits"
    )
    batch_norm: BatchNormConfig = BatchNormConfig()

    @property
    def smallest_side(self) -> int:
        """Returns the smallest side of images, in pixels, for which no layer is empty."""
        return 1


@dataclasses.dataclass(frozen=True)
class XceptionConfig(ModelConfig):
    """Xception (figure 5) and its variations along the axes that the paper asks about."""

    name: str = "xception"
    middle_blocks: int = integer(8, 0, "paper: figure 5; residual blocks of the middle flow")
    module: str = choice(
        "separable",
        ("separable", "inception", "regular"),
        "paper: figure 5 has separable convolutions; 'regular' is one convolution without a pointwise partner",
    )
    segments: str | int = choice_or_integer(
        "depthwise",
        ("depthwise",),
        1,
        "paper: section 1.2, the end of the spectrum; groups of channels in each spatial convolution",
        unless=_OTHER_MODULES,
    )
    group_width: str | int | None = choice_or_integer(
        None,
        ("all",),
        1,
        "local: channels per segment, an alternative to `segments`; 'all' is one segment",
        unless=_OTHER_MODULES,
    )
    order: str = choice(
        "depthwise_first",
        ("depthwise_first", "pointwise_first"),
        "reference: as Keras' layer; which of the two convolutions comes first",
        unless=_OTHER_MODULES,
    )
    intermediate_activation: str = choice(
        "none",
        ("none", "relu", "elu", "leaky_relu", "scaled", "scaled_elu"),
        "paper: section 4.7, figure 10; 'scaled' is x / rms, with the rms of each image, 'scaled_elu' its ELU",
        unless=_OTHER_MODULES,
    )
    intermediate_slope: float = number(
        0.1,
        0.0,
        1.0,
        "local: of 'leaky_relu' for negative values",
        unless=_OTHER_MODULES | {"intermediate_activation": ("none", "relu", "elu", "scaled", "scaled_elu")},
    )
    intermediate_batch_norm: bool = flag(
        False, "paper: section 3, none between the two convolutions; MobileNets have it", unless=_OTHER_MODULES
    )
    depth_multiplier: int = integer(
        1, 1, "reference: Keras; spatial filters for each channel of a separable convolution", unless=_OTHER_MODULES
    )
    residual: bool = flag(True, "paper: section 4.6, figure 9; residual connections")
    kernel_size: int = integer(3, 1, "paper: figure 5; side of the spatial filters of all blocks")
    stem: str = choice(
        "imagenet",
        ("imagenet", "small", "module"),
        "paper: figure 5; 'small' keeps the size, for 32 x 32; 'module' has the modules of other layers",
    )
    stem_width: int | None = integer(
        None, 1, "local: filters of the first convolution, and half of those of the second; None: 32 x width_multiplier"
    )
    head_width: int | None = integer(
        None, 1, "local: channels of the features, the last convolution; None: 2,048 x width_multiplier"
    )
    strides: tuple[int, ...] = strides(
        (2, 2, 2, 2), "paper: figure 5, of blocks 2, 3, 4 and the first of the exit flow; 1 is without pooling"
    )
    initialization: str = choice(
        "glorot",
        ("glorot", "variance_preserving"),
        "reference: Keras, whose variance falls with the segments; the other counts the fan of a segment",
    )

    def check(self) -> None:
        """Rejects `segments` together with `group_width`, even kernels, and widths that do not divide."""
        if self.group_width is not None and self.segments != "depthwise":
            raise ConfigError(
                f"config.model.segments={self.segments!r} and group_width={self.group_width!r} contradict each other",
                "config.model",
                "set one of them: segments counts the groups of channels, group_width the channels in each",
            )
        if self.kernel_size % 2 == 0:
            raise ConfigError(
                f"config.model.kernel_size is {self.kernel_size}",
                "config.model.kernel_size",
                "set it to an odd number: 3, 5 or 7",
            )
        widths = [round(128 * self.width_multiplier), round(0.75 * self.head_width) if self.head_width else _TOWERS]
        if self.stem == "module":
            widths.append(self.stem_width or round(32 * self.width_multiplier))
        if self.module == "inception" and min(widths) < _TOWERS:
            raise ConfigError(
                f"an Inception module has {min(widths)} channels, fewer than its {_TOWERS} towers",
                "config.model",
                f"set width_multiplier to at least {_TOWERS / (128 if len(widths) == 2 else 32):g}, and the widths of "
                f"stem and head to at least {_TOWERS} and {math.ceil(_TOWERS / 0.75)}",
            )
        stem = (self.stem_width or 0) * (1 if self.stem == "module" else 2)
        for name, channels in (("stem_width", stem), ("head_width", self.head_width or 0)):
            if channels % self.channel_divisor:
                raise ConfigError(
                    f"config.model.{name}={getattr(self, name)} gives a layer {channels} channels, which the segments "
                    f"do not divide",
                    f"config.model.{name}",
                    f"choose one for which the layer has a multiple of {self.channel_divisor} channels",
                )

        if self.stem == "module" and self.order == "depthwise_first" and IMAGE_CHANNELS % self.channel_divisor:
            name = "segments" if self.group_width is None else "group_width"
            raise ConfigError(
                f"config.model.{name}={getattr(self, name)!r} does not divide the {IMAGE_CHANNELS} channels of an "
                f"image, as stem='module' requires",
                f"config.model.{name}",
                f"set it to a divisor of {IMAGE_CHANNELS}, or config.model.stem='small'",
            )

    @property
    def smallest_side(self) -> int:
        """Returns the smallest side of images, in pixels, for which no layer is empty."""
        return 7 if self.stem == "imagenet" else 1

    @property
    def channel_divisor(self) -> int:
        """Returns the number by which the channels of all layers must be divisible for equal segments."""
        if self.group_width is not None:
            divisor = 1 if self.group_width == "all" else int(self.group_width)
        else:
            divisor = 1 if self.segments == "depthwise" else int(self.segments)
        return divisor * self.depth_multiplier if self.order == "pointwise_first" else divisor


@dataclasses.dataclass(frozen=True)
class InceptionV3Config(ModelConfig):
    """Inception V3, the paper's baseline."""

    name: str = "inception_v3"
    batch_norm: BatchNormConfig = BatchNormConfig(scale=False)  # as in TF-Slim and Keras
    aux_head: bool = flag(False, "paper: section 4.3, not used; an auxiliary classifier, in training only")

    @property
    def smallest_side(self) -> int:
        """Returns the smallest side of images, in pixels, for which no layer is empty."""
        return 107 if self.aux_head else 75


NETWORKS: dict[str, ModelConfig] = {
    "xception": XceptionConfig(),
    "inception_v3": InceptionV3Config(),
    "inception_v3_2016": InceptionV3Config(name="inception_v3_2016", batch_norm=BatchNormConfig()),
}
