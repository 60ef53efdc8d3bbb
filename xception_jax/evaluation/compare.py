"""Compares the predictions of two networks on the same images, and tests whether the difference is significant.

The comparison is paired: only images that exactly one of the networks classifies correctly are informative. Therefore a
difference may be significant although the intervals of the two accuracies overlap.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from scipy.stats import binomtest

from xception_jax.errors import BadDataError
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import Predictions, load_predictions
from xception_jax.names import printable_path

RESAMPLES = 10_000
SEED = 0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compares two predictions, A and B, of the same images.

    Attributes:
      count: number of images with a label.
      accuracy_a, accuracy_b: shares of these images whose most probable class is the label, or one of the labels.
      interval_a, interval_b: 95 % Wilson intervals of the accuracies.
      only_a, only_b: numbers of images that only A or only B classifies correctly.
      difference: accuracy of B minus accuracy of A.
      interval: 95 % interval of the difference, from a paired bootstrap over the images.
      p_value: p-value of McNemar's test, exact and two-sided.
    """

    count: int
    accuracy_a: float
    accuracy_b: float
    interval_a: tuple[float, float]
    interval_b: tuple[float, float]
    only_a: int
    only_b: int
    difference: float
    interval: tuple[float, float]
    p_value: float


def compare(a: Predictions, b: Predictions) -> Comparison:
    """Compares two predictions that pass `check_same_images`."""
    labelled = a.labelled
    right_a, right_b = a.right[labelled], b.right[labelled]
    count = len(right_a)
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
    accuracy_a, accuracy_b = right_a.mean().item(), right_b.mean().item()
    # Each image contributes -1, 0 or 1, so resampling the images means drawing from a multinomial distribution.
    shares = np.array([only_a, only_b, count - only_a - only_b]) / count
    drawn = np.random.default_rng(SEED).multinomial(count, shares, RESAMPLES)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / count, (0.025, 0.975))
    uneven = only_a + only_b
    return Comparison(
        count=count,
        accuracy_a=accuracy_a,
        accuracy_b=accuracy_b,
        interval_a=wilson_interval(accuracy_a, count),
        interval_b=wilson_interval(accuracy_b, count),
        only_a=only_a,
        only_b=only_b,
        difference=(only_b - only_a) / count,
        interval=(float(low), float(high)),
        p_value=float(binomtest(only_a, uneven).pvalue) if uneven else 1.0,
    )


def compare_files(path_a: str | os.PathLike[str], path_b: str | os.PathLike[str]) -> Comparison:
    """Compares two files written by `evaluate --predictions`.

    Raises:
      InputMissingError: a file is missing.
      BadDataError: a file is damaged, the images differ, or no image has a label.
    """
    a, b = load_predictions(path_a), load_predictions(path_b)
    check_same_images(a, b, f"{path_a} and {path_b}")
    return compare(a, b)


def check_same_images(a: Predictions, b: Predictions, where: str) -> None:
    """Checks that two predictions have the same indices and labels.

    Raises:
      BadDataError: the indices or labels differ, or no image has a label.
    """
    fix = "evaluate both networks on the same split, with --predictions"
    if len(a.index) != len(b.index):
        raise BadDataError(f"the predictions are of {len(a.index):,} and {len(b.index):,} images", where, fix)
    if not np.array_equal(a.index, b.index):
        first = int(np.argmax(a.index != b.index))
        what = f"the predictions are of different images: {a.index[first]} and {b.index[first]} at position {first}"
        raise BadDataError(what, where, fix)
    if a.label.shape != b.label.shape:
        raise BadDataError(f"the labels have the shapes {a.label.shape} and {b.label.shape}", where, fix)
    differ = np.flatnonzero((a.label != b.label).reshape(len(a.label), -1).any(axis=1))
    if len(differ):
        what = f"the labels of {len(differ):,} of {len(a.label):,} images differ, first at image {a.index[differ[0]]}"
        raise BadDataError(what, where, fix)
    if not a.labelled.any():
        raise BadDataError("no image has a label", where, fix)


def as_text(comparison: Comparison, name_a: str, name_b: str) -> str:
    """Formats a comparison as text."""
    c, name_a, name_b = comparison, printable_path(name_a), printable_path(name_b)
    width = max(len(name_a), len(name_b)) + 2

    def row(letter: str, name: str, share: float, interval: tuple[float, float], only: int) -> str:
        return f"{letter}  {name:<{width}}{share:.4f}  [{interval[0]:.4f}, {interval[1]:.4f}]   {only:,}"

    verdict = "not significant at the 5 % level" if c.p_value >= 0.05 else "significant at the 5 % level"
    return "\n".join(
        [
            f"{c.count:,} images",
            f"   {'':<{width}}top-1   95 % interval      correct only here",
            row("A", name_a, c.accuracy_a, c.interval_a, c.only_a),
            row("B", name_b, c.accuracy_b, c.interval_b, c.only_b),
            f"B - A  {c.difference:+.4f}  [{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]  "
            f"(paired bootstrap, {RESAMPLES:,} resamples)",
            f"McNemar's exact test: p = {c.p_value:.3g}, {verdict}",
        ]
    )
