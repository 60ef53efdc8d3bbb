"""Names, shapes and checks of a network's variables, which are addressed as a flat dict."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_jax.errors import BadDataError
from xception_jax.models import create_model
from xception_jax.weights.guard import COPY_AGAIN
from xception_jax.weights.network import ModelConfig, model_from_dict, model_to_dict

HEAD = "params/head/"
_MAX_LISTED = 5  # names in one message


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves by name: 'params/block5_sepconv1/spatial/kernel', 'batch_stats/block5_sepconv1_bn/mean'."""
    return flatten_dict(variables, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Reverses `flatten`."""
    return unflatten_dict(leaves, sep="/")


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every variable by name, without computing anything.

    Raises:
      ConfigError: `model` is not a valid `config.model`.
    """
    # No shape depends on the dtype, and float64 would need JAX_ENABLE_X64.
    return dict(_shapes(json.dumps(model_to_dict(model) | {"dtype": "float32"})))


@functools.lru_cache(maxsize=8)
def _shapes(model_json: str) -> dict[str, tuple[int, ...]]:
    module = create_model(model_from_dict(json.loads(model_json)))
    template = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 299, 299, 3))))
    return {name: leaf.shape for name, leaf in flatten(template).items()}


def check(leaves: Mapping[str, np.ndarray], model: ModelConfig, where: str) -> None:
    """Checks that all variables are present, have the right shapes and hold finite floating-point numbers.

    The classifier may be missing as a whole.

    Raises:
      BadDataError: the message names up to five of the variables concerned.
    """
    has_head = any(name.startswith(HEAD) for name in leaves)
    expected = {name: shape for name, shape in shapes(model).items() if has_head or not name.startswith(HEAD)}
    problem = difference(leaves, expected)
    if not problem:
        misshapen = [name for name, leaf in leaves.items() if leaf.shape != expected[name]]
        problem = listed([f"{name} has the shape {leaves[name].shape}, not {expected[name]}" for name in misshapen])
    if problem:
        raise BadDataError(f"the weights do not fit {describe(model)}: {problem}", where, "give the matching model")
    for name, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise BadDataError(f"{name} holds {leaf.dtype}, not floating-point numbers", where, COPY_AGAIN)
        if not np.isfinite(leaf).all() or (name.endswith("/var") and leaf.min() < 0):
            raise BadDataError(f"{name} holds non-finite values or a negative variance", where, COPY_AGAIN)


def difference(found: Iterable[str], expected: Iterable[str]) -> str:
    """Describes which names are missing and which are left over; '' if there are none."""
    sides = {"missing": set(expected) - set(found), "left over": set(found) - set(expected)}
    return "; ".join(f"{side}: {listed(sorted(names))}" for side, names in sides.items() if names)


def listed(names: Sequence[str]) -> str:
    """Joins the first names and counts the others."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def describe(model: ModelConfig) -> str:
    """Returns the name of a model and the fields that differ from their defaults: 'xception, num_classes=10'."""
    fields, default = model_to_dict(model), model_to_dict(model_from_dict({"name": model.name}))
    changed = [f"{key}={json.dumps(fields[key])}" for key in sorted(fields) if fields[key] != default[key]]
    return ", ".join([model.name, *changed])
