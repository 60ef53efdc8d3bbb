"""Builds learning-rate schedules and optimizers: those of the paper (section 4.2), and modern ones from optax.

To add one, add a function, a line in `SCHEDULES` or `OPTIMIZERS`, and its fields in config/training.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import optax

from xception_jax.config import (
    AdamConfig,
    ExperimentConfig,
    LionConfig,
    OptimizerConfig,
    RMSPropConfig,
    ScheduleConfig,
    SGDConfig,
    StaircaseConfig,
    duration_in_steps,
)
from xception_jax.config.fields import MAX_INTEGER
from xception_jax.training.finetuning import multiply_rates, only_trained

Mask = Callable[[Any], Any]  # from a parameter tree to the same tree of bools


def _staircase(config: StaircaseConfig, steps: Callable[[str], int], _: int) -> optax.Schedule:
    every = max(1, steps(config.decay_every))
    return optax.exponential_decay(config.learning_rate, every, config.decay_rate, staircase=True)


def _cosine(config: ScheduleConfig, steps: Callable[[str], int], remaining: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, max(1, remaining))


def _constant(config: ScheduleConfig, steps: Callable[[str], int], _: int) -> optax.Schedule:
    return optax.constant_schedule(config.learning_rate)


# Arguments: the config, a function that converts durations to steps, and the number of steps after the warm-up.
SCHEDULES: dict[str, Callable[[Any, Callable[[str], int], int], optax.Schedule]] = {
    "staircase": _staircase,
    "cosine": _cosine,
    "constant": _constant,
}


def make_schedule(config: ExperimentConfig, num_examples: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates.

    'staircase' multiplies by `decay_rate` once every `decay_every`. 'cosine' decays to zero at the end of the run. A
    warm-up rises linearly from zero to `learning_rate`; the schedule starts after it.

    Args:
      config: the config of the experiment.
      num_examples: number of examples in one epoch.
    """

    def steps(duration: str) -> int:
        """Optax counts steps in int32, and no run has more."""
        return min(duration_in_steps(duration, config.batch_size, num_examples), MAX_INTEGER)

    peak, warmup = config.schedule.learning_rate, steps(config.schedule.warmup)
    main = SCHEDULES[config.schedule.name](config.schedule, steps, steps(config.duration) - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup]) if warmup else main


def _l2(config: OptimizerConfig, decayed: Mask) -> list[optax.GradientTransformation]:
    """Returns coupled weight decay: adds the gradient of `weight_decay` / 2 times the squared norm, as in TF-Slim."""
    return [optax.add_decayed_weights(config.weight_decay, decayed)] if config.weight_decay else []


def _sgd(config: SGDConfig, rate: optax.Schedule, decayed: Mask) -> list[optax.GradientTransformation]:
    return [*_l2(config, decayed), optax.sgd(rate, config.momentum, nesterov=config.nesterov)]


def _rmsprop(config: RMSPropConfig, rate: optax.Schedule, decayed: Mask) -> list[optax.GradientTransformation]:
    # As in TensorFlow: epsilon inside the root, mean square initialized to one, learning rate applied before momentum.
    rmsprop = optax.rmsprop(
        rate,
        decay=config.rmsprop_decay,
        eps=config.rmsprop_epsilon,
        eps_in_sqrt=True,
        initial_scale=1.0,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )
    return [*_l2(config, decayed), rmsprop]


def _adam(config: AdamConfig, rate: optax.Schedule, decayed: Mask) -> list[optax.GradientTransformation]:
    return [*_l2(config, decayed), optax.adam(rate, config.b1, config.b2, config.epsilon)]


def _adamw(config: AdamConfig, rate: optax.Schedule, decayed: Mask) -> list[optax.GradientTransformation]:
    return [optax.adamw(rate, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decayed)]


def _lamb(config: AdamConfig, rate: optax.Schedule, decayed: Mask) -> list[optax.GradientTransformation]:
    return [optax.lamb(rate, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decayed)]


def _lion(config: LionConfig, rate: optax.Schedule, decayed: Mask) -> list[optax.GradientTransformation]:
    return [optax.lion(rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed)]


# Arguments: the config, the schedule, and a mask of the parameters to decay.
OPTIMIZERS: dict[str, Callable[[Any, optax.Schedule, Mask], list[optax.GradientTransformation]]] = {
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
}


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer described by `config.optimizer`.

    In sgd, rmsprop and adam, weight decay is coupled (L2): it is added to the gradient, before momentum and scaling. In
    adamw, lamb and lion it is decoupled: `weight_decay` times the parameter is added to the scaled update, which is
    then multiplied by the learning rate (and by the trust ratio in lamb).

    Frozen parameters have no update, decay or optimizer state, and are excluded from the norm that is clipped: `init`
    leaves them out, and `update` expects the `finetuning.trained_part` of gradients and parameters.
    """
    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    steps += OPTIMIZERS[config.name](config, schedule, by_name(config.decayed))
    if config.multipliers:
        steps.append(multiply_rates(config.multipliers))
    return only_trained(optax.chain(*steps), config.frozen) if config.frozen else optax.chain(*steps)


def by_name(pattern: str) -> Mask:
    """Returns a function that maps a parameter tree to a mask, True where the name of a leaf matches the pattern.

    Names are paths joined by slashes, such as `block2_sepconv1/spatial/kernel`.
    """

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/")) is not None,
            params,
        )

    return mask
