"""Writes explanations to picture, contact sheet, folder and arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from xception_jax.evaluation.loading import THUMBNAIL
from xception_jax.explain.explainer import Explained
from xception_jax.explain.options import METHODS
from xception_jax.explain.paths import is_file
from xception_jax.explain.pictures import LONGEST, draw_picture, draw_sheet
from xception_jax.names import file_stem
from xception_jax.user_files import write_output, writing
from xception_jax.weights import Network

MAX_ON_SHEET = 200


class Output(Protocol):
    """Collects or writes explanations.

    Attributes:
      thumbnails: number of images that need a thumbnail, from the first.
      longest: longer side of a thumbnail, in pixels.
    """

    thumbnails: int
    longest: int

    def add(self, explained: Explained) -> None:
        """Takes an explanation without an error."""

    def finish(self) -> str:
        """Writes what is not written, and returns a line for the user, or ''."""


class Describer:
    """Puts explanations into words and pictures.

    Args:
      network: the network.
      names: a name for each of its classes.
      method: name of the method.
      block: the block of the network to which the maps belong, or None for the image itself.

    Attributes:
      method: name of the method.
    """

    def __init__(self, network: Network, names: Sequence[str], method: str, block: str | None):
        self.method, self._where = method, f"output of {block}" if block else "pixels"
        self._view, self._names = network.preprocessing, names

    def label(self, explained: Explained) -> str:
        """Returns what a map explains."""
        return self._names[explained.label]

    def picture(self, explained: Explained) -> bytes:
        """Returns a PNG of one image with its map."""
        return draw_picture(explained, self.label(explained), self._view, METHODS[self.method], self._where)

    def sheet(self, explained: Sequence[Explained]) -> bytes:
        """Returns a PNG of several images with their maps."""
        return draw_sheet(explained, [self.label(each) for each in explained], self._view, METHODS[self.method])


class PictureFile:
    """Writes one file: a picture of a single image, or a contact sheet."""

    def __init__(self, path: Path, describer: Describer, total: int):
        self.thumbnails, self.longest = min(total, MAX_ON_SHEET), THUMBNAIL if total > 1 else LONGEST
        self._path, self._describer, self._total = path, describer, total
        self._explained: list[Explained] = []

    def add(self, explained: Explained) -> None:
        """Keeps an explanation if it fits on the sheet."""
        if explained.thumbnail is not None:
            self._explained.append(explained)

    def finish(self) -> str:
        """Writes the file."""
        if not self._explained:
            return ""
        draw = self._describer.sheet(self._explained) if self._total > 1 else self._describer.picture(*self._explained)
        write_output("file", self._path, draw)
        left_out = self._total - self.thumbnails
        return f"{self._path}: " + (f"the first {self.thumbnails} images" if left_out else "written")


class PictureFolder:
    """Writes a picture of each image into a folder."""

    def __init__(self, path: Path, describer: Describer, total: int):
        self.thumbnails, self.longest = total, LONGEST
        self._path, self._describer, self._names = path, describer, set[str]()

    def add(self, explained: Explained) -> None:
        """Writes the picture of an image, as IMAGE_METHOD.png: photographs beside it keep their names."""
        stem = name = file_stem(explained.path.stem)
        number = 1
        while name in self._names:
            number += 1
            name = f"{stem}_{number}"
        self._names.add(name)
        file = f"{name}_{self._describer.method}.png"
        write_output("file", self._path / file, self._describer.picture(explained))

    def finish(self) -> str:
        """Returns how many pictures were written."""
        return f"{self._path}: {len(self._names)} pictures"


def make_output(path: str, describer: Describer, total: int) -> Output:
    """Returns the output for `--out`, and creates a folder.

    Args:
      path: a PNG, or a folder.
      describer: draws the pictures.
      total: number of images.
    """
    kind = PictureFile if is_file(path) else PictureFolder
    if kind is PictureFolder:
        with writing("folder of pictures", path):
            Path(path).mkdir(exist_ok=True)
    return kind(Path(path), describer, total)


def save_maps(path: str, explained: Sequence[Explained], method: str, block: str | None) -> None:
    """Writes the maps to an .npz file: maps [n, h, w], path, class, probability [n], method and block.

    Raises:
      StorageError: the file cannot be written.
    """
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        "maps": np.stack([each.heat for each in explained]),
        "path": np.array([str(each.path) for each in explained]),
        "class": np.array([each.label for each in explained], np.int32),
        "probability": np.array([each.probability for each in explained], np.float32),
        "method": np.array(method),
        "block": np.array(block or ""),
    }
    np.savez_compressed(buffer, **arrays)
    write_output("file", Path(path), buffer.getvalue())
