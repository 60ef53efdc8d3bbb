"""Any weight file to a network."""

from __future__ import annotations

import os
from pathlib import Path

from ml_collections import ConfigDict

from xception_jax.errors import BadDataError
from xception_jax.weights import guard, own
from xception_jax.weights.network import Network


def load_network(path: str | os.PathLike, model: ConfigDict | None = None) -> Network:
    """Reads a weight file of any kind with all that travels with it.

    `variables['params']` has no 'head' if the file has none.

    Args:
      path: our own safetensors, or a Keras or timm file.
      model: the `config.model` that a Keras or timm file belongs to; by default it is inferred from the tensors.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: the file is damaged, of an unknown kind, or does not fit `model`.
    """
    path = Path(path)
    sha256, _ = guard.hashes(path)
    tensors, metadata = guard.read_safetensors(path)
    if own.METADATA in metadata:
        return own.from_tensors(tensors, metadata, str(path), sha256)
    raise BadDataError("the file does not say which network it belongs to", str(path), "convert it first")
