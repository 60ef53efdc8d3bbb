"""Loads image files in batches for a network. The next batch is decoded while the caller works on the last one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from xception_jax.data import images
from xception_jax.names import one_line

THREADS = 8
THUMBNAIL = 320  # longer side of a thumbnail, in pixels


class LoadedBatch(NamedTuple):
    """One batch of images. Lists have an entry per path, `pixels` may have more rows.

    Attributes:
      paths: the image files.
      pixels: input of the network, zeros for unreadable images and for the padding of the last batch.
      errors: why an image cannot be read, or ''.
      thumbnails: the images, uint8 RGB; None if they are unreadable or were not requested.
    """

    paths: Sequence[Path]
    pixels: Float32[np.ndarray, "b s s 3"]
    errors: list[str]
    thumbnails: list[np.ndarray | None]


def load_batches(
    paths: Sequence[Path],
    view: images.Preprocessing,
    batch_size: int,
    *,
    thumbnails: int = 0,
    longest: int = THUMBNAIL,
    limits: images.Limits | None = None,
) -> Iterator[LoadedBatch]:
    """Loads images in batches of the same size, so that only one program is compiled.

    Args:
      paths: paths of the images.
      view: the preprocessing of the network.
      batch_size: images per batch; the batch is smaller if there are fewer images in all.
      thumbnails: number of images, from the first, that come with a thumbnail.
      longest: longer side of a thumbnail, in pixels.
      limits: for decoding; by default, those of `config.data`.
    """
    size = min(batch_size, len(paths))
    load = functools.partial(_load, view=view, longest=longest, limits=limits)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="decode") as pool:

        def start_loading(start: int) -> Iterator[tuple[np.ndarray, str, np.ndarray | None]]:
            chosen = range(start, min(start + size, len(paths)))
            return pool.map(load, [paths[i] for i in chosen], [i < thumbnails for i in chosen])

        following = start_loading(0)
        for start in range(0, len(paths), size):
            loaded = list(following)
            following = start_loading(start + size)
            pixels = np.zeros((size, view.size, view.size, 3), np.float32)
            for row, (image, _, _) in enumerate(loaded):
                pixels[row] = image
            _, errors, shown = zip(*loaded, strict=True)
            yield LoadedBatch(paths[start : start + size], pixels, list(errors), list(shown))


def _load(
    path: Path, thumbnail: bool, *, view: images.Preprocessing, longest: int, limits: images.Limits | None
) -> tuple[np.ndarray, str, np.ndarray | None]:
    """Returns the preprocessed image, an error and an optional thumbnail. An unreadable image is all zeros."""
    pixels = np.zeros((view.size, view.size, 3), np.float32)
    try:
        with images.decoded(images.read(path), limits) as image:  # until the view is made, which needs memory, too
            view(image, pixels)
            return pixels, "", images.thumbnail(image, longest) if thumbnail else None
    except images.DamagedImageError as error:
        return pixels, f"it cannot be decoded: {one_line(error)}", None
    except OSError as error:
        return pixels, f"it cannot be read: {error.strerror}", None
