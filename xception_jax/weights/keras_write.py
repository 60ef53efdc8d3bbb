"""Writes a `.weights.h5` that `keras.applications.Xception` and `InceptionV3` load, without using Keras."""

from __future__ import annotations

import collections
import io
import os
import sys

import h5py
import numpy as np
from flax.traverse_util import flatten_dict

from xception_jax.errors import ConfigError
from xception_jax.weights import tree
from xception_jax.weights.keras_layers import targets
from xception_jax.weights.network import Network, model_to_dict
from xception_jax.weights.own import write

# Keras 3 names the layers in a file by class and position.
_GROUPS = {"conv": "conv2d", "separable": "separable_conv2d", "norm": "batch_normalization", "dense": "dense"}
# Fixed in Keras' networks. Other values change the function but not the shapes.
_REQUIRED = {
    "padding": "same",
    "order": "depthwise_first",
    "intermediate_activation": "none",
    "batch_norm.epsilon": 1e-3,
}


def save_keras(path: str | os.PathLike, network: Network) -> None:
    """Writes the weights as Keras 3 does, bit by bit.

    `keras.applications.Xception(weights=None, classes=...).load_weights(path)` reads them, with `include_top=False` if
    the network has no head. That network has no hidden fully connected layers. If ours has, a note says which Keras
    model loads the file.

    Raises:
      ConfigError: Keras' network computes another function, whatever its weights.
      BadDataError: the variables do not fit `network.model`.
      StorageError: the file cannot be written.
    """
    fields = flatten_dict(model_to_dict(network.model), sep=".")
    for name, value in _REQUIRED.items():
        if fields.get(name, value) != value:
            what = f"Keras' network has {name} {value!r}, this one {fields[name]!r}"
            raise ConfigError(what, f"config.model.{name}", "save it as .safetensors")
    leaves = {name: np.asarray(leaf) for name, leaf in tree.flatten(network.variables).items()}
    tree.check(leaves, network.model, os.fspath(path))
    present = [target for target in targets(network.model) if leaves.keys() >= set(target.leaves)]
    if left_over := sorted(leaves.keys() - {leaf for target in present for leaf in target.leaves}):
        what = f"Keras' network has no place for {tree.listed(left_over)}"
        raise ConfigError(what, "config.model", "save it as .safetensors")
    content, counts = io.BytesIO(), collections.Counter[str]()
    with h5py.File(content, "w") as file:
        for target in present:  # the head may be missing
            number = f"_{counts[target.kind]}" if counts[target.kind] else ""
            counts[target.kind] += 1
            for i, (leaf, shape) in enumerate(zip(target.leaves, target.shapes, strict=True)):
                file[f"layers/{_GROUPS[target.kind]}{number}/vars/{i}"] = leaves[leaf].reshape(shape)
    write(path, content.getvalue())
    if counts["dense"] > 1:
        text = (
            "keras.applications has no hidden layers: put average pooling and these Dense layers on a base without top"
        )
        print(f"note: {text}; it then loads the file (docs/weights.md)", file=sys.stderr)
