"""The files below a folder, as its owner sees them: without hidden ones, and with those that links lead to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from xception_jax.errors import StorageError


def entries(folder: Path) -> list[tuple[Path, bool]]:
    """Returns what a folder holds, each with whether it is (a link to) a folder, in alphabetical order.

    What systems put there by themselves is left out: hidden names ('.DS_Store', '.ipynb_checkpoints', '._photo.jpg')
    and the folder __MACOSX of archives.

    Raises:
      StorageError: the folder cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
        seen = [path for path in paths if not path.name.startswith(".") and path.name != "__MACOSX"]
        return [(path, path.is_dir()) for path in seen]
    except OSError as error:
        raise StorageError(
            f"the folder cannot be read: {error.strerror}", str(folder), "allow reading it, or move it elsewhere"
        ) from None


def files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields everything below a folder that is no folder, in alphabetical order of the whole path.

    Links are followed, but not into a folder that they are in, which would never end.

    Args:
      folder: where to begin.
      above: the folders that it is in, without links.

    Raises:
      StorageError: a folder cannot be read.
    """
    above = (*above, folder.resolve())
    for path, is_folder in entries(folder):
        if not is_folder:
            yield path
        elif path.resolve() not in above:
            yield from files(path, above)
