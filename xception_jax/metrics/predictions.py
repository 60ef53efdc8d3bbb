"""Saves and loads the predictions of an evaluation, and computes statistics of them."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from xception_jax.user_files import read_arrays, reading, write_output

MAX_CLASSES = 100  # up to which all probabilities are kept: 8 MB for 20,000 images and 100 classes


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The k most probable classes of each of n examples, best first.

    Attributes:
      index: [n] int64, number of the example in its split.
      label: [n] int64, or [n, c] bool for multi-label data.
      classes: [n, k] int32.
      probabilities: [n, k] float32.
      logits: [n, c] float32, or None. Not saved to files.
      all_probabilities: [n, c] float32, the probabilities of all classes; None if there are more than `MAX_CLASSES`.
      file_name: [n] str, or None if the dataset does not record them.
      group: [n] str, what the example belongs to, such as a patient or a video; None if the dataset has no groups.
    """

    index: np.ndarray
    label: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    logits: np.ndarray | None = None
    all_probabilities: np.ndarray | None = None
    file_name: np.ndarray | None = None
    group: np.ndarray | None = None

    @property
    def multi_label(self) -> bool:
        """Whether an example can have more than one label."""
        return self.label.ndim == 2

    @property
    def labelled(self) -> np.ndarray:
        """[n] bool, whether the example has a label."""
        return np.asarray(self.label.any(axis=1)) if self.multi_label else np.ones(len(self.label), bool)

    @property
    def right(self) -> np.ndarray:
        """[n] bool, whether the most probable class is the label, or one of the labels."""
        best = self.classes[:, 0]
        hit = self.label[np.arange(len(best)), best] if self.multi_label else self.label == best
        return np.asarray(hit & np.isfinite(self.probabilities[:, 0]))


_TYPES = {
    "index": np.int64,
    "label": np.int64,
    "classes": np.int32,
    "probabilities": np.float32,
    "all_probabilities": np.float32,
    "file_name": np.str_,
    "group": np.str_,
}
_OPTIONAL = ("all_probabilities", "file_name", "group")  # absent in files of earlier releases


def save_predictions(path: str | os.PathLike[str], predictions: Predictions) -> None:
    """Writes predictions to an .npz file, sorted by index, so that the file does not depend on the batches.

    Raises:
      StorageError: the file could not be written. An existing file is then unchanged.
    """
    order = np.argsort(predictions.index, kind="stable")
    types = _TYPES | ({"label": bool} if predictions.multi_label else {})
    columns = {name: getattr(predictions, name) for name in types}
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, **{name: column[order].astype(types[name]) for name, column in columns.items() if column is not None}
    )
    write_output("file of predictions", path, buffer.getvalue())


def load_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Reads a file written by `save_predictions`.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: the file is damaged or has a different format.
    """
    with reading("file of predictions", path, "name a file that `evaluate --predictions` wrote"):
        required = [name for name in _TYPES if name not in _OPTIONAL]
        predictions = Predictions(**read_arrays(path, required, _OPTIONAL))
        _check(predictions)
    return predictions


def _check(predictions: Predictions) -> None:
    """Raises ValueError if arrays from a file do not fit each other."""
    arrays = {name: getattr(predictions, name) for name in _TYPES}
    n, k = predictions.classes.shape
    dimensions = {"classes": (2,), "probabilities": (2,), "all_probabilities": (2,), "label": (1, 2)}
    for name, array in arrays.items():
        if array is None:
            continue
        whole = name in ("index", "classes", "label")
        kinds = "U" if _TYPES[name] is np.str_ else "biu" if whole else "biuf"  # of any size
        if len(array) != n or array.ndim not in dimensions.get(name, (1,)) or array.dtype.kind not in kinds:
            raise ValueError(f"the array {name} is {array.dtype} of shape {array.shape}, for {n:,} images")
    if not n:
        raise ValueError("there are no images")
    if predictions.probabilities.shape != (n, k) or not k:
        raise ValueError(f"there are {k} classes of each image, and {predictions.probabilities.shape} probabilities")
    width = predictions.label.shape[1] if predictions.multi_label else None
    if predictions.classes.size and (predictions.classes.min() < 0 or (width and predictions.classes.max() >= width)):
        raise ValueError("a class is out of range")


def confusion_matrix(predictions: Predictions, num_classes: int) -> np.ndarray:
    """Returns [c, c] int64 counts: rows are labels, columns are predicted classes.

    Images whose probabilities are not finite have no predicted class.
    """
    known = np.isfinite(predictions.probabilities[:, 0])
    cell = predictions.label[known] * num_classes + predictions.classes[known, 0]
    return np.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_confused(predictions: Predictions, limit: int) -> list[tuple[int, int, int]]:
    """Returns up to `limit` triples (label, wrong class, count), most frequent first.

    Does not build the confusion matrix, which would take 3 GB for 20,000 classes.
    """
    wrong = ~predictions.right & np.isfinite(predictions.probabilities[:, 0])
    pairs = np.stack([predictions.label[wrong], predictions.classes[wrong, 0]], axis=1)
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:limit]
    return [(int(pairs[i, 0]), int(pairs[i, 1]), int(counts[i])) for i in order]


def class_average_precision(predictions: Predictions) -> np.ndarray:
    """Returns the average precision [c] of each class over all images, NaN for classes without images.

    This is a lower bound unless k is the number of classes: a label that is not among the k saved classes of an image
    counts as not found.
    """
    # One sort of the saved pairs: a table [n, c] of scores would take 7 GB for Open Images.
    num_classes, k = predictions.label.shape[1], predictions.classes.shape[1]
    saved = np.isfinite(predictions.probabilities).ravel()
    image = np.repeat(np.arange(len(predictions.label)), k)[saved]
    of_class, probability = predictions.classes.ravel()[saved], predictions.probabilities.ravel()[saved]
    relevant = predictions.label[image, of_class]
    order = np.lexsort((relevant, -probability, of_class))  # irrelevant first among equal scores
    of_class, relevant = of_class[order], relevant[order]
    counts = np.bincount(of_class, minlength=num_classes)
    start = (np.cumsum(counts) - counts)[of_class]
    found = np.append(0, np.cumsum(relevant))
    precision = (found[1:] - found[start]) / (np.arange(len(of_class)) - start + 1)
    precision_sums = np.bincount(of_class, weights=relevant * precision, minlength=num_classes)
    num_images = predictions.label.sum(axis=0)
    return np.where(num_images > 0, precision_sums / np.maximum(num_images, 1), np.nan)


def mistakes(predictions: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for each example whose most probable class is wrong, the most confident first.

    Rows have file (None if the dataset does not record it), index, group (only if there are groups), label, predicted,
    probability (both None if the output is not finite), and, if all probabilities were saved and the example has one
    label, label_probability.
    """
    wrong = np.flatnonzero(predictions.labelled & ~predictions.right)
    rows = []
    for i in wrong[np.argsort(-predictions.probabilities[wrong, 0], kind="stable")].tolist():
        is_finite = np.isfinite(predictions.probabilities[i, 0])
        label = np.atleast_1d(np.flatnonzero(predictions.label[i]) if predictions.multi_label else predictions.label[i])
        row = {
            "file": None if predictions.file_name is None else str(predictions.file_name[i]),
            "index": int(predictions.index[i]),
            "label": "; ".join(names[c] for c in label),
            "predicted": names[predictions.classes[i, 0]] if is_finite else None,
            "probability": float(predictions.probabilities[i, 0]) if is_finite else None,
        }
        if predictions.group is not None:
            row["group"] = str(predictions.group[i])
        if predictions.all_probabilities is not None and not predictions.multi_label:
            row["label_probability"] = float(predictions.all_probabilities[i, label[0]]) if is_finite else None
        rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class ConfidenceBin:
    """The examples whose most probable class has a probability in one interval.

    Attributes:
      confidence: mean probability.
      accuracy: share of correct examples.
      count: number of examples.
    """

    confidence: float
    accuracy: float
    count: int


def confidence_bins(predictions: Predictions, bins: int = 15) -> list[ConfidenceBin]:
    """Returns the bins with examples, of equal width; none if a probability is not finite."""
    confidence = predictions.probabilities[:, 0].astype(np.float64)
    if not np.isfinite(confidence).all():
        return []
    cell = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts, sums, hits = (
        np.bincount(cell, weights=weights, minlength=bins) for weights in (None, confidence, predictions.right)
    )
    return [
        ConfidenceBin(float(sums[i] / counts[i]), float(hits[i] / counts[i]), int(counts[i]))
        for i in np.flatnonzero(counts)
    ]


def expected_calibration_error(predictions: Predictions, bins: int = 15) -> float:
    """Returns the expected calibration error in [0, 1] (Guo et al. 2017, arXiv 1706.04599, equation 3).

    It is the mean gap between confidence and accuracy over equal bins of confidence, weighted by their examples.
    Returns NaN if there are no examples or if a probability is not finite.
    """
    found = confidence_bins(predictions, bins)
    total = sum(entry.count for entry in found)
    return sum(entry.count * abs(entry.confidence - entry.accuracy) for entry in found) / total if total else math.nan
