"""Reads and writes our own weight files: safetensors that describe themselves.

A tensor is named by its path, 'params/block5_sepconv1/spatial/kernel'. One metadata entry holds a JSON object with
`config.model`, the preprocessing, the classes and a SHA-256 of the tensors. It is a single entry because safetensors
writes several in random order, and the same network must give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from xception_jax.config import resolve_model, to_dict
from xception_jax.errors import BadDataError, StorageError, UserError
from xception_jax.files import free_space, write_atomically
from xception_jax.weights import tree
from xception_jax.weights.guard import COPY_AGAIN
from xception_jax.weights.network import Network, Preprocessing, both_names

METADATA = "xception_jax"
_VERSION = 1


def save_network(path: str | os.PathLike, network: Network) -> None:
    """Writes a network with its metadata. The same network gives the same bytes.

    Raises:
      BadDataError: the variables do not fit `network.model`.
      StorageError: the file cannot be written.
    """
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in sorted(tree.flatten(network.variables).items())}
    tree.check(leaves, network.model, os.fspath(path))
    description = {
        "version": _VERSION,
        "model": to_dict(network.model),
        "preprocessing": dataclasses.asdict(network.preprocessing),
        "classes": network.classes,
        "multi_label": network.multi_label,
        "source": network.source,
        "source_sha256": network.sha256,
        "tensors_sha256": _digest(leaves),
    }
    write(path, safetensors.numpy.save(leaves, {METADATA: json.dumps(description, sort_keys=True)}))


def write(path: str | os.PathLike, content: bytes) -> None:
    """Writes a weight file atomically.

    Raises:
      StorageError: the directory does not exist or has no room.
    """
    directory = os.path.dirname(os.path.abspath(path))
    try:
        write_atomically(path, content)
    except OSError as error:
        fix = f"create the directory {directory} first"
        if os.path.isdir(directory):
            fix = f"{len(content):,} bytes are needed, {free_space(directory)}"
        raise StorageError(f"the weights cannot be written: {error}", os.fspath(path), fix) from None


def from_tensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], path: str, sha256: str) -> Network:
    """Returns the network that `save_network` wrote.

    Raises:
      BadDataError: the description or a tensor is damaged, or they do not fit each other.
    """
    try:
        description = json.loads(metadata[METADATA])
        model = resolve_model(description["model"])
        preprocessing = Preprocessing.from_fields(description["preprocessing"])
        classes = None if description["classes"] is None else tuple(map(str, description["classes"]))
        multi_label = bool(description.get("multi_label", False))  # older files lack this key
        digest = description["tensors_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise BadDataError(f"the description of the weights cannot be read: {error}", path, COPY_AGAIN) from None
    network = Network(model, tree.unflatten(tensors), preprocessing, classes, path, sha256, multi_label)
    if network.has_single_logit and classes is not None:  # older files name only the second class
        classes = both_names(classes)
        network = dataclasses.replace(network, classes=classes)
    if classes is not None and len(classes) != network.num_classes:
        what = f"the file names {len(classes)} classes, but its model has {network.num_classes}"
        raise BadDataError(what, path, COPY_AGAIN)
    tree.check(tensors, model, path)
    if _digest(tensors) != digest:
        raise BadDataError("a tensor has changed since the file was written", path, COPY_AGAIN)
    return network


def _digest(leaves: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(leaves):
        digest.update(f"{name} {leaves[name].dtype} {leaves[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(leaves[name]).view(np.uint8).data)
    return digest.hexdigest()
