"""Opens trained networks, from a weight file or from the work directory of a run."""

from __future__ import annotations

import dataclasses

import numpy as np

from xception_jax.errors import BadDataError, UsageError
from xception_jax.training.restore import Run, is_run, open_run, run_network
from xception_jax.weights import Network, load_network, tree
from xception_jax.weights.sources import require_known

__all__ = [
    "Run",
    "is_run",
    "open_network",
    "open_run",
    "require_classifier",
    "run_network",
    "without_classifier",
]


def open_network(source: str, step: int | None = None) -> Network:
    """Opens a network with its weights, preprocessing and class names.

    For a run, the variables are the Polyak average if there is one, the preprocessing is that of `config.data`, and the
    class names are those of the dataset, or None if it is not on this machine.

    Args:
      source: a weight file, the name or address of public weights (`weights.sources`), or the work directory of a run.
      step: the checkpoint of a run to open, by default the newest intact one.

    Raises:
      InputMissingError: there is no such file, run or checkpoint.
      BadDataError: the file or checkpoint is damaged, or does not fit the network.
      UsageError: `step` is set for a weight file.
      StorageError: the weights cannot be downloaded.
    """
    if is_run(source):
        return run_network(source, open_run(source, step))
    if step is not None:
        require_known(source)
        raise UsageError(f"{source} is a weight file, which has no steps", f"step {step}", "leave the step out")
    return load_network(source)


def require_classifier(network: Network) -> None:
    """Raises BadDataError if the weights have no classifier, as is common for transfer learning."""
    if "head" not in network.variables["params"]:
        fix = "use a file with a classifier, or train a classifier on your own dataset"
        raise BadDataError("the weights have no classifier", network.source, fix)


def without_classifier(network: Network) -> Network:
    """Returns a network without a classifier as one that computes its features, and a logit of zero."""
    model = network.model.replace(num_classes=1, fc_layers=0, fc_width=type(network.model)().fc_width)
    zeros = {
        name: np.zeros(shape, np.float32) for name, shape in tree.shapes(model).items() if name.startswith(tree.HEAD)
    }
    variables = tree.unflatten(tree.flatten(network.variables) | zeros)
    return dataclasses.replace(network, model=model, variables=variables, classes=None)
