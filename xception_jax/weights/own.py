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
import re
import reprlib
from collections.abc import Iterable, Mapping

import numpy as np
import safetensors.numpy

from xception_jax.config import ModelConfig, resolve_model, to_dict
from xception_jax.errors import BadDataError, StorageError, UserError
from xception_jax.files import free_space, write_atomically
from xception_jax.names import one_line
from xception_jax.weights import tree
from xception_jax.weights.limits import COPY_AGAIN
from xception_jax.weights.network import Network, both_names, described_preprocessing
from xception_jax.weights.untrusted_json import parse_object

METADATA = "xception_jax"
_VERSION = 1
_BLOCKS_BESIDE_THE_MIDDLE = 6  # of Xception: four before the middle flow and two after it
_MAX_KERNEL = 21  # the time to build a network grows with the square of the elements of a kernel; the paper has 3
_MAX_REASON = 300  # characters
_MAX_CLASSES = 1 << 24  # where no tensor shows them


def save_network(path: str | os.PathLike, network: Network) -> None:
    """Writes a network with its metadata. The same network gives the same bytes.

    Raises:
      BadDataError: the variables do not fit `network.model`.
      StorageError: the file cannot be written.
    """
    leaves = {name: np.ascontiguousarray(leaf) for name, leaf in sorted(tree.flatten(network.variables).items())}
    tree.check(leaves, network.model, os.fspath(path))
    _require_readable(network, leaves, os.fspath(path))
    description = {
        "version": _VERSION,
        "model": to_dict(network.model),
        "preprocessing": network.preprocessing.to_fields(),
        "classes": network.classes,
        "multi_label": network.multi_label,
        "source": network.source,
        "source_sha256": network.sha256,
        "tensors_sha256": _digest(leaves),
    }
    write(path, safetensors.numpy.save(leaves, {METADATA: json.dumps(description, sort_keys=True)}))


def _require_readable(network: Network, leaves: Mapping[str, np.ndarray], path: str) -> None:
    """Raises BadDataError before a file is written that `from_tensors` would refuse."""
    _require_shown(network.model, leaves, path)
    try:
        described_preprocessing(network.preprocessing.to_fields())
    except ValueError as error:
        what = f"the network has a preprocessing that no weight file may have: {error}"
        raise BadDataError(what, path, "save it with another size or crop") from None


def write(path: str | os.PathLike, content: bytes) -> None:
    """Writes a weight file atomically.

    Raises:
      StorageError: the directory does not exist or has no room.
    """
    directory = os.path.dirname(os.path.abspath(path))
    try:
        write_atomically(os.path.realpath(path), content)
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
    description = parse_object(metadata[METADATA], path)
    if (version := description.get("version", _VERSION)) != _VERSION:
        what = f"the file has version {reprlib.repr(version)} of the format, this release reads version {_VERSION}"
        raise BadDataError(what, path, "update xception_jax")
    try:
        model = resolve_model(description["model"])
        preprocessing = described_preprocessing(description["preprocessing"])
        classes = None if description["classes"] is None else tuple(map(str, description["classes"]))
        multi_label = bool(description.get("multi_label", False))  # older files lack this key
        digest = description["tensors_sha256"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UserError) as error:
        reason = one_line(error.what if isinstance(error, UserError) else error)[:_MAX_REASON]
        raise BadDataError(f"the description of the weights cannot be read: {reason}", path, COPY_AGAIN) from None
    _require_shown(model, tensors, path)
    tree.check(tensors, model, path)
    network = Network(model, tree.unflatten(tensors), preprocessing, classes, path, sha256, multi_label)
    if network.has_single_logit and classes is not None:  # older files name only the second class
        classes = both_names(classes)
        network = dataclasses.replace(network, classes=classes)
    if classes is not None and len(classes) != network.num_classes:
        what = f"the file names {len(classes)} classes, but its model has {network.num_classes}"
        raise BadDataError(what, path, COPY_AGAIN)
    if _digest(tensors) != digest:
        raise BadDataError("a tensor has changed since the file was written", path, COPY_AGAIN)
    return network


def _require_shown(model: ModelConfig, tensors: Mapping[str, np.ndarray], path: str) -> None:
    """Checks that a network is no larger than the tensors beside its description, before it is built.

    Names of the tensors tell how many blocks and hidden layers there are; their sides tell the size of kernels and the
    number of channels and classes. A description without the tensors can be of any size, and takes as long to build.
    """
    sides = [side for tensor in tensors.values() if tensor.size for side in tensor.shape]
    kernels = [max(tensor.shape[:2]) for tensor in tensors.values() if tensor.ndim == 4 and tensor.size]
    most = dict.fromkeys(
        ("segments", "group_width", "depth_multiplier", "stem_width", "head_width", "num_classes", "fc_width"),
        max(sides, default=0),
    )
    most["middle_blocks"] = _count(r"params/(block\d+)_.+", tensors) - _BLOCKS_BESIDE_THE_MIDDLE
    most["kernel_size"] = min(max(kernels, default=0), _MAX_KERNEL)
    most["fc_layers"] = _count(r"params/(head/fc\d+)/.+", tensors)
    if not any(name.startswith(tree.HEAD) for name in tensors):
        most |= {"num_classes": _MAX_CLASSES, "fc_width": _MAX_CLASSES, "fc_layers": tree.MAX_HIDDEN}
    defaults = to_dict(resolve_model({"name": model.name}))
    for field, value in to_dict(model).items():
        if field in most and isinstance(value, int) and value > most[field] and value != defaults[field]:
            what = f"it describes a network with {field}={value}, but its tensors show at most {max(0, most[field])}"
            raise BadDataError(f"the description does not fit the file: {what}", path, COPY_AGAIN)


def _count(pattern: str, names: Iterable[str]) -> int:
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


def _digest(leaves: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(leaves):
        digest.update(f"{name} {leaves[name].dtype} {leaves[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(leaves[name]).view(np.uint8).data)
    return digest.hexdigest()
