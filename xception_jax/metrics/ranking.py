"""Counts the errors of one class at every threshold: curves, areas, and thresholds for a wanted error.

An example is taken for a positive if its score is at least the threshold. Examples with equal scores are on the same
side of every threshold. The functions are vectorized over columns of weights, so that an estimate (one column of ones)
and its bootstrap (a column for each draw) come from the same code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The examples of one class, sorted by falling score.

    Attributes:
      order: positions of the examples.
      positive: whether each is a positive, in this order.
      ends: number of examples with at least the score of each corner. Corners are the thresholds at which the curves
        turn: the scores of positives, the scores right above them, and the lowest score. The curves are straight in
        between, so that areas over the corners are those over all thresholds. See `rank` for all thresholds.
      thresholds: the score of each corner.
    """

    order: Int[np.ndarray, " n"]
    positive: Bool[np.ndarray, " n"]
    ends: Int[np.ndarray, " t"]
    thresholds: Float[np.ndarray, " t"]

    @property
    def defined(self) -> bool:
        """Whether there are both positives and negatives."""
        return bool(self.positive.any() and not self.positive.all())


@dataclasses.dataclass(frozen=True)
class Counts:
    """Weighted counts at each corner, for `b` columns of weights.

    Attributes:
      true, false: positives and negatives with a score of at least the threshold. The last row has all of them.
    """

    true: Float[np.ndarray, "t b"]
    false: Float[np.ndarray, "t b"]

    def rates(self) -> tuple[Float[np.ndarray, "t+1 b"], Float[np.ndarray, "t+1 b"]]:
        """Returns the true and the false positive rates, from those of a threshold that nothing reaches. May be NaN."""
        true, false = (np.pad(_divide(c, c[-1]), ((1, 0), (0, 0))) for c in (self.true, self.false))
        return true, false


def rank(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"], *, every: bool = False) -> Ranking:
    """Sorts at least one example by falling score.

    Args:
      scores: one for each example.
      positive: whether it is a positive.
      every: whether every score counts as a corner, for choosing a threshold.
    """
    order = np.argsort(-scores, kind="stable")
    falling, positive = scores[order], positive[order]
    ends = np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(falling) - 1) + 1
    steps = np.diff(np.append(0, np.cumsum(positive))[ends], prepend=0) > 0
    corners = steps | np.append(steps[1:], True) | every
    return Ranking(order, positive, ends[corners], falling[ends[corners] - 1])


def count(ranking: Ranking, weights: Float[np.ndarray, "n b"]) -> Counts:
    """Counts positives and negatives at every corner. The weights are in the order of the examples."""
    starts = np.append(0, ranking.ends[:-1])
    every = np.cumsum(np.add.reduceat(np.take(weights, ranking.order, axis=0), starts, axis=0), axis=0)
    only = np.cumsum(np.take(weights, ranking.order[ranking.positive], axis=0), axis=0)
    before = np.append(0, np.cumsum(ranking.positive))[ranking.ends]
    true = np.concatenate([np.zeros_like(weights[:1]), only])[before]
    return Counts(true, every - true)


def roc_area(counts: Counts) -> Float[np.ndarray, " b"]:
    """Returns the area under the ROC curve: a positive scores higher than a negative. NaN without either."""
    true, false = counts.rates()
    return ((true[1:] + true[:-1]) / 2 * np.diff(false, axis=0)).sum(axis=0)


def average_precision(counts: Counts) -> Float[np.ndarray, " b"]:
    """Returns the area under the precision-recall curve as a sum of steps. NaN without positives or negatives."""
    true, false = counts.rates()
    precision = counts.true / np.maximum(counts.true + counts.false, 1e-30)
    return (precision * np.diff(true, axis=0)).sum(axis=0) + 0 * false[-1]


def equal_error_rate(counts: Counts) -> Float[np.ndarray, " b"]:
    """Returns the rate at which false positives and false negatives are equal, on the line between two thresholds."""
    true, false = counts.rates()
    both = true + false
    after, column = np.argmax(both >= 1, axis=0), np.arange(both.shape[1])  # 0 where the rates are NaN
    before = np.maximum(after - 1, 0)
    share = _divide(1 - both[before, column], both[after, column] - both[before, column])
    return false[before, column] + share * (false[after, column] - false[before, column])


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divides; NaN where the divisor is 0."""
    return np.divide(a, b, out=np.full(np.broadcast_shapes(a.shape, b.shape), np.nan, a.dtype), where=b > 0)


def _at_equal_error(true_rate: np.ndarray, false_rate: np.ndarray, at: float) -> int:
    return int(np.argmin(np.abs(false_rate - (1 - true_rate))))


def _at_specificity(true_rate: np.ndarray, false_rate: np.ndarray, at: float) -> int:
    return int(np.searchsorted(false_rate, 1 - at + 1e-9, side="right")) - 1


def _at_sensitivity(true_rate: np.ndarray, false_rate: np.ndarray, at: float) -> int:
    return int(np.searchsorted(true_rate, at - 1e-9, side="left"))


AIMS: dict[str, Callable[[np.ndarray, np.ndarray, float], int]] = {
    "equal_error": _at_equal_error,
    "specificity": _at_specificity,
    "sensitivity": _at_sensitivity,
}
"""Chooses the position of a threshold from the true and the false positive rates (both rise) and the wanted rate."""


def choose_threshold(ranking: Ranking, aim: str, at: float) -> float:
    """Returns a threshold for which the given examples reach an aim; NaN if there are no positives or no negatives.

    Args:
      ranking: examples that are not in the test split, with every score as a corner.
      aim: 'specificity' gives the highest sensitivity with a specificity of at least `at`, 'sensitivity' the highest
        specificity with a sensitivity of at least `at`, and 'equal_error' the smallest difference of the error rates.
      at: the wanted rate.
    """
    if not ranking.defined:
        return float("nan")
    true, false = count(ranking, np.ones((len(ranking.order), 1))).rates()
    position = AIMS[aim](true[:, 0], false[:, 0], at)
    if position:
        return float(ranking.thresholds[position - 1])
    # No example may reach the threshold: none else is specific enough.
    return float(np.nextafter(ranking.thresholds[0], np.inf, dtype=ranking.thresholds.dtype))
