"""The fields of losses, optimizers and schedules: `config.loss`, `config.optimizer`, `config.schedule`.

To add an optimizer or a schedule, add a line in its table here and a function of that name in training/optimizers.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from xception_jax.config.fields import choice, class_weights, factors, flag, number, pattern, span
from xception_jax.config.section import Section


@dataclasses.dataclass(frozen=True)
class LossConfig(Section):
    """The loss of a training step."""

    path: ClassVar[str] = "loss."

    name: str = choice(
        "softmax", ("softmax", "sigmoid"), "paper: section 4, inferred for JFT; sigmoid allows several labels"
    )
    label_smoothing: float = number(
        0.1, 0.0, 0.99, "inferred: as in Inception V3; share of a label that is spread over all classes"
    )
    class_weights: str | tuple[float, ...] = class_weights(
        "modern: of the loss in training; 'balanced' is the inverse of the frequency of a class, 1 on average"
    )
    aux_weight: float = number(0.4, 0.0, 10.0, "modern: weight of the auxiliary head's loss, if there is one")

    @property
    def multi_label(self) -> bool:
        """Whether an image may have any number of labels, each with a probability of its own."""
        return self.name == "sigmoid"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """What all optimizers have in common."""

    path: ClassVar[str] = "optimizer."

    name: str = ""
    weight_decay: float = number(
        1e-5, 0.0, 1.0, "paper: section 4.3; coupled (L2) in sgd, rmsprop, adam, otherwise decoupled"
    )
    decayed: str = pattern(
        "kernel$", "inferred: parameters with weight decay: all kernels, neither BatchNorm nor biases"
    )
    frozen: str = pattern("", "modern: parameters that stay as they start, with their BN statistics; '' is none")
    multipliers: tuple[tuple[str, float], ...] = factors(
        "modern: factors of the learning rate by parameter name; the first pattern found in a name counts"
    )
    clip_norm: float = number(0.0, 0.0, math.inf, "local: 0 does not clip")


@dataclasses.dataclass(frozen=True)
class SGDConfig(OptimizerConfig):
    """SGD with momentum."""

    name: str = "sgd"
    momentum: float = number(0.9, 0.0, 1.0, "paper: section 4.2; share of the last update that is kept")
    nesterov: bool = flag(False, "inferred: not mentioned; Nesterov's form of momentum")


@dataclasses.dataclass(frozen=True)
class RMSPropConfig(SGDConfig):
    """RMSprop with momentum."""

    name: str = "rmsprop"
    rmsprop_decay: float = number(
        0.9, 0.0, 1.0, "inferred: as in Inception V3; weight of the past in the average of squares"
    )
    rmsprop_epsilon: float = number(
        1.0, 0.0, 10.0, "inferred: as in Inception V3; added to the average of squares", above=True
    )


@dataclasses.dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Lion: the sign of an average of gradients."""

    name: str = "lion"
    b1: float = number(0.9, 0.0, 1.0, "modern: weight of the past in the average of gradients", below=True)
    b2: float = number(0.99, 0.0, 1.0, "modern: weight of the past in the second average", below=True)


@dataclasses.dataclass(frozen=True)
class AdamConfig(LionConfig):
    """Adam and AdamW."""

    name: str = "adam"
    b2: float = number(
        0.999, 0.0, 1.0, "modern: weight of the past in the average of squares (default of lion: 0.99)", below=True
    )
    epsilon: float = number(
        1e-8, 0.0, 10.0, "modern: added to the root of the average of squares (default of lamb: 1e-6)", above=True
    )


@dataclasses.dataclass(frozen=True)
class LAMBConfig(AdamConfig):
    """LAMB: Adam with a rate for each layer."""

    name: str = "lamb"
    epsilon: float = number(1e-6, 0.0, 10.0, "modern: added to the root of the average of squares", above=True)


OPTIMIZERS: dict[str, OptimizerConfig] = {
    "sgd": SGDConfig(),
    "rmsprop": RMSPropConfig(),
    "adam": AdamConfig(),
    "adamw": AdamConfig(name="adamw"),
    "lamb": LAMBConfig(),
    "lion": LionConfig(),
}


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Section):
    """What all schedules of the learning rate have in common."""

    path: ClassVar[str] = "schedule."

    name: str = ""
    learning_rate: float = number(
        0.045, 0.0, 1e12, "paper: section 4.2; of the first step, or after the warm-up", above=True
    )
    warmup: str = span("0 steps", "modern: 5 epochs is common; duration of the linear rise from zero", zero=True)


@dataclasses.dataclass(frozen=True)
class StaircaseConfig(ScheduleConfig):
    """A rate that falls by a factor at even distances."""

    name: str = "staircase"
    decay_rate: float = number(
        0.94, 0.0, 1.0, "paper: section 4.2; factor of the learning rate at each decay", above=True
    )
    decay_every: str = span("2 epochs", "paper: section 4.2; duration between two decays")


SCHEDULES: dict[str, ScheduleConfig] = {
    "staircase": StaircaseConfig(),
    "cosine": ScheduleConfig(name="cosine"),
    "constant": ScheduleConfig(name="constant"),
}
