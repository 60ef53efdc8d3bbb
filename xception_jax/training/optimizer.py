"""Learning-rate schedules and optimisers of the paper (section 4.2), and cosine decay as the modern choice."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict

from xception_jax.fields import duration_in_steps
from xception_jax.training.finetuning import multiply_rates, only_trained


def make_schedule(config: ConfigDict, num_examples: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    'staircase' multiplies by `decay_rate` once every `decay_every`; 'cosine' falls to zero at the end of the run.
    A warm-up rises linearly from zero, and the schedule itself starts where the warm-up ends.

    Args:
      config: a whole resolved config.
      num_examples: in one epoch.
    """

    def steps(duration):
        return duration_in_steps(duration, config.batch_size, num_examples)

    schedule, peak, warmup = config.schedule, config.schedule.learning_rate, steps(config.schedule.warmup)
    if schedule.name == "staircase":
        every = max(1, steps(schedule.decay_every))
        main = optax.exponential_decay(peak, every, schedule.decay_rate, staircase=True)
    elif schedule.name == "cosine":
        main = optax.cosine_decay_schedule(peak, max(1, steps(config.duration) - warmup))
    else:
        main = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup]) if warmup else main


def make_optimizer(optimizer: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns SGD with momentum, or RMSprop with momentum, with coupled L2 weight decay.

    Coupled: `weight_decay` times the parameter is added to its gradient, before momentum, so it is the gradient of
    weight_decay / 2 times the squared norm, as in TF-Slim. RMSprop is TensorFlow's: epsilon inside the root, the
    mean square starts at one, and the learning rate is applied before the momentum.

    Frozen parameters have no update, no decay and no state, and do not count when the norm is clipped.
    """
    steps = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm else []
    if optimizer.weight_decay:
        steps.append(optax.add_decayed_weights(optimizer.weight_decay, by_name(optimizer.decayed)))
    if optimizer.name == "sgd":
        steps.append(optax.sgd(schedule, optimizer.momentum, nesterov=optimizer.nesterov))
    else:
        steps.append(
            optax.rmsprop(
                schedule,
                decay=optimizer.rmsprop_decay,
                eps=optimizer.rmsprop_epsilon,
                eps_in_sqrt=True,
                initial_scale=1.0,
                momentum=optimizer.momentum,
                nesterov=optimizer.nesterov,
            )
        )
    if optimizer.multipliers:
        steps.append(multiply_rates(optimizer.multipliers))
    return only_trained(optax.chain(*steps), optimizer.frozen) if optimizer.frozen else optax.chain(*steps)


def by_name(pattern: str) -> Callable:
    """Returns a function from a parameter tree to a mask: True where the pattern is found in a leaf's name.

    Names join the path with slashes: `block2_sepconv1/spatial/kernel`.
    """

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: re.search(pattern, jax.tree_util.keystr(path, simple=True, separator="/")) is not None,
            params,
        )

    return mask
