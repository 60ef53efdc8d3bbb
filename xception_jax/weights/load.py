"""Loads weight files of any kind."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from xception_jax.config import ModelConfig, resolve_model
from xception_jax.data.imagenet_classes import class_names
from xception_jax.data.turn import BLOCK
from xception_jax.errors import BadDataError, UsageError
from xception_jax.names import LINE_LENGTH, printable
from xception_jax.weights import own, sources, tree
from xception_jax.weights.content import SAFETENSORS, Content
from xception_jax.weights.isolation import open_weights
from xception_jax.weights.keras import import_keras
from xception_jax.weights.network import MAX_SIDE, Imported, Network, Preprocessing
from xception_jax.weights.released import KERAS_FILES
from xception_jax.weights.timm import import_timm


def load_network(
    path: str | os.PathLike, model: ModelConfig | None = None, *, head: bool | None = None, size: int | None = None
) -> Network:
    """Loads a weight file of any kind with its metadata. Notes for the user go to standard error.

    Keras layers are identified by order and shape, never by name, and the network may be part of a larger model under
    any name. `variables['params']` has no 'head' if the file has none, or none that fits.

    Args:
      path: our own safetensors, timm's safetensors, or a Keras file: legacy `.h5`, `.weights.h5` or `.keras`; or the
        name or address of a public file, which is downloaded (see `sources.find`).
      model: `config.model` of the network; by default it is inferred from the tensors.
      head: whether to read the classifier of a Keras or timm file. True requires it, and it must fit `num_classes` and
        `fc_layers`; False leaves it out; None reads it if it is there and fits, and reports if it does not.
      size: side of the images in pixels; by default as in the file, else 299.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: the file is damaged, refused, of an unknown kind, or does not fit `model`; the message names what is
        missing or left over.
      UsageError: `model` contradicts the description in one of our own files.
      StorageError: the file cannot be downloaded or read.
    """
    source, model = sources.find(path), None if model is None else resolve_model(model)
    path = source.path
    with open_weights(path) as reader:
        sha256, md5 = reader.hashes()  # while the process that will read the file starts
        content = reader.content()
    if content.format == SAFETENSORS and own.METADATA in content.texts:
        network = own.from_tensors(content.tensors, content.texts, str(path), sha256)
        if model is not None and tree.describe(model) != tree.describe(network.model):
            what = f"the file holds {tree.describe(network.model)}, not {tree.describe(model)}"
            raise UsageError(what, str(path), "leave the model out: the file describes itself")
        note_other_size(network.preprocessing.size, size)
        return resized(network, source.name, size or network.preprocessing.size)
    imported = import_content(content, path, model, head)
    network, notes = dataclasses.replace(imported.network, sha256=sha256), imported.notes
    if source.release is not None or md5 in KERAS_FILES:
        imagenet = tuple(class_names())
        has_them = "head" in network.variables["params"] and network.model.num_classes == len(imagenet)
        network = dataclasses.replace(network, classes=imagenet if has_them else None)
    if md5 in KERAS_FILES:
        size = size or Preprocessing.size
    if path.name in KERAS_FILES.values() and KERAS_FILES.get(md5) != path.name:
        doubt = f"{path.name} is the name of a public file, but this is another one (MD5 {md5})"
        print(f"warning: {printable(doubt, LINE_LENGTH)}", file=sys.stderr)
    height, width = imported.image_shape or (Preprocessing.size, Preprocessing.size)
    if size is None and imported.image_shape is None:
        notes.append(f"the file does not specify an image size; assuming {width} (convert --size)")
    elif size is None and height != width:
        what = f"the network in the file takes images of {height} x {width} pixels"
        notes.append(f"{what}; ours are square, using {max(height, width)} (convert --size)")
    elif imported.image_shape is not None:
        note_other_size(max(height, width), size)
    _print(notes)
    return resized(network, source.name, size or max(height, width))


def note_other_size(stated: int, wanted: int | None) -> None:
    """Prints a note if images are to have another size than the weights state."""
    if wanted not in (None, stated):
        _print([f"the weights are for images of {stated:,} pixels; using {wanted:,}"])


def resized(network: Network, source: str, size: int) -> Network:
    """Returns a network with its source and the size of its images.

    Raises:
      BadDataError: the images are too small for its layers, or larger than those that are read.
    """
    low = network.model.smallest_side
    if not low <= size <= MAX_SIDE:
        what = f"{network.model.name} cannot have images of {size:,} pixels"
        raise BadDataError(what, source, f"give the size of its images, {low} to {MAX_SIDE:,} (convert --size)")
    if network.preprocessing.turn is not None and size % BLOCK:
        what = f"images that are turned have sides that are divisible by {BLOCK}, and {size} is not"
        raise BadDataError(what, source, "give such a size (convert --size)")
    preprocessing = dataclasses.replace(network.preprocessing, size=size)
    return dataclasses.replace(network, source=source, preprocessing=preprocessing)


def load_keras(path: str | os.PathLike, model: ModelConfig, *, head: bool | None = None) -> dict[str, Any]:
    """Loads the variables of Keras' Xception or Inception V3. Arguments and errors are those of `load_network`.

    Returns:
      {'params', 'batch_stats'}, NumPy arrays with the dtypes of the file; `params` has no 'head' if none is read.
    """
    path = sources.find(path).path
    content = _content(path)
    if content.format == SAFETENSORS:
        raise BadDataError("the file is not a Keras file", str(path), "read safetensors with load_timm or load_network")
    return _variables(import_keras(content, str(path), resolve_model(model), head))


def load_timm(path: str | os.PathLike, model: ModelConfig, *, head: bool | None = None) -> dict[str, Any]:
    """Loads the variables of timm's `legacy_xception` or `inception_v3`, as `load_keras` does for Keras.

    timm pads max pools and counts the padding in average pools (`model.padding='symmetric'`). BatchNorm's epsilon is
    1e-5 in `legacy_xception` and 1e-3 in `inception_v3`, whose BatchNorm has a scale. A note reports a `model` with
    another padding or epsilon. The auxiliary classifier is read if `model` has one.

    timm publishes `legacy_xception` only as a pickle, which is not read here. Convert it first (docs/howto/weights.md).
    """
    path = sources.find(path).path
    content = _content(path)
    if content.format != SAFETENSORS:
        raise BadDataError("the file is not a safetensors file", str(path), "read Keras files with load_keras")
    return _variables(import_timm(content.tensors, path, resolve_model(model), head))


def read_content(source: str | os.PathLike) -> Content[np.ndarray]:
    """Returns the tensors and texts of a weight file of any network; a process of its own reads it.

    Args:
      source: as for `load_network`.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: the file is damaged, refused or of an unknown kind.
      StorageError: the file cannot be downloaded or read.
    """
    return _content(sources.find(source).path)


def _content(path: Path) -> Content[np.ndarray]:
    with open_weights(path) as reader:
        return reader.content()


def import_content(content: Content[np.ndarray], path: Path, model: ModelConfig | None, head: bool | None) -> Imported:
    """Reads a network of another library from the content of a file."""
    if content.format == SAFETENSORS:
        return import_timm(content.tensors, path, model, head)
    return import_keras(content, str(path), model, head)


def _variables(imported: Imported) -> dict[str, Any]:
    _print(imported.notes)
    return imported.network.variables


def _print(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {printable(note, LINE_LENGTH)}", file=sys.stderr)
