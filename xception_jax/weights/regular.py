"""Opens files of unknown origin only if they are regular files: a pipe or device could block, or never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from xception_jax.errors import InputMissingError, StorageError


def open_regular(path: Path) -> BinaryIO:
    """Opens a weight file for reading.

    Raises:
      InputMissingError: there is no such file, or it is something else than a regular file.
      StorageError: it cannot be opened.
    """
    fix = "give the path of a .safetensors, .keras or .h5 file"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device can have effects
            raise _not_regular(path, fix)
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: the path has a null byte
        raise InputMissingError("there is no such weight file", str(path), fix) from None
    except OSError as error:
        raise StorageError(f"the weight file cannot be read: {error}", str(path), "check its permissions") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was exchanged in between
        file.close()
        raise _not_regular(path, fix)
    return file


def _not_regular(path: Path, fix: str) -> InputMissingError:
    what = "a directory is not a weight file" if path.is_dir() else "this is not a regular file"
    return InputMissingError(what, str(path), fix)
