"""ReaL: other labels for ImageNet's validation set (Beyer et al. 2020, "Are we done with ImageNet?", 2006.07159).

Several people looked at each image again and named every class that it shows; a prediction is right if it is one of
them. real.json is a list of 50,000 lists of labels, in the order of the file names ILSVRC2012_val_00000001.JPEG and on.
An image for which nobody found a class (3,163 of them) is left out.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from xception_jax.data.sources import Source, TfdsSource
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import Predictions

_FILE_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
_FETCH = "get real.json from github.com/google-research/reassessed-imagenet"


def load_real_labels(path: str | os.PathLike[str], num_classes: int) -> list[frozenset[int]]:
    """Reads real.json: for each validation image, by its number - 1, the set of its labels.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: it is something else.
    """
    try:
        lists = json.loads(Path(path).read_text())
        labels = [frozenset(map(int, labels)) for labels in lists]
    except (FileNotFoundError, IsADirectoryError):
        raise InputMissingError("there is no such file of ReaL labels", os.fspath(path), _FETCH) from None
    except (ValueError, TypeError) as error:
        raise BadDataError(f"the file is no list of lists of labels: {error}", os.fspath(path), _FETCH) from None
    for number, of_image in enumerate(labels, 1):
        if not all(0 <= label < num_classes for label in of_image):
            what = f"image {number} has the labels {sorted(of_image)}, the network has {num_classes} classes"
            raise BadDataError(what, os.fspath(path), _FETCH)
    return labels


def image_numbers(source: Source, labels: list[frozenset[int]]) -> list[int]:
    """Returns the number in the file name of every image of a split of imagenet2012, in its order.

    Every record is read for it, but nothing is decoded.

    Raises:
      UsageError: the images are not those of ImageNet's validation set.
      BadDataError: an image has no entry in the labels.
    """
    names = source.file_names() if isinstance(source, TfdsSource) else None
    found = [_FILE_NAME.fullmatch(Path(name).name) for name in names or ()]
    if not found or not all(found):
        example = f": an image is called {names[found.index(None)]!r}" if names else ", it does not name its files"
        raise UsageError(
            f"ReaL labels are for ImageNet's validation set, and this is {source.info.name}{example}",
            f"split {source.info.split}",
            "leave --real out, or pass --dataset imagenet2012 --split validation",
        )
    numbers = [int(match[1]) for match in found if match]
    if max(numbers) > len(labels):
        what = f"there is an image {max(numbers)}, but labels of {len(labels):,} images"
        raise BadDataError(what, "--real", f"{_FETCH}, the whole of it")
    return numbers


def real_accuracy(predictions: Predictions, numbers: list[int], labels: list[frozenset[int]]) -> dict[str, object]:
    """Scores predictions by ReaL labels.

    Args:
      predictions: of a split of ImageNet's validation set.
      numbers: in the file name of each image of the split, by its index.
      labels: of each image of the set, by its number - 1.

    Returns:
      real_count, the images with a label; real_top1 and real_top5, shares of them, with their intervals.
    """
    hits = []
    for index, classes in zip(predictions.index, predictions.classes[:, :5], strict=True):
        if accepted := labels[numbers[int(index)] - 1]:
            hits.append([int(label) in accepted for label in classes])
    count = len(hits)
    result: dict[str, object] = {"real_count": count}
    for k in (1, 5):
        share = float(np.mean([any(row[:k]) for row in hits])) if hits else float("nan")
        result |= {f"real_top{k}": share, f"real_top{k}_interval": wilson_interval(share, count)}
    return result
