"""Lists the files in a folder as its owner sees them: follows links and ignores hidden files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from xception_jax.errors import StorageError

_IGNORED = ("__MACOSX", "@eaDir")


def entries(folder: Path) -> list[tuple[Path, bool]]:
    """Returns the entries of a folder in alphabetical order, each with whether it is a folder or a link to one.

    Hidden names ('.DS_Store', '.ipynb_checkpoints', '._photo.jpg'), the folder __MACOSX of archives and the thumbnails
    of network drives (@eaDir) are ignored.

    Raises:
      StorageError: the folder cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
        visible = [path for path in paths if not path.name.startswith(".") and path.name not in _IGNORED]
        return [(path, os.path.isdir(path)) for path in visible]  # `is_dir` raises for a link that cannot be followed
    except OSError as error:
        raise StorageError(
            f"the folder cannot be read: {error.strerror}", str(folder), "grant read permission or use another folder"
        ) from None


def text(path: Path) -> str:
    r"""Returns a path as text with slashes. A byte that is not UTF-8 becomes an escape such as '\xe9'."""
    try:
        return os.fsencode(path.as_posix()).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # no path of a disk
        return path.as_posix().encode(errors="backslashreplace").decode()


def files(folder: Path, *, but: Path | None = None) -> Iterator[Path]:
    """Yields all files below a folder in alphabetical order of their paths.

    Links are followed, but no folder is entered twice: links can lead back to a folder above them, or fan out.

    Args:
      folder: the folder.
      but: a folder that is not entered.

    Raises:
      StorageError: a folder cannot be read.
    """
    entered = {path.resolve() for path in (folder, but) if path is not None}
    left = [iter(entries(folder))]  # of the folder and of those above it: recursion would end after a thousand
    while left:
        for path, is_folder in left[-1]:
            if not is_folder:
                yield path
            elif (resolved := path.resolve()) not in entered:
                entered.add(resolved)
                left.append(iter(entries(path)))
                break
        else:
            left.pop()
