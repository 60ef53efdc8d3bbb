"""Fine-tunes part of a network: freezes parameters and BatchNorm statistics, and sets learning rates by layer.

Parameters are selected by regular expressions, which are searched in their names: the keys of `params` joined by
slashes, such as `block2_sepconv1/spatial/kernel` or `head/predictions/bias`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_jax.config import OptimizerConfig
from xception_jax.errors import ConfigError
from xception_jax.models.layers import BatchNorm


def frozen_names(params: dict, pattern: str) -> set[str]:
    """Returns the names that match the pattern. An empty pattern matches none."""
    return {name for name in flatten_dict(params, sep="/") if pattern and re.search(pattern, name)}


def trained_part(params: dict, pattern: str) -> dict:
    """Returns the parameters without the frozen ones."""
    frozen = frozen_names(params, pattern)
    return unflatten_dict({k: v for k, v in flatten_dict(params, sep="/").items() if k not in frozen}, sep="/")


def with_part(params: dict, part: dict) -> dict:
    """Returns the parameters with those of `part` in the places of theirs."""
    return unflatten_dict(flatten_dict(params, sep="/") | flatten_dict(part, sep="/"), sep="/")


def frozen_batch_norms(params: dict, pattern: str) -> AbstractContextManager:
    """Returns a context in which a BatchNorm layer runs in inference mode if all of its parameters are frozen.

    Such a layer normalizes by its running averages and does not update them.
    """
    frozen = frozen_names(params, pattern)
    trained = {name.rpartition("/")[0] for name in flatten_dict(params, sep="/") if name not in frozen}
    layers = {name.rpartition("/")[0] for name in frozen} - trained

    def rest(next_method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, BatchNorm) and "/".join(layer.path) in layers:
            return next_method(args[0], train=False)
        return next_method(*args, **kwargs)

    return nn.intercept_methods(rest)


def only_trained(inner: optax.GradientTransformation, pattern: str) -> optax.GradientTransformation:
    """Restricts an optimizer to the parameters that are not frozen.

    The others have no optimizer state: `init` leaves them out, and `update` expects the `trained_part` of gradients and
    parameters.
    """
    return optax.GradientTransformation(lambda params: inner.init(trained_part(params, pattern)), inner.update)


def multiply_rates(multipliers: Iterable[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of the first pattern that matches its name, or by 1."""

    def factor(name: str) -> float:
        return next((factor for pattern, factor in multipliers if re.search(pattern, name)), 1.0)

    return optax.stateless(
        lambda updates, params: unflatten_dict(
            {name: factor(name) * update for name, update in flatten_dict(updates, sep="/").items()}, sep="/"
        )
    )


def check_patterns(optimizer: OptimizerConfig, params: dict) -> None:
    """Checks that each pattern of `config.optimizer` has an effect.

    Raises:
      ConfigError: a pattern matches no parameter, only frozen ones, or only those matched by an earlier pattern; or all
        parameters are frozen.
    """
    names = list(flatten_dict(params, sep="/"))
    frozen = frozen_names(params, optimizer.frozen)
    fix = f"use a regular expression that matches part of a name such as {names[0]!r} or {names[-1]!r}"
    if optimizer.frozen and not frozen:
        where = "config.optimizer.frozen"
        raise ConfigError(f"{optimizer.frozen!r} matches none of the {len(names)} parameters", where, fix)
    left = set(names) - frozen
    if not left:
        what = f"{optimizer.frozen!r} matches every parameter: nothing is left to train"
        raise ConfigError(what, "config.optimizer.frozen", "to train only the classifier, set it to '^(?!head/)'")
    by_default = optimizer.decayed == OptimizerConfig.decayed  # which a network without trained kernels may keep
    if optimizer.weight_decay and not by_default and not any(re.search(optimizer.decayed, name) for name in left):
        what = f"{optimizer.decayed!r} matches no parameter that is trained: nothing would decay"
        raise ConfigError(what, "config.optimizer.decayed", f"{fix}, or set config.optimizer.weight_decay=0")
    for pattern, _ in optimizer.multipliers:
        matched = {name for name in left if re.search(pattern, name)}
        if not matched:
            others = " that are trained and not matched by an earlier pattern" if len(left) < len(names) else ""
            what = f"{pattern!r} matches none of the parameters{others}"
            raise ConfigError(what, "config.optimizer.multipliers", fix)
        left -= matched
