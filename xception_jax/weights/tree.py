"""Names, shapes and checks of a network's variables, which are addressed as a flat dict."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_jax.config import ModelConfig, resolve_model, to_dict
from xception_jax.config import flatten as flatten_fields
from xception_jax.errors import BadDataError, ConfigError
from xception_jax.models import create_model
from xception_jax.names import in_shell
from xception_jax.weights.limits import COPY_AGAIN

HEAD = "params/head/"
_AUX_KERNEL = "params/aux_1/kernel"
HIDDEN = ("fc_layers", "fc_width")  # fields of the hidden layers of a head
# Fields that change neither shapes below the classifier nor what a network computes in evaluation.
_FREE = (
    "num_classes",
    "dropout_rate",
    "dtype",
    "initialization",
    "batch_norm.momentum",
    "batch_norm.statistics",
)
_MAX_LISTED = 5  # names in one message
# Hidden layers of a classifier that a file may describe; the paper has two.
MAX_HIDDEN = 16
# Elements of the pointwise kernels in a block of Xception's middle flow.
_MIDDLE_BLOCK = 3 * 728 * 728
_FEW_BLOCKS = 8  # are built whatever the file holds, so that the message can tell what is missing


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
    return dict(_shapes(model.replace(dtype="float32")))


@functools.lru_cache(maxsize=8)
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    module = create_model(model)
    template = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 299, 299, 3))))
    return {name: leaf.shape for name, leaf in flatten(template).items()}


def check(
    leaves: Mapping[str, np.ndarray], model: ModelConfig, where: str, names: Mapping[str, str] | None = None
) -> None:
    """Checks that all variables are present, have the right shapes and hold finite floating-point numbers.

    The classifier may be missing as a whole. `names` are the names of variables in the file, if it has others.

    Raises:
      BadDataError: the message names up to five of the variables concerned.
    """
    has_head = any(name.startswith(HEAD) for name in leaves)
    expected = {name: shape for name, shape in shapes(model).items() if has_head or not name.startswith(HEAD)}
    if (aux := leaves.get(_AUX_KERNEL)) is not None and _AUX_KERNEL in expected:  # as large as the map
        expected[_AUX_KERNEL] = (*aux.shape[:2], *expected[_AUX_KERNEL][2:])
    misshapen = [name for name, leaf in leaves.items() if name in expected and leaf.shape != expected[name]]
    problems = {
        "missing": [(names or {}).get(name, name) for name in expected if name not in leaves],
        "left over": [name for name in leaves if name not in expected],
        "wrong shape": [f"{name} has {leaves[name].shape}, not {expected[name]}" for name in misshapen],
    }
    if any(problems.values()):
        what = "; ".join(f"{problem}: {listed(sorted(found))}" for problem, found in problems.items() if found)
        fix = "give the model that the weights belong to"
        if not model.batch_norm.scale:
            fix += "; a gamma in BatchNorm needs config.model.batch_norm.scale=True"
        raise BadDataError(f"the weights do not fit {describe(model)}: {what}", where, fix)
    for name, leaf in leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise BadDataError(f"{name} holds {leaf.dtype}, not floating-point numbers", where, COPY_AGAIN)
        if not np.isfinite(leaf).all() or (name.endswith("/var") and leaf.min() < 0):
            raise BadDataError(f"{name} holds non-finite values or a negative variance", where, COPY_AGAIN)


def middle_blocks(counted: int, elements: int) -> int:
    """Returns a number of blocks that were counted by name, but no more than fit into the elements of all tensors.

    A network that is inferred from a file has the width of the paper. It is built to compare its shapes with the file,
    and thousands of blocks with a few numbers each would take minutes.
    """
    return max(0, min(counted, max(_FEW_BLOCKS, elements // _MIDDLE_BLOCK)))


def resolve_inferred(model: Mapping[str, Any], where: str) -> ModelConfig:
    """Resolves a `config.model` that was inferred from a file; what is out of range is the fault of the file."""
    try:
        return resolve_model(model)
    except ConfigError as error:
        raise BadDataError(f"the file holds no network: {error.what}", where, COPY_AGAIN) from None


def require_network(model: ModelConfig, theirs: Mapping[str, ModelConfig], library: str, free: Collection[str]) -> None:
    """Checks that a library has the network: with the same shapes, and computing the same function.

    Args:
      model: `config.model` of the network.
      theirs: the library's networks by our name.
      library: its name, for messages.
      free: fields that may differ, besides those without effect on shapes and evaluation.

    Raises:
      ConfigError: it does not; `where` is the field that differs.
    """
    fix = "save it in our own layout, OUT.safetensors, which holds every network"
    if model.name not in theirs:
        raise ConfigError(f"{library} has no {model.name}", "config.model.name", fix)
    expected = flatten_fields(to_dict(theirs[model.name]))
    for field, value in flatten_fields(to_dict(model)).items():
        if value != expected[field] and field not in (*_FREE, *free):
            what = f"the network of {library} has {field}={expected[field]!r}, this one {value!r}"
            raise ConfigError(what, f"config.model.{field}", f"{fix}, or train with {field}={expected[field]!r}")


def select_head(
    demanded: bool | None, problem: str, above: Sequence[str], classifier: Sequence[str], where: str
) -> tuple[bool, list[str]]:
    """Decides whether a classifier is read, and returns a note about what is left out.

    `demanded` is the `head` of `load_network`; `problem` is why the classifier does not fit, or ''. `above` names
    everything above the network, and `classifier` the part of it that is the classifier.
    """
    if demanded and problem:
        fix = "leave the head out: --no-head (head=False), or set config.model.num_classes (fc_layers, fc_width) to fit"
        raise BadDataError(f"the head does not fit: {problem}", where, fix)
    is_read = demanded is not False and not problem
    left_out = [name for name in above if not is_read or name not in classifier]
    reason = f" ({problem})" if problem and demanded is None else ""
    return is_read, [f"left out: {listed(left_out)}{reason}"] if left_out else []


def without_head(where: str) -> str:
    """Returns the advice for a file whose layers above the network cannot be read."""
    return f"leave them out: xception-jax convert {in_shell(where)} NEW.safetensors --no-head"


def compare_heads(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """Returns why the classifier in a file is not that of the model, or ''. Layers are described with their shapes."""
    texts = [listed(layers) or "none" for layers in (ours, theirs)]
    return "" if ours == theirs else "the model's classifier is {}; the file has {}".format(*texts)


def listed(names: Sequence[str]) -> str:
    """Joins the first names and counts the others."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def describe(model: ModelConfig) -> str:
    """Returns the name of a model and the fields that differ from their defaults: 'xception, num_classes=10'."""
    fields, default = to_dict(model), to_dict(resolve_model({"name": model.name}))
    changed = [f"{key}={json.dumps(value)}" for key, value in fields.items() if value != default[key]]
    return ", ".join([model.name, *changed])
