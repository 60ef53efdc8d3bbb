"""Any weight file to a network."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from xception_jax.config import ModelConfig
from xception_jax.data.imagenet_classes import class_names
from xception_jax.errors import UsageError
from xception_jax.weights import guard, known, own, timm, tree
from xception_jax.weights.keras import import_keras
from xception_jax.weights.network import Network, Preprocessing


def load_network(
    path: str | os.PathLike, model: ModelConfig | None = None, *, head: bool | None = None, size: int | None = None
) -> Network:
    """Reads a weight file of any kind with all that travels with it. What a user should know goes to standard error.

    `variables['params']` has no 'head' if the file has none, or none that fits.

    Args:
      path: our own safetensors, or a Keras or timm file.
      model: the `config.model` that a Keras or timm file belongs to; by default it is inferred from the tensors.
      head: of a Keras or timm file, as in `load_keras`.
      size: side of the images in pixels; by default what the file says, else 299.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: the file is damaged, refused, of an unknown kind, or does not fit `model`.
      UsageError: `model` is not the one that one of our own files names.
    """
    path = Path(path)
    sha256, md5 = guard.hashes(path)
    form = guard.container_format(path)
    if form == "safetensors":
        tensors, metadata = guard.read_safetensors(path)
        if own.METADATA in metadata:
            network = own.from_tensors(tensors, metadata, str(path), sha256)
            if model is not None and tree.describe(model) != tree.describe(network.model):
                what = f"the file holds {tree.describe(network.model)}, not {tree.describe(model)}"
                raise UsageError(what, str(path), "leave the model out: the file describes itself")
            return network if size is None else _resized(network, size)
        imported = timm.import_timm(tensors, path, model, head)
    else:
        imported = import_keras(path, model, head)
    imported.print_notes()
    if warning := known.doubt(path.name, md5):
        print(f"warning: {warning}", file=sys.stderr)
    classes = imported.classes
    if md5 in known.KERAS_FILES:
        classes = tuple(class_names()) if "head" in imported.variables["params"] else None
        size = size or Preprocessing.size
    network = Network(
        imported.model, imported.variables, imported.preprocessing, classes, str(path), sha256, imported.multi_label
    )
    return _resized(network, _side(imported.image_shape) if size is None else size)


def _resized(network: Network, size: int) -> Network:
    return dataclasses.replace(network, preprocessing=dataclasses.replace(network.preprocessing, size=size))


def _side(shape: tuple[int, int] | None) -> int:
    """Returns the side of our images, which are square, and says on standard error where the file has none."""
    if shape is None:
        fix = f"{Preprocessing.size} is assumed (convert --size)"
        print(f"note: the file does not tell the size of the images: {fix}", file=sys.stderr)
        return Preprocessing.size
    if shape[0] != shape[1]:
        fix = f"ours are square, {max(shape)} is taken (convert --size)"
        print(
            f"note: the network in the file is given images of {shape[0]} x {shape[1]} pixels: {fix}", file=sys.stderr
        )
    return max(shape)
