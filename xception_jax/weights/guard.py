"""Reading files of unknown origin: what is not plain numbers in a plain container is refused before it is read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import safetensors

from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.weights.tree import COPY_AGAIN


def hashes(path: Path) -> tuple[str, str]:
    """Returns SHA-256 and MD5 of a file. MD5 is no protection: it names files that are published with it.

    Raises:
      InputMissingError: there is no such file.
    """
    if not path.is_file():
        raise InputMissingError("there is no such weight file", str(path), "give the path of a file")
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            md5.update(block)
    return sha256.hexdigest(), md5.hexdigest()


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and the metadata. The library checks the header: its size, the shapes, that none overlap.

    Raises:
      BadDataError: the file is damaged, or holds something other than floating point numbers and counters.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise BadDataError(f"the safetensors file cannot be read: {reason}", str(path), COPY_AGAIN) from None
