"""The saved predictions of an evaluation, and statistics of them."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import zipfile
import zlib

import numpy as np

from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The best classes for each of n examples, the first the most probable.

    Attributes:
      index: [n] int64, the number of the example in its split.
      label: [n] int64; or [n, c] bool where an example has any number of labels.
      classes: [n, k] int32.
      probabilities: [n, k] float32.
      logits: [n, c] float32 of all classes, or None; not saved.
    """

    index: np.ndarray
    label: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray | None = None

    @property
    def multi_label(self) -> bool:
        """Whether an example can have several labels."""
        return self.label.ndim == 2

    @property
    def labelled(self) -> np.ndarray:
        """[n] bool: the example has a label, so that a prediction can be right."""
        return np.asarray(self.label.any(axis=1)) if self.multi_label else np.ones(len(self.label), bool)

    @property
    def right(self) -> np.ndarray:
        """[n] bool: the most probable class is the label, or one of them."""
        best = self.classes[:, 0]
        return self.label[np.arange(len(best)), best] if self.multi_label else self.label == best


_SAVED_FIELDS = ("index", "label", "classes", "probabilities")


def save_predictions(path: str | os.PathLike[str], predictions: Predictions) -> None:
    """Writes predictions as one .npz, in the order of their index: the file does not depend on how they were batched.

    Raises:
      OSError: it could not be written; a file that was there is then untouched.
    """
    order = np.argsort(predictions.index, kind="stable")
    label = predictions.label
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        index=predictions.index[order].astype(np.int64),
        label=label[order].astype(bool if predictions.multi_label else np.int64),
        classes=predictions.classes[order].astype(np.int32),
        probabilities=predictions.probabilities[order].astype(np.float32),
    )
    write_atomically(path, buffer.getvalue())


def load_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Reads what `save_predictions` wrote.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: it is damaged, or something else.
    """
    try:
        # Opened here: NumPy leaves a file that turns out to be damaged open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            predictions = Predictions(**{name: arrays[name] for name in _SAVED_FIELDS})
    except FileNotFoundError:
        raise InputMissingError("there are no predictions", os.fspath(path), "evaluate first") from None
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, EOFError, TypeError) as error:
        what = f"the predictions cannot be read ({error})"
        raise BadDataError(what, os.fspath(path), "evaluate again to replace them") from error
    return predictions


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Returns [c, c] int64 counts: rows are labels, columns the most probable class."""
    cell = predictions.label * num_classes + predictions.classes[:, 0]
    return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_confused(predictions: Predictions, limit: int) -> list[tuple[int, int, int]]:
    """Returns up to `limit` triples of label, wrong class and count, the most frequent first.

    It needs no matrix, which for 20,000 classes would take 3 GB.
    """
    wrong = ~predictions.right
    pairs = np.stack([predictions.label[wrong], predictions.classes[wrong, 0]], axis=1)
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]


def class_average_precision(predictions: Predictions) -> np.ndarray:
    """Returns [c] the average precision of each class over the images, NaN for a class that no image shows.

    Only the k classes saved for an image take part: an image that has a class further down counts as never found.
    So this is a lower bound, and exact if k is the number of classes.
    """
    n, num_classes = predictions.label.shape
    scores = np.full((n, num_classes), -np.inf)
    np.put_along_axis(scores, predictions.classes.astype(np.int64), predictions.probabilities, axis=1)
    precision_sums = np.zeros(num_classes)
    for c in range(num_classes):
        found = np.isfinite(scores[:, c])
        relevant = predictions.label[found, c]
        order = np.lexsort((relevant, -scores[found, c]))  # equal scores: the irrelevant first, as everywhere
        relevant = relevant[order]
        precision_sums[c] = np.sum(relevant * np.cumsum(relevant) / np.arange(1, len(relevant) + 1))
    num_images = predictions.label.sum(axis=0)
    return np.where(num_images > 0, precision_sums / np.maximum(num_images, 1), np.nan)


def expected_calibration_error(predictions: Predictions, bins: int = 15) -> float:
    """Returns the mean gap between the probability of the best class and how often it is right, in [0, 1].

    Equal bins of probability, weighted by their examples (Guo et al. 2017, 1706.04599, equation 3). NaN without
    examples, or if a probability is not finite.
    """
    confidence = predictions.probabilities[:, 0].astype(np.float64)
    if not len(confidence) or not np.isfinite(confidence).all():
        return math.nan
    cell = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(cell, weights=confidence - predictions.right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
