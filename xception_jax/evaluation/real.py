"""Scores predictions by the ReaL labels of ImageNet's validation set (Beyer et al. 2020, arXiv 2006.07159).

Several annotators labelled each image again with every class that it shows; a prediction is correct if it is one of
them. real.json is a list of 50,000 lists of labels, in the order of the file names, from ILSVRC2012_val_00000001.JPEG.
The 3,163 images without a label are excluded.
"""

from __future__ import annotations

import operator
import os
from pathlib import Path

import numpy as np

from xception_jax.data.imagenet_classes import VALIDATION_NAME
from xception_jax.data.sources import Source
from xception_jax.errors import BadDataError, UsageError
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import Predictions
from xception_jax.user_files import read_json, reading

_FETCH = "get real.json from github.com/google-research/reassessed-imagenet"


def load_real_labels(path: str | os.PathLike[str], num_classes: int) -> list[frozenset[int]]:
    """Reads real.json, and returns the set of labels of each validation image, indexed by its number - 1.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: the file does not contain such labels.
    """
    with reading("list of lists of ReaL labels", path, _FETCH):
        labels = [frozenset(map(operator.index, labels)) for labels in read_json(path, list)]
    for number, of_image in enumerate(labels, 1):
        if not all(0 <= label < num_classes for label in of_image):
            what = f"image {number} has the labels {sorted(of_image)}, but the network has {num_classes} classes"
            raise BadDataError(what, os.fspath(path), _FETCH)
    return labels


def image_numbers(source: Source, labels: list[frozenset[int]]) -> list[int]:
    """Returns the number in the file name of every image of a split of imagenet2012.

    Reads every record, without decoding the images.

    Raises:
      UsageError: the images are not from ImageNet's validation set.
      BadDataError: the labels have no entry for an image.
    """
    names = source.column("file_name")
    found = [VALIDATION_NAME.fullmatch(Path(name).name) for name in names or ()]
    if not found or not all(found):
        example = f" with a file {names[found.index(None)]!r}" if names else ", which does not record file names"
        raise UsageError(
            f"ReaL labels are for ImageNet's validation set, but this is {source.info.name}{example}",
            f"split {source.info.split}",
            "remove --real, or pass --dataset imagenet2012 --split validation",
        )
    numbers = [int(match[1]) for match in found if match]
    if max(numbers) > len(labels):
        what = f"the split has an image {max(numbers)}, but the file has labels of {len(labels):,} images"
        raise BadDataError(what, "--real", f"{_FETCH}, the complete file")
    return numbers


def real_accuracy(predictions: Predictions, numbers: list[int], labels: list[frozenset[int]]) -> dict[str, object]:
    """Scores predictions by ReaL labels.

    Args:
      predictions: predictions for a split of ImageNet's validation set.
      numbers: result of `image_numbers` for the split.
      labels: result of `load_real_labels`.

    Returns:
      real_count, the number of images with a label; real_top1 and real_top5, accuracies over these images; and the
      intervals of both.
    """
    hits = []
    finite = np.isfinite(predictions.probabilities).all(1)  # an image without finite probabilities counts as wrong
    for index, classes, known in zip(predictions.index, predictions.classes[:, :5], finite, strict=True):
        if accepted := labels[numbers[int(index)] - 1]:
            hits.append([known and int(label) in accepted for label in classes])
    count = len(hits)
    result: dict[str, object] = {"real_count": count}
    for k in (1, 5):
        share = float(np.mean([any(row[:k]) for row in hits])) if hits else float("nan")
        result |= {f"real_top{k}": share, f"real_top{k}_interval": wilson_interval(share, count)}
    return result
