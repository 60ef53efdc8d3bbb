"""Draws bootstrap samples of whole groups, and turns their statistics into percentile intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

DRAWS = 2000
SEED = 0
_CHUNK = 400_000  # weights at a time, which stay in the cache

Statistics = dict[str, np.ndarray]  # [b] or [classes, b] by name


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A statistic with its 95 % interval. The ends are None if there is no bootstrap, or if all draws give one value.

    All draws of a perfect result are perfect, which says nothing about other examples.
    """

    value: float
    low: float | None = None
    high: float | None = None


def bootstrap_weights(groups: Int[np.ndarray, " n"], draws: int = DRAWS) -> Iterator[Float[np.ndarray, "n b"]]:
    """Yields how often each example occurs in each draw, in chunks of draws.

    A draw takes as many groups as there are, with replacement, and all examples of each. Images of one patient or
    video are not independent, and resampling them one by one would give intervals that are too narrow.

    Args:
      groups: number of the group of each example, from 0.
      draws: number of draws.
    """
    rng = np.random.default_rng(SEED)
    number = int(groups.max()) + 1
    size = max(50, _CHUNK // len(groups))
    for start in range(0, draws, size):
        columns = min(size, draws - start)
        chosen = rng.integers(0, number, (columns, number)) * columns + np.arange(columns)[:, None]
        times = np.bincount(chosen.ravel(), minlength=columns * number).reshape(number, columns)
        yield times.astype(np.float32)[groups]


def estimate(
    statistics: Callable[[Float[np.ndarray, "n b"]], Statistics], groups: Int[np.ndarray, " n"], draws: int
) -> dict[str, list[Estimate]]:
    """Computes statistics of all examples, with percentile intervals of 95 %.

    Args:
      statistics: computes them for columns of weights of the examples.
      groups: number of the group of each example, from 0.
      draws: number of bootstrap draws; with 0 there are no intervals.

    Returns:
      For each name one estimate, or one for each class.
    """
    values = {name: np.atleast_2d(v)[:, 0] for name, v in statistics(np.ones((len(groups), 1))).items()}
    found = [statistics(weights) for weights in bootstrap_weights(groups, draws)] if draws else []
    result = {}
    for name, value in values.items():
        drawn = [np.atleast_2d(part[name]) for part in found]
        ends = _interval(np.concatenate(drawn, axis=1)) if drawn else None
        result[name] = [
            Estimate(float(v))
            if ends is None or not ends[0, i] < ends[1, i]
            else Estimate(float(v), *map(float, ends[:, i]))
            for i, v in enumerate(value)
        ]
    return result


def _interval(drawn: Float[np.ndarray, "k b"]) -> Float[np.ndarray, "2 k"]:
    """Returns the percentiles of each row over the draws in which it is defined."""
    ends = np.full((2, len(drawn)), np.nan)
    for i, row in enumerate(np.sort(drawn, axis=1)):  # NaN come last
        if count := int(np.isfinite(row).sum()):
            ends[:, i] = np.quantile(row[:count], (0.025, 0.975))
    return ends
