"""Compares the predictions of two networks on the same images, and tests whether the difference is significant.

The comparison is paired: only images that exactly one of the networks classifies correctly are informative. Therefore a
difference may be significant although the intervals of the two accuracies overlap. If the dataset has groups, such as
patients, whole groups are resampled, because their images are not independent.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest, permutation_test

from xception_jax.errors import BadDataError
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import Predictions, load_predictions
from xception_jax.metrics.resampling import bootstrap_weights
from xception_jax.names import printable_path

RESAMPLES = 10_000
SEED = 0
_BATCH = 10_000_000  # values at a time


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Compares two predictions, A and B, of the same images.

    Attributes:
      count: number of images with a label.
      accuracy_a, accuracy_b: shares of these images whose most probable class is the label, or one of the labels.
      groups: number of groups of these images, or None if the predictions have none.
      interval_a, interval_b: 95 % intervals of the accuracies: Wilson's, or with groups a bootstrap over the groups.
      only_a, only_b: numbers of images that only A or only B classifies correctly.
      difference: accuracy of B minus accuracy of A.
      interval: 95 % interval of the difference, from a paired bootstrap over the images, or over the groups.
      p_value: two-sided p-value of McNemar's exact test; with groups, of a permutation test that exchanges A
        and B in whole groups.
    """

    count: int
    accuracy_a: float
    accuracy_b: float
    groups: int | None
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
    count, groups = len(right_a), a.group if b.group is None else b.group
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
    accuracy_a, accuracy_b = right_a.mean().item(), right_b.mean().item()
    if groups is None:
        # Each image contributes -1, 0 or 1, so resampling the images means drawing from a multinomial distribution.
        shares = np.array([only_a, only_b, count - only_a - only_b]) / count
        drawn = np.random.default_rng(SEED).multinomial(count, shares, RESAMPLES)
        number, interval = None, _interval((drawn[:, 1] - drawn[:, 0]) / count)
        interval_a, interval_b = wilson_interval(accuracy_a, count), wilson_interval(accuracy_b, count)
        uneven = only_a + only_b
        p_value = float(binomtest(only_a, uneven).pvalue) if uneven else 1.0
    else:
        _, of_image = np.unique(groups[labelled], return_inverse=True)
        # [g, 3]: images, right by A, right by B.
        sums = np.stack([np.bincount(of_image, weights) for weights in (np.ones(count), right_a, right_b)], axis=1)
        number = len(sums)
        drawn_a, drawn_b = _resampled_shares(sums)
        interval_a, interval_b, interval = _interval(drawn_a), _interval(drawn_b), _interval(drawn_b - drawn_a)
        p_value = _exchange_test(sums[:, 2] - sums[:, 1])
    return Comparison(
        count=count,
        accuracy_a=accuracy_a,
        accuracy_b=accuracy_b,
        groups=number,
        interval_a=interval_a,
        interval_b=interval_b,
        only_a=only_a,
        only_b=only_b,
        difference=(only_b - only_a) / count,
        interval=interval,
        p_value=p_value,
    )


def _interval(draws: Float[np.ndarray, " r"]) -> tuple[float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _resampled_shares(sums: Float[np.ndarray, "g 3"]) -> tuple[Float[np.ndarray, " r"], Float[np.ndarray, " r"]]:
    """Returns both accuracies in samples of whole groups, given the images and the correct ones of each group."""
    drawn = np.concatenate([weights.T @ sums for weights in bootstrap_weights(np.arange(len(sums)), RESAMPLES)])
    return drawn[:, 1] / drawn[:, 0], drawn[:, 2] / drawn[:, 0]


def _exchange_test(differences: Float[np.ndarray, " g"]) -> float:
    """Returns the p-value of the sum of differences, if the sign of each of them were random."""
    uneven = differences[differences != 0]
    if len(uneven) < 2:  # both signs of a single one are equally extreme
        return 1.0
    pairs = (uneven, np.zeros_like(uneven))
    options = {"permutation_type": "samples", "n_resamples": RESAMPLES, "batch": max(1, _BATCH // len(uneven))}
    rng = np.random.default_rng(SEED)
    found = permutation_test(pairs, lambda x, y, axis: (x - y).sum(axis), rng=rng, vectorized=True, **options)
    return float(found.pvalue)


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
    """Checks that two predictions have the same indices, labels and groups.

    Raises:
      BadDataError: they differ, or no image has a label.
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
    if a.group is not None and b.group is not None and not np.array_equal(a.group, b.group):
        raise BadDataError("the groups of the images differ", where, fix)
    if not a.labelled.any():
        raise BadDataError("no image has a label", where, fix)


def as_text(comparison: Comparison, name_a: str, name_b: str) -> str:
    """Formats a comparison as text."""
    c, name_a, name_b = comparison, printable_path(name_a), printable_path(name_b)
    width = max(len(name_a), len(name_b)) + 2

    def row(letter: str, name: str, share: float, interval: tuple[float, float], only: int) -> str:
        return f"{letter}  {name:<{width}}{share:.4f}  [{interval[0]:.4f}, {interval[1]:.4f}]   {only:,}"

    verdict = "not significant at the 5 % level" if c.p_value >= 0.05 else "significant at the 5 % level"
    test = "permutation test over groups" if c.groups else "McNemar's exact test"
    return "\n".join(
        [
            f"{c.count:,} images" + (f" in {c.groups:,} groups" if c.groups else ""),
            f"   {'':<{width}}top-1   95 % interval      correct only here",
            row("A", name_a, c.accuracy_a, c.interval_a, c.only_a),
            row("B", name_b, c.accuracy_b, c.interval_b, c.only_b),
            f"B - A  {c.difference:+.4f}  [{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]  "
            f"(paired bootstrap{' over groups' if c.groups else ''}, {RESAMPLES:,} resamples)",
            f"{test}: p = {c.p_value:.3g}, {verdict}",
        ]
    )
