"""Crops of photographs that scikit-image and scikit-learn contain, labelled by photograph.

Natural images in colour, of 28 x 28 pixels, which do not overlap: set `data.image_size` to 28, `data.eval_crop` to 1.
This is not a benchmark: a network tells six photographs apart by their colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from xception_jax.data.prepare.writer import Dataset
from xception_jax.errors import InputMissingError

SIDE = 28

PHOTOGRAPHS = ("astronaut", "chelsea", "china", "coffee", "flower", "rocket")
_OF_SCIKIT_LEARN = ("china", "flower")

SPLITS = {"train": (0.0, 0.8), "dev": (0.8, 0.9), "test": (0.9, 1.0)}
"""Where the centres of the crops of a split are, as shares of the width: no split has pixels of another."""


def photograph_crops() -> Dataset:
    """Builds the crops of all photographs.

    The examples raise `InputMissingError` if scikit-image or scikit-learn is missing.
    """
    return Dataset(
        name="photograph_crops",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=PHOTOGRAPHS),
            }
        ),
        splits={split: _crops(split) for split in SPLITS},
        description="Crops of photographs in scikit-image and scikit-learn, labelled by photograph.",
    )


def _crops(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    low, high = SPLITS[split]
    for label, name in enumerate(PHOTOGRAPHS):
        image = read_photograph(name)
        rows, columns = (side // SIDE for side in image.shape[:2])
        for column in range(columns):
            if low <= (column + 0.5) / columns < high:
                for row in range(rows):
                    crop = image[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE, ::-1]
                    png = cv2.imencode(".png", np.ascontiguousarray(crop))[1].tobytes()  # OpenCV writes blue first
                    yield f"{name}_{row}_{column}", {"image": png, "label": label}


def read_photograph(name: str) -> UInt8[np.ndarray, "h w 3"]:
    """Reads one of `PHOTOGRAPHS`.

    Raises:
      InputMissingError: the package that contains it is not installed.
    """
    try:
        if name in _OF_SCIKIT_LEARN:
            from sklearn.datasets import load_sample_image

            return np.asarray(load_sample_image(f"{name}.jpg"))
        import skimage.data

        return np.asarray(getattr(skimage.data, name)())
    except ImportError as error:
        package = "scikit-learn" if name in _OF_SCIKIT_LEARN else "scikit-image"
        what = f"the photograph {name} is in {package}, which is not installed"
        raise InputMissingError(what, "photograph_crops", "pip install scikit-image scikit-learn") from error
