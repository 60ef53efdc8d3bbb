"""Tells files from folders among output paths. Does not import JAX, so that a wrong path is reported at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from xception_jax.errors import InputMissingError, UsageError
from xception_jax.user_files import require_directory, require_outputs


def is_file(path: str) -> bool:
    """Returns whether an output path means a PNG. Everything without a suffix is a folder."""
    return not path.endswith(os.sep) and Path(path).suffix != "" and not Path(path).is_dir()


def check_file(path: str, suffix: str) -> None:
    """Checks that an output file can be written, to fail before the computation.

    Raises:
      UsageError: the file has another suffix.
      UserError: see `require_directory`.
    """
    if Path(path).suffix.lower() != suffix:
        raise UsageError(f"the file is written as {suffix}", path, f"use a name that ends in {suffix}")
    require_directory(path)


def check_output(path: str) -> None:
    """Checks that a PNG or a folder can be written, to fail before the computation.

    Raises:
      UserError: as `check_file`, or the directory of the folder is missing.
    """
    if is_file(path):
        check_file(path, ".png")
    elif not Path(path).absolute().parent.is_dir():
        raise InputMissingError("there is no such directory", path, "create it, or choose another path")
    elif Path(path).exists() and not Path(path).is_dir():
        raise UsageError("there is a file in the place of the folder", path, "choose another path, or one with .png")


def check_apart(path: str, images: Sequence[Path]) -> None:
    """Checks that pictures do not replace the images that they explain, or others beside them.

    Raises:
      UsageError: they would.
    """
    if is_file(path):
        require_outputs([path], images)
    elif Path(path).is_dir():
        held = {os.path.realpath(entry) for entry in Path(path).iterdir()}  # a picture is written where a link leads
        if held & {os.path.realpath(image) for image in images}:
            raise UsageError("the output folder contains the input images", path, "choose another folder")
