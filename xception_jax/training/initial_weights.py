"""Creates the initial state of a run, with the weights of `config.init.weights` if it names a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from xception_jax.config import (
    ExperimentConfig,
    ModelConfig,
    XceptionConfig,
    default_values,
    flatten,
    override,
    to_dict,
)
from xception_jax.data.datasets import find_class_names
from xception_jax.errors import BadDataError, ConfigError
from xception_jax.training.experiment import Experiment
from xception_jax.training.fingerprint import compare_signatures, tree_signature
from xception_jax.training.restore import is_run, open_run, run_config, run_network
from xception_jax.training.run_directory import saved_config
from xception_jax.training.state import TrainState
from xception_jax.weights import Network, Preprocessing, load_network
from xception_jax.weights.load import note_other_size

# Fields of `config.model` that may differ from the network in the file. They affect only the head or only training.
_MAY_DIFFER = ("num_classes", "fc_layers", "fc_width", "dropout_rate", "aux_head", "dtype", "initialization")
# Fields that say how the network is trained. They are never taken from the file.
_OF_TRAINING = ("dropout_rate", "aux_head", "dtype", "initialization", "batch_norm.momentum", "batch_norm.statistics")
_NUM_CLASSES = "model.num_classes"
_HEAD, _CLASSIFIERS = ("head/", "aux_"), ("head/predictions/", "aux_predictions/")


def starts_from_run(config: ExperimentConfig, workdir: str) -> bool:
    """Returns whether the network is that of another run, which all processes have to read at the same time.

    Raises:
      InputMissingError: there is no such run.
      ConfigError: its config is damaged.
    """
    source = _source(config)
    if not source or not is_run(source) or saved_config(workdir) is not None:
        return False
    run_config(source)
    return True


def complete_config(config: ExperimentConfig, workdir: str | Path) -> tuple[ExperimentConfig, Network | None]:
    """Completes `config.model` by what the weights of `config.init.weights` and the dataset determine.

    Fields of `config.model` that are at their defaults take the values of the network that the weights are for, except
    those that only concern training. `num_classes`, if it is at its default, is the number of classes of the dataset; a
    network with a single logit keeps it if the dataset has two. In a work directory with checkpoints, the values are
    those of its config.json, so that a run resumes when the file is gone.

    Args:
      config: the config of the run.
      workdir: its work directory, or the address of one, which may not exist yet.

    Returns:
      The config, and the network if it was read.

    Raises:
      InputMissingError: there is no such file or run.
      BadDataError: the file is damaged.
      ConfigError: a field of `config.model` contradicts the weights.
    """
    if not config.init.weights:
        return config, None
    if (saved := saved_config(workdir)) is not None:
        return _with_model(config, saved.model, saved.model.num_classes), None
    network = _read(config)
    names = find_class_names(config.data)
    num_classes = network.model.num_classes if names is None else len(names)
    if num_classes == 2 and network.model.num_classes == 1 and not config.loss.multi_label:
        num_classes = 1
    config = _with_model(config, network.model, num_classes)
    _check_model(config.model, network)
    return config, network


def _with_model(config: ExperimentConfig, model: ModelConfig, num_classes: int) -> ExperimentConfig:
    """Returns the config with the fields of `model` where its own are at their defaults."""
    given, defaults = flatten(config), default_values(config)
    if config.model.name not in (defaults["model.name"], model.name):
        return config  # another network, whose fields these are not
    theirs = flatten({"model": to_dict(model)}) | {_NUM_CLASSES: num_classes}
    kept = {f"model.{name}" for name in _OF_TRAINING}
    if config.model.fc_layers:  # a new head
        kept |= {"model.fc_layers", "model.fc_width"}
    fields = {
        name: value for name, value in theirs.items() if name not in kept and given.get(name) == defaults.get(name)
    }
    return override(config, fields)


def _source(config: ExperimentConfig) -> str:
    return os.path.expanduser(config.init.weights)  # a shell expands no ~ behind an =


def _read(config: ExperimentConfig) -> Network:
    source = _source(config)
    if is_run(source):
        network = run_network(source, open_run(source))
        note_other_size(network.preprocessing.size, config.data.image_size)
        return network
    return load_network(source, size=config.data.image_size)


def first_state(experiment: Experiment, report: Callable[[str], None], network: Network | None = None) -> TrainState:
    """Creates the state of step 0, sharded.

    The classifier keeps its initial values if the file has no classifier or one for different classes. Fully connected
    layers and an auxiliary head keep theirs if they are not in the file.

    Args:
      experiment: its `config.init.weights` is what `load_network` can read, the work directory of a run, or empty.
      report: called with one line that describes what was read.
      network: what `complete_config` has read; by default, the weights are read here.

    Raises:
      InputMissingError: there is no such file.
      StorageError: the weights cannot be downloaded.
      BadDataError: the file is damaged, or its network has different parameters.
      ConfigError: the network in the file is not that of `config.model`, or expects images that training cannot
        provide.
    """
    if not experiment.config.init.weights:
        return experiment.init()
    network = network or _read(experiment.config)
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
            network.source,
            "set config.model to the values that they were trained with",
            table,
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
    if isinstance(network.model, XceptionConfig) and network.model.stem != "imagenet":
        what = f"the weights expect images with mean {preprocessing.mean} and standard deviation {preprocessing.std}"
        raise ConfigError(
            what, network.source, f"use weights for images in [-1, 1], which model.stem={network.model.stem!r} requires"
        )
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
