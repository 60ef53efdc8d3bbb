"""The state that a run starts from: initialised, and where `config.init.weights` names a file, with its weights."""

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

# What of `config.model` may differ from the network in the file: it changes the head, or training alone.
_MAY_DIFFER = ("num_classes", "fc_layers", "fc_width", "dropout_rate", "aux_head", "dtype")
_HEAD, _CLASSIFIERS = ("head/", "aux_"), ("head/predictions/", "aux_predictions/")


def first_state(experiment: Experiment, report: Callable[[str], None]) -> TrainState:
    """Makes the state of step 0, sharded.

    The classifier keeps its initial values if the file has none, or one of other classes; so do fully connected
    layers and an auxiliary head that the file does not have.

    Args:
      experiment: its `config.init.weights` is a file that `load_network` reads, or empty.
      report: takes one line that says what was read.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: it is damaged, or of a network with other parameters.
      ConfigError: it is of another network than `config.model`, or expects other images than training makes.
    """
    path = experiment.config.init.weights
    if not path:
        return experiment.init()
    network = load_network(path, size=experiment.config.data.image_size)
    _check_model(experiment.config.model, network)
    variables = flatten_dict(_for_our_images(network), sep="/")
    start, new = _choose(experiment, network, variables)
    state = experiment.init()
    params, batch_stats = (_placed(getattr(state, kind), start, kind) for kind in ("params", "batch_stats"))
    # Arrays of their own for the average: the step donates both.
    ema = None if state.ema is None else {kind: _placed(state.ema[kind], start, kind) for kind in state.ema}
    named = f"; new: {', '.join(new)}" if new else ""
    report(f"starts from {path} (SHA-256 {network.sha256}), {len(start)} arrays{named}")
    return state.replace(params=params, batch_stats=batch_stats, ema=ema)


def _check_model(model: ModelConfig, network: Network) -> None:
    """Raises ConfigError if the network in the file computes something else with the same parameters."""
    ours, theirs = (_flat(model), _flat(network.model))
    differing = {name: theirs[name] for name in theirs if ours.get(name) != theirs[name]}
    if differing:
        options = " ".join(f"--config.model.{name}={value}" for name, value in differing.items())
        raise ConfigError(
            f"config.model is another network than that of the file: {', '.join(sorted(differing))} differ",
            network.source,
            f"take those of the file: {options}",
        )


def _flat(model: ModelConfig) -> dict[str, Any]:
    fields = {name: value for name, value in to_dict(model).items() if name not in (*_MAY_DIFFER, "batch_norm")}
    return fields | {"batch_norm.epsilon": model.batch_norm.epsilon, "batch_norm.scale": model.batch_norm.scale}


def _choose(
    experiment: Experiment, network: Network, variables: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns what of the file is taken, by name, and the names of what stays as it is initialised."""
    state, classes = experiment.abstract, experiment.data.class_names
    wanted = tree_signature({"params": state.params, "batch_stats": state.batch_stats})
    stored = tree_signature(variables)
    other_classes = network.classes is not None and network.classes != classes

    def is_head(name: str, parts: tuple[str, ...] = _HEAD) -> bool:
        return name.partition("/")[2].startswith(parts)

    def shape(signatures: dict[str, str], name: str) -> str:
        return signatures.get(name, "").partition("[")[2]  # weights are read in any precision

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
            f"the weights are of another network: {differences} of {len(wanted)} arrays differ",
            f"{network.source}\n{table}",
            "give config.model as it was when they were trained",
        )
    return {name: variables[name] for name in wanted if name not in new}, new


def _placed(tree: dict, start: dict[str, np.ndarray], kind: str) -> dict:
    """Returns a tree of arrays with those of `start` in their places, sharded as they were."""
    flat = flatten_dict(tree, sep="/")
    for name, leaf in flat.items():
        if f"{kind}/{name}" in start:
            value = start[f"{kind}/{name}"].astype(leaf.dtype)
            flat[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, value.__getitem__)
    return unflatten_dict(flat, sep="/")


def _for_our_images(network: Network) -> dict[str, Any]:
    """Returns the variables for images in [-1, 1], which is what training makes, whatever the file was trained on.

    The first convolution takes over the scaling; its constant goes to the mean of the BatchNorm behind it, or to its
    bias. That is exact because the first convolution does not pad; where it does, the file is refused.
    """
    preprocessing, ours = network.preprocessing, Preprocessing()
    if (preprocessing.mean, preprocessing.std) == (ours.mean, ours.std):
        return network.variables
    if isinstance(network.model, XceptionConfig) and network.model.stem == "small":
        what = f"the weights expect images with mean {preprocessing.mean} and standard deviation {preprocessing.std}"
        raise ConfigError(what, network.source, "with model.stem='small' only images in [-1, 1] can be trained on")
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
