"""Creates the initial state of a run, with the weights of `config.init.weights` if it names a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_jax.config import ModelConfig, XceptionConfig, to_dict
from xception_jax.errors import BadDataError, ConfigError
from xception_jax.training.experiment import Experiment
from xception_jax.training.fingerprint import compare_signatures, tree_signature
from xception_jax.training.state import TrainState
from xception_jax.weights import Network, Preprocessing, load_network

# Fields of `config.model` that may differ from the network in the file. They affect only the head or only training.
_MAY_DIFFER = ("num_classes", "fc_layers", "fc_width", "dropout_rate", "aux_head", "dtype")
_HEAD, _CLASSIFIERS = ("head/", "aux_"), ("head/predictions/", "aux_predictions/")


def first_state(experiment: Experiment, report: Callable[[str], None]) -> TrainState:
    """Creates the state of step 0, sharded.

    The classifier keeps its initial values if the file has no classifier or one for different classes. Fully connected
    layers and an auxiliary head keep theirs if they are not in the file.

    Args:
      experiment: its `config.init.weights` is what `load_network` can read, or empty.
      report: called with one line that describes what was read.

    Raises:
      InputMissingError: there is no such file.
      StorageError: the weights cannot be downloaded.
      BadDataError: the file is damaged, or its network has different parameters.
      ConfigError: the network in the file is not that of `config.model`, or expects images that training cannot
        provide.
    """
    path = experiment.config.init.weights
    if not path:
        return experiment.init()
    network = load_network(path, size=experiment.config.data.image_size)
    _check_model(experiment.config.model, network)
    variables = flatten_dict(_for_our_images(network), sep="/")
    start, new = _choose(experiment, network, variables)
    state = experiment.init()
    params, batch_stats = (_with_arrays(getattr(state, kind), start, kind) for kind in ("params", "batch_stats"))
    # The average needs its own arrays, because the step donates both.
    ema = None if state.ema is None else {kind: _with_arrays(state.ema[kind], start, kind) for kind in state.ema}
    named = f"; new: {', '.join(new)}" if new else ""
    report(f"starts from {network.source} (SHA-256 {network.sha256}), {len(start)} arrays{named}")
    return state.replace(params=params, batch_stats=batch_stats, ema=ema)


def _check_model(model: ModelConfig, network: Network) -> None:
    """Raises ConfigError if the network in the file computes a different function of the same parameters."""
    ours, theirs = (_flat(model), _flat(network.model))
    differing = {name: theirs[name] for name in theirs if ours.get(name) != theirs[name]}
    if differing:
        options = " ".join(f"--config.model.{name}={value}" for name, value in differing.items())
        raise ConfigError(
            f"config.model does not match the network in the file: {', '.join(sorted(differing))} differ",
            network.source,
            f"use the values of the file: {options}",
        )


def _flat(model: ModelConfig) -> dict[str, Any]:
    fields = {name: value for name, value in to_dict(model).items() if name not in (*_MAY_DIFFER, "batch_norm")}
    return fields | {"batch_norm.epsilon": model.batch_norm.epsilon, "batch_norm.scale": model.batch_norm.scale}


def _choose(
    experiment: Experiment, network: Network, variables: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the arrays to load from the file, by name, and the names of the arrays that keep their initial values."""
    state, classes = experiment.abstract, experiment.data.class_names
    wanted = tree_signature({"params": state.params, "batch_stats": state.batch_stats})
    stored = tree_signature(variables)
    other_classes = network.classes is not None and network.classes != classes

    def is_head(name: str, parts: tuple[str, ...] = _HEAD) -> bool:
        return name.partition("/")[2].startswith(parts)

    def shape(signatures: dict[str, str], name: str) -> str:
        return signatures.get(name, "").partition("[")[2]  # ignores the dtype: weights of any precision are loaded

    new = [
        name
        for name in wanted
        if is_head(name)
        and (shape(stored, name) != shape(wanted, name) or (other_classes and is_head(name, _CLASSIFIERS)))
    ]
    theirs, ours = ({name: shape(side, name) for name in side if not is_head(name)} for side in (stored, wanted))
    differences, table = compare_signatures(theirs, ours)
    if differences:
        raise BadDataError(
            f"the weights are for a different network: {differences} of {len(wanted)} arrays differ",
            f"{network.source}\n{table}",
            "set config.model to the values that they were trained with",
        )
    return {name: variables[name] for name in wanted if name not in new}, new


def _with_arrays(tree: dict, start: dict[str, np.ndarray], kind: str) -> dict:
    """Replaces arrays of a tree by those of `start`, with the dtypes and shardings of the tree."""
    flat = flatten_dict(tree, sep="/")
    for name, leaf in flat.items():
        if f"{kind}/{name}" in start:
            value = start[f"{kind}/{name}"].astype(leaf.dtype)
            flat[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
    return unflatten_dict(flat, sep="/")


def _for_our_images(network: Network) -> dict[str, Any]:
    """Converts the variables of a network with any preprocessing to images in [-1, 1], which training uses.

    The scale is folded into the first convolution, and the shift into the mean of its BatchNorm or into its bias. This
    is exact only if the first convolution does not pad; otherwise the file is rejected.
    """
    preprocessing, ours = network.preprocessing, Preprocessing()
    if (preprocessing.mean, preprocessing.std) == (ours.mean, ours.std):
        return network.variables
    if isinstance(network.model, XceptionConfig) and network.model.stem == "small":
        what = f"the weights expect images with mean {preprocessing.mean} and standard deviation {preprocessing.std}"
        raise ConfigError(what, network.source, "use weights for images in [-1, 1], which model.stem='small' requires")
    first = "block1_conv1" if network.model.name == "xception" else "stem_0"
    flat = flatten_dict(network.variables, sep="/")
    mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
    kernel = flat[f"params/{first}/kernel"].astype(np.float64)
    constant = np.einsum("hwio,i->o", kernel, (0.5 - mean) / std)
    flat[f"params/{first}/kernel"] = (kernel * (0.5 / std)[:, None]).astype(np.float32)
    name, sign = f"batch_stats/{first}_bn/mean", -1
    if f"params/{first}/bias" in flat:
        name, sign = f"params/{first}/bias", 1
    flat[name] = (flat[name] + sign * constant).astype(np.float32)
    return unflatten_dict(flat, sep="/")
