"""The variables of a network as a flat dict of names, and the check that they are all there."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_jax.config import ModelConfig, resolve_model, to_dict
from xception_jax.errors import BadDataError
from xception_jax.models import create_model
from xception_jax.weights.guard import COPY_AGAIN

HEAD = "params/head/"
_NAMED = 5  # tensors in an error, of those that are missing or left over


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves by name: 'params/block5_sepconv1/spatial/kernel', 'batch_stats/block5_sepconv1_bn/mean'."""
    return flatten_dict(variables, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Turns what `flatten` returns back into {'params', 'batch_stats'}."""
    return unflatten_dict(leaves, sep="/")


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every variable of the network by its name; nothing is computed.

    Raises:
      ConfigError: `model` is no valid `config.model`.
    """
    # float64 would need JAX_ENABLE_X64, and no shape depends on it.
    return dict(_shapes(model.replace(dtype="float32")))


@functools.lru_cache(maxsize=8)
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    module = create_model(model)
    template = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 299, 299, 3))))
    return {name: leaf.shape for name, leaf in flatten(template).items()}


def check(leaves: Mapping[str, np.ndarray], model: ModelConfig, where: str) -> None:
    """Checks that every variable is there, none is left over, all fit and hold finite numbers.

    The classifier may be missing as a whole.

    Raises:
      BadDataError: the message names up to five of the variables concerned.
    """
    expected = shapes(model)
    if not any(name.startswith(HEAD) for name in leaves):
        expected = {name: shape for name, shape in expected.items() if not name.startswith(HEAD)}
    wrong = {
        "missing": sorted(expected.keys() - leaves.keys()),
        "left over": sorted(leaves.keys() - expected.keys()),
        "of another shape": [
            f"{name} {leaf.shape} where {expected[name]} is needed"
            for name, leaf in leaves.items()
            if name in expected and leaf.shape != expected[name]
        ],
    }
    found = "; ".join(f"{what}: {listed(names)}" for what, names in wrong.items() if names)
    if found:
        raise BadDataError(f"the weights do not fit {describe(model)}: {found}", where, "give the model they belong to")
    for name, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise BadDataError(f"{name} holds {leaf.dtype}, not floating point numbers", where, COPY_AGAIN)
        if not np.isfinite(leaf).all() or (name.endswith("/var") and leaf.min() < 0):
            raise BadDataError(f"{name} holds values that are not numbers, or a negative variance", where, COPY_AGAIN)


def listed(names: list[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def describe(model: ModelConfig) -> str:
    """Returns what differs from the defaults of `config.model`, and the name: 'xception, num_classes=10'."""
    default = to_dict(resolve_model({"name": model.name}))
    differing = (f"{key}={json.dumps(value)}" for key, value in to_dict(model).items() if value != default[key])
    return ", ".join([model.name, *differing])
