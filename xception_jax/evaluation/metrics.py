"""What an evaluation measures: sums on the device that add up, and statistics of the saved predictions.

The functions `*_sums` take one batch and a mask, and return a dict of scalars that add up over batches, devices and
processes (`jax.tree.map(jnp.add, a, b)`); `summarise` divides at the very end. Padding therefore never counts, and
the result depends neither on the batch size nor on how the batch is sharded.

Ties are broken against the model: a class counts as ranked below every other class with the same score. A network
that gives the same logit to all classes is then wrong everywhere, as it should be, instead of right on class 0. An
example with a logit that is not finite is wrong, whatever its other logits say.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import zipfile
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.files import write_atomically

Sums = dict[str, Array]


def _at_least_float32(logits: Float[Array, "b c"]) -> Float[Array, "b c"]:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _masked_sum(values: Shaped[Array, " b"], mask: Shaped[Array, " b"]) -> Shaped[Array, ""]:
    # Not a product with the mask: padding may hold NaN, and 0 * NaN is NaN.
    return jnp.sum(jnp.where(mask, values, 0))


def _count(condition: Shaped[Array, " b"]) -> Int[Array, ""]:
    # Integers: a float32 stops counting at 16.8 million.
    return jnp.sum(condition, dtype=jnp.int32)


def single_label_sums(logits: Float[Array, "b c"], labels: Int[Array, " b"], mask: Shaped[Array, " b"]) -> Sums:
    """Sums over a batch in which each example has one label.

    Args:
      logits: [b, c].
      labels: [b], in [0, c) wherever the mask is set; anything elsewhere.
      mask: [b], bool or 0 and 1; false for padding.

    Returns:
      count, top1, top5: numbers of examples (int32), those whose label is among the 1 or 5 highest logits;
      loss: the sum of their cross-entropies in nats, without label smoothing (NaN or inf if a logit is).
    """
    mask = mask.astype(bool)
    logits = _at_least_float32(logits)
    true_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1, mode="clip")  # [b, 1]
    rank = jnp.sum(logits >= true_logit, axis=-1)  # 1 is the best
    ranked = mask & jnp.isfinite(logits).all(axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - true_logit[:, 0]
    return {
        "count": _count(mask),
        "loss": _masked_sum(loss, mask),
        "top1": _count(ranked & (rank <= 1)),
        "top5": _count(ranked & (rank <= 5)),
    }


def sigmoid_loss(logits: Float[Array, "b c"], labels: Shaped[Array, "b c"]) -> Float[Array, " b"]:
    """Returns the logistic loss of each example in nats, summed over its classes; labels are 0 and 1."""
    logits = _at_least_float32(logits)
    return jnp.sum(jax.nn.softplus(logits) - logits * labels, axis=-1)


def multi_label_sums(
    logits: Float[Array, "b c"], labels: Shaped[Array, "b c"], mask: Shaped[Array, " b"], k: int
) -> Sums:
    """Sums over a batch in which each example has any number of labels (section 4.1: MAP@100 on JFT).

    The average precision of an image is the sum of precision@i over the ranks i <= k that hold one of its labels,
    over a denominator on which publications differ. The paper names none, so both are here.

    Args:
      logits: [b, c].
      labels: [b, c], 1 for the classes that an image shows.
      mask: [b], bool or 0 and 1; false for padding.
      k: the depth of the ranking; more than c is the same as c.

    Returns:
      count, unlabelled: numbers of examples (int32), those among them without any label, which MAP leaves out;
      map_at_k: sum of average precisions over min(k, number of labels): a perfect ranking always has 1;
      map_at_k_all: the same over the number of labels, also where the ranking is too short to hold them all;
      loss: sum of `sigmoid_loss`.
    """
    mask = mask.astype(bool)
    logits, relevant = _at_least_float32(logits), labels.astype(jnp.int32)
    # The second key puts the irrelevant among equal scores first.
    _, ranking = jax.lax.sort((-logits, relevant), dimension=-1, num_keys=2)
    ranking = ranking[:, :k]
    precision = jnp.cumsum(ranking, axis=-1) / jnp.arange(1, ranking.shape[-1] + 1)
    precisions = jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.sum(precision * ranking, axis=-1), 0.0)
    num_labels = jnp.sum(relevant, axis=-1)
    at_least_one = jnp.maximum(num_labels, 1)  # without labels there is nothing to divide: 0 / 1
    return {
        "count": _count(mask),
        "unlabelled": _count(mask & (num_labels == 0)),
        "loss": _masked_sum(sigmoid_loss(logits, relevant), mask),
        "map_at_k": _masked_sum(precisions / jnp.minimum(at_least_one, k), mask),
        "map_at_k_all": _masked_sum(precisions / at_least_one, mask),
    }


def summarise(sums: Mapping[str, Array]) -> dict[str, float]:
    """Turns the sums of a whole evaluation into means.

    Returns:
      loss, top1, top5 and count; or loss, map_at_k, map_at_k_all, count and unlabelled. Shares are in [0, 1]. A mean
      over no example is NaN.
    """
    totals = {name: float(value) for name, value in sums.items()}
    labelled = totals["count"] - totals.get("unlabelled", 0.0)
    examples = {"map_at_k": labelled, "map_at_k_all": labelled}
    means = {}
    for name, total in totals.items():
        if name in ("count", "unlabelled"):
            means[name] = total
        else:
            number = examples.get(name, totals["count"])
            means[name] = total / number if number else math.nan
    return means


def wilson_interval(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Returns the interval of a share of `count` independent trials (Wilson 1927); the default z is that of 95 %."""
    if not count:
        return 0.0, 1.0
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)


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
