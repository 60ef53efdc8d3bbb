"""Writes a `.weights.h5` that `keras.applications.Xception` and `InceptionV3` load; Keras is not needed for it."""

from __future__ import annotations

import collections
import io
import os
import sys

import h5py
import numpy as np

from xception_jax.errors import ConfigError
from xception_jax.weights import tree
from xception_jax.weights.keras_layers import targets
from xception_jax.weights.network import Network
from xception_jax.weights.own import write

# What Keras 3 calls the layers of a kind in a file: by class, numbered as they come.
_GROUPS = {"conv": "conv2d", "separable": "separable_conv2d", "norm": "batch_normalization", "dense": "dense"}
_MUST_BE = {  # What Keras' networks fix; other values change the function and leave the shapes as they are.
    "padding": "same",
    "order": "depthwise_first",
    "intermediate_activation": "none",
    "batch_norm.epsilon": 1e-3,
}


def save_keras(path: str | os.PathLike, network: Network) -> None:
    """Writes the weights as Keras 3 does, bit by bit.

    `keras.applications.Xception(weights=None, classes=...).load_weights(path)` reads them, with `include_top=False` if
    the network has no head. That network has no hidden fully connected layers: where ours has, a line on standard error
    says what model loads the file, namely Dense layers on its output.

    Raises:
      ConfigError: Keras' network computes something else, whatever its weights.
      BadDataError: the variables do not fit `network.model`.
      StorageError: the file cannot be written.
    """
    model, where = network.model, os.fspath(path)
    for name, value in _MUST_BE.items():
        section, _, field = name.rpartition(".")
        found = getattr(getattr(model, section) if section else model, field, value)
        if found != value:
            what = f"Keras' network has {name} {value!r}, this one {found!r}"
            raise ConfigError(what, f"config.model.{name}", "save it as .safetensors")
    leaves = {name: np.asarray(leaf) for name, leaf in tree.flatten(network.variables).items()}
    tree.check(leaves, model, where)
    content = io.BytesIO()
    written = set()
    with h5py.File(content, "w") as file:
        counts: collections.Counter[str] = collections.Counter()
        for target in targets(model):
            if not all(leaf in leaves for leaf in target.leaves):
                continue  # the head of a network without one
            number = f"_{counts[target.kind]}" if counts[target.kind] else ""
            counts[target.kind] += 1
            for i, (leaf, shape) in enumerate(zip(target.leaves, target.shapes, strict=True)):
                file[f"layers/{_GROUPS[target.kind]}{number}/vars/{i}"] = leaves[leaf].reshape(shape)
                written.add(leaf)
    if left_over := sorted(leaves.keys() - written):
        what = f"Keras' network has no place for {tree.listed(left_over)}"
        raise ConfigError(what, "config.model", "save it as .safetensors")
    write(path, content.getvalue())
    if model.fc_layers and "head" in network.variables["params"]:
        text = (
            "keras.applications has no hidden layers: put average pooling and these Dense layers on a base without top"
        )
        print(f"note: {text}; it then loads the file (docs/weights.md)", file=sys.stderr)
