"""Paired comparisons over seeds: intervals, corrections for several, verdicts, and an interaction along an axis.

The unit is the seed: the networks of two arms that share a seed saw the same images in the same order, so what is
analysed is their difference. An interval says how it would vary with other seeds, for the same test images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000

Verdict = Literal["better", "worse", "equivalent", "undecided"]
Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and how well it is known. What cannot be computed from so few values is NaN.

    Attributes:
      mean, sd: of the values; `sd` has n - 1 in the denominator.
      n: number of values.
      low, high: Student's t interval of the mean, 95 %.
      bootstrap_low, bootstrap_high: percentile bootstrap interval, 95 %; too narrow for few seeds (docs/study.md).
      p: two-sided t test against zero.
    """

    mean: float
    sd: float
    n: int
    low: float
    high: float
    bootstrap_low: float
    bootstrap_high: float
    p: float


def estimate(values: Sequence[float] | Float[Array, " n"]) -> Estimate:
    """Estimates the mean that `values`, one for each seed, are drawn around; what is not finite is left out."""
    x = np.asarray(values, float)
    x = x[np.isfinite(x)]
    n = len(x)
    if n < 2:
        nan = math.nan
        return Estimate(float(x[0]) if n else nan, nan, n, nan, nan, nan, nan, nan)
    low, high, p = (float(part[0]) for part in t_intervals(x[None]))
    bootstrap_low, bootstrap_high = (float(part[0]) for part in bootstrap_intervals(x[None]))
    return Estimate(float(x.mean()), float(x.std(ddof=1)), n, low, high, bootstrap_low, bootstrap_high, p)


def t_intervals(x: Float[Array, "k n"]) -> tuple[Float[Array, " k"], Float[Array, " k"], Float[Array, " k"]]:
    """Returns the ends of the 95 % t intervals of k means of n values each, and the two-sided p against zero.

    Equal values have an interval of no width, and p = 0 unless they are zero, where it is 1.
    """
    n = x.shape[1]
    mean, error = x.mean(1), x.std(1, ddof=1) / math.sqrt(n)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, np.abs(mean) / error)
    return mean - half, mean + half, 2 * stats.t.sf(t, n - 1)


def bootstrap_intervals(x: Float[Array, "k n"], seed: int = 0) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Returns the ends of the 95 % percentile bootstrap intervals of k means of n values each.

    The same resamples serve all rows, so that the same values always have the same interval.
    """
    n = x.shape[1]
    # How often each value is drawn: means of resamples are then one product of matrices.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    chunks = [np.quantile(part @ counts.T / n, tails, axis=1) for part in np.array_split(x, max(1, len(x) // 200))]
    low, high = np.concatenate(chunks, axis=1)
    return low, high


def holm(p: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for being several (Holm 1979): rejecting those below 0.05 errs in 5 % of families.

    NaN, of a comparison that could not be made, stays NaN and does not count.
    """
    adjusted = np.full(len(p), math.nan)
    given = np.asarray(p, float)
    known = np.flatnonzero(~np.isnan(given))
    order = known[np.argsort(given[known], kind="stable")]
    steps = given[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def equivalence_p(values: Sequence[float] | Float[Array, " n"], margin: float) -> float:
    """Returns the p-value of two one-sided t tests (TOST): small if the mean lies within -margin to margin."""
    x = np.asarray(values, float)
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return math.nan
    mean, error = x.mean(), x.std(ddof=1) / math.sqrt(len(x))
    if error == 0:
        return float(abs(mean) >= margin)
    return float(max(stats.t.sf((mean + margin) / error, len(x) - 1), stats.t.cdf((mean - margin) / error, len(x) - 1)))


def verdict(difference: Estimate, margin: float, adjusted_p: float) -> Verdict:
    """Decides what a difference in accuracy amounts to.

    'equivalent': both ends of the 95 % interval are inside the margin, so it is too small to matter (two one-sided
    tests at 2.5 % each). Otherwise 'better' or 'worse': zero is outside the interval, and Holm's p is below 0.05.
    Everything else is 'undecided', which more seeds may settle.
    """
    if -margin < difference.low and difference.high < margin:
        return "equivalent"
    if adjusted_p < 1 - CONFIDENCE and not difference.low <= 0 <= difference.high:
        return "better" if difference.mean > 0 else "worse"
    return "undecided"


@dataclasses.dataclass(frozen=True)
class Trend:
    """How an effect changes along an axis.

    Attributes:
      slope: change of the effect for a unit of the axis, estimated over the least-squares slopes of the seeds.
      contrast: the effect at the upper end of the axis minus that at the lower.
      first, last: the effect at the lower and at the upper end.
    """

    slope: Estimate
    contrast: Estimate
    first: Estimate
    last: Estimate

    @property
    def flips(self) -> Literal["rises through zero", "falls through zero", "no"]:
        """Whether the effect changes its sign: the slope and both ends, each by its own 95 % interval.

        All three must hold, so the chance of claiming a flip that is none stays below that of a single test
        (Berger 1982, intersection-union), and needs no correction.
        """
        if self.first.high < 0 < self.last.low and self.slope.low > 0:
            return "rises through zero"
        if self.first.low > 0 > self.last.high and self.slope.high < 0:
            return "falls through zero"
        return "no"


def trend(x: Sequence[float] | Float[Array, " points"], effects: Float[Array, "seeds points"]) -> Trend:
    """Tests the interaction of an effect with an axis: slope and contrast of each seed, then t intervals over them.

    Seeds are independent of each other, points of one seed need not be. A seed that lacks a point is left out.

    Args:
      x: where the points lie; at least two different values.
      effects: the paired difference for each seed at each point.

    Raises:
      ValueError: all points lie at the same place.
    """
    places = np.asarray(x, float)
    effects = effects[np.isfinite(effects).all(1)]
    centred = places - places.mean()
    if not centred.any():
        raise ValueError("a trend needs points at different places of its axis")
    slopes = effects @ centred / (centred @ centred)
    first, last = effects[:, int(places.argmin())], effects[:, int(places.argmax())]
    return Trend(estimate(slopes), estimate(last - first), estimate(first), estimate(last))


def smallest_effect(sd: float, n: int, power: float = 0.8) -> float:
    """Returns the true difference that n pairs find with this probability (p < 0.05), if differences vary by `sd`."""
    if n < 2 or not sd > 0:
        return math.nan
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    low, high = 0.0, 100.0  # in standard errors
    while high - low > 1e-6:
        middle = (low + high) / 2
        # The other tail, a difference found with the wrong sign, is below 1e-5 there, and NaN in places.
        low, high = (low, middle) if stats.nct.sf(critical, n - 1, middle) > power else (middle, high)
    return high * sd / math.sqrt(n)
