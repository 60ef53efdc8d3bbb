"""Statistics over seeds: intervals, multiple comparisons, verdicts, interactions along an axis.

analysis.py compares two arms, with the intervals and tests of this file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
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
    """A mean over seeds and its uncertainty. Attributes that need more values than there are, are NaN.

    Attributes:
      mean, sd: mean and standard deviation of the values; `sd` has n - 1 in the denominator.
      n: number of values.
      low, high: Student's t interval of the mean, 95 %.
      bootstrap_low, bootstrap_high: percentile bootstrap interval, 95 %; too narrow for few seeds
        (docs/explanation/studies.md).
      p: p-value of the two-sided t test against zero.
      error, df: the standard error of the mean, and its degrees of freedom.
    """

    mean: float
    sd: float
    n: int
    low: float
    high: float
    bootstrap_low: float
    bootstrap_high: float
    p: float
    error: float = math.nan
    df: float = math.nan

    def to_json(self) -> dict[str, float | None]:
        """Returns mean, interval and number of values as plain data; NaN is None."""
        found = {name: getattr(self, name) for name in ("mean", "low", "high", "n")}
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


_ROUNDING = 1e-12  # of means of equal accuracies in float64


def from_error(
    mean: float,
    error: float,
    df: float,
    *,
    n: int,
    sd: float = math.nan,
    bootstrap: tuple[float, float] = (math.nan, math.nan),
) -> Estimate:
    """Returns the estimate of a mean with a given standard error: Student's interval and test.

    With an error of zero the interval has zero width, and p is 0, or 1 if the mean is zero. What is so small that only
    rounding can be its cause is taken for zero.
    """
    mean, error = (0.0 if abs(value) <= _ROUNDING else value for value in (mean, error))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, df)) * error
    p = math.nan if math.isnan(error) else float(mean == 0)
    if error > 0:
        p = float(2 * stats.t.sf(abs(mean) / error, df))
    low, high = (float(end) for end in bootstrap)
    return Estimate(mean, sd, n, mean - half, mean + half, low, high, p, error, df)


def estimate(values: Sequence[float] | Float[Array, " n"]) -> Estimate:
    """Estimates the mean of `values`, one for each seed; values that are not finite are ignored."""
    x = np.asarray(values, float)
    x = x[np.isfinite(x)]
    n = len(x)
    if n < 2:
        nan = math.nan
        return from_error(float(x[0]) if n else nan, nan, nan, n=n)
    low, high = (part[0] for part in bootstrap_intervals(x[None]))
    sd = float(x.std(ddof=1))
    return from_error(float(x.mean()), sd / math.sqrt(n), n - 1, n=n, sd=sd, bootstrap=(low, high))


def estimate_median(values: Sequence[float] | Float[Array, " n"]) -> Estimate:
    """Estimates the median of `values`, one for each seed: exact whatever their distribution, and robust to outliers.

    The interval is that of the sign test: from the k-th smallest to the k-th largest value, with the largest k for
    which it covers the median in at least 95 % of samples. It takes six values; with ten, k is 2. `mean` is the median;
    attributes of Student's test are NaN.
    """
    x = np.sort(np.asarray(values, float)[np.isfinite(values)])
    outside = int((2 * stats.binom.cdf(np.arange(len(x)), len(x), 0.5) <= 1 - CONFIDENCE).sum())
    nan = math.nan
    low, high = (float(x[outside - 1]), float(x[-outside])) if outside else (nan, nan)
    median = float(np.median(x)) if len(x) else nan
    return Estimate(median, sd=nan, n=len(x), low=low, high=high, bootstrap_low=nan, bootstrap_high=nan, p=nan)


def sign_p(values: Float[Array, " n"], side: str, bound: float) -> float:
    """Returns the one-sided p-value of a sign test of a claim about a median, see `region_state`."""

    def p(count: int) -> float:
        return float(stats.binom.sf(count - 1, len(values), 0.5))

    below = p(int((values < bound).sum()))
    if side == "within":
        return max(p(int((values > -bound).sum())), below)
    return p(int((values > bound).sum())) if side == "above" else below


def t_intervals(x: Float[Array, "k n"]) -> tuple[Float[Array, " k"], Float[Array, " k"], Float[Array, " k"]]:
    """Returns (low, high, p): the 95 % t intervals of k means of n values each, and their two-sided p against zero.

    For n equal values the interval has zero width, and p is 0, or 1 if the values are zero.
    """
    n = x.shape[1]
    mean, error = x.mean(1), x.std(1, ddof=1) / math.sqrt(n)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, np.abs(mean) / error)
    return mean - half, mean + half, 2 * stats.t.sf(t, n - 1)


def bootstrap_intervals(x: Float[Array, "k n"], seed: int = 0) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Returns (low, high): the 95 % percentile bootstrap intervals of k means of n values each.

    All rows use the same resamples, so that equal values always have the same interval.
    """
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    parts = np.array_split(x, max(1, len(x) // 200))
    low, high = np.concatenate([np.quantile(bootstrap_means(part, seed), tails, axis=1) for part in parts], axis=1)
    return low, high


def bootstrap_means(x: Float[Array, "k n"], seed: int = 0) -> Float[Array, "k resamples"]:
    """Returns the means of resamples of k rows of n values, with the same resamples for all rows."""
    n = x.shape[1]
    return x @ _counts(n, seed).T / n


@functools.lru_cache(maxsize=8)
def _counts(n: int, seed: int) -> Float[Array, "resamples n"]:
    """Returns how often each value is drawn. The means of all resamples are then one matrix product."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)


def holm(p: Sequence[float]) -> list[float]:
    """Returns p-values corrected for multiple comparisons (Holm 1979).

    Rejecting those below 0.05 makes an error in at most 5 % of families. NaN, for a comparison without enough values,
    stays NaN. It counts as a comparison: a family has the size that was stated, whatever could be measured.
    """
    adjusted = np.full(len(p), math.nan)
    given = np.asarray(p, float)
    known = np.flatnonzero(~np.isnan(given))
    order = known[np.argsort(given[known], kind="stable")]
    steps = given[order] * (len(p) - np.arange(len(order)))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def holm_within(claims: Sequence[str], p: Sequence[float]) -> list[float]:
    """Returns p-values that are corrected by Holm's method within each claim."""
    adjusted = [math.nan] * len(p)
    for claim in set(claims):
        members = [number for number, own in enumerate(claims) if own == claim]
        for number, value in zip(members, holm([p[number] for number in members]), strict=True):
            adjusted[number] = value
    return adjusted


def tost_p(found: Estimate, margin: float) -> float:
    """Returns the p-value of two one-sided t tests (TOST), which is small if the mean is between -margin and margin."""
    if math.isnan(found.error):
        return math.nan
    if found.error == 0:
        return float(abs(found.mean) >= margin)
    above, below = (found.mean + margin) / found.error, (found.mean - margin) / found.error
    return float(max(stats.t.sf(above, found.df), stats.t.cdf(below, found.df)))


def region_state(found: Estimate, side: str, bound: float) -> Literal["holds", "fails", "open"]:
    """Returns whether the 95 % interval lies where a claim says, lies elsewhere, or neither.

    Args:
      found: the estimate.
      side: 'above' or 'below' the bound, or 'within' for between -bound and bound.
      bound: bound of the claim.
    """
    if not math.isfinite(found.low):
        return "open"
    regions = {"above": (bound, math.inf), "below": (-math.inf, bound), "within": (-bound, bound)}
    low, high = regions[side]
    if low < found.low and found.high < high:
        return "holds"
    return "fails" if found.high <= low or found.low >= high else "open"


def region_p(found: Estimate, side: str, bound: float) -> float:
    """Returns the one-sided p-value of a claim, see `region_state`; that of two one-sided tests for 'within'."""
    if side == "within" or math.isnan(found.error):
        return tost_p(found, bound)
    off = (found.mean - bound) * (1 if side == "above" else -1)
    return float(stats.t.sf(off / found.error, found.df)) if found.error > 0 else float(off <= 0)


def verdict(difference: Estimate, margin: float, adjusted_p: float) -> Verdict:
    """Returns the verdict on a difference in accuracy.

    Args:
      difference: the estimate.
      margin: the smallest difference that matters.
      adjusted_p: p-value after Holm's correction.

    Returns:
      'equivalent': both ends of the 95 % interval are inside the margin (two one-sided tests at 2.5 % each); otherwise
      'better' or 'worse': zero is outside the interval and Holm's p is below 0.05; otherwise 'undecided'.
    """
    if -margin < difference.low and difference.high < margin:
        return "equivalent"
    if adjusted_p < 1 - CONFIDENCE and not difference.low <= 0 <= difference.high:
        return "better" if difference.mean > 0 else "worse"
    return "undecided"


@dataclasses.dataclass(frozen=True)
class Trend:
    """The change of an effect along an axis.

    Attributes:
      slope: change of the effect per unit of the axis, by least squares.
      contrast: the effect at the upper end of the axis minus that at the lower end.
      first, last: the effect at the lower and at the upper end.
    """

    slope: Estimate
    contrast: Estimate
    first: Estimate
    last: Estimate

    @property
    def flips(self) -> Literal["rises through zero", "falls through zero", "no"]:
        """Returns whether the effect changes its sign, according to the 95 % intervals of the slope and of both ends.

        All three must exclude zero in the required direction. The probability of a false claim is therefore at most
        that of a single test, and needs no correction (intersection-union test, Berger 1982).
        """
        if self.first.high < 0 < self.last.low and self.slope.low > 0:
            return "rises through zero"
        if self.first.low > 0 > self.last.high and self.slope.high < 0:
            return "falls through zero"
        return "no"


def slope_weights(x: Float[Array, "points ..."]) -> Float[Array, "points ..."]:
    """Returns the weights with which values at these positions add up to their least-squares slope."""
    centred = x - x.mean(0)
    return centred / np.square(centred).sum(0)


def trend(x: Sequence[float] | Float[Array, " points"], estimator: Callable[[Array], Estimate]) -> Trend:
    """Tests the interaction of an effect with an axis.

    Args:
      x: positions of the points on the axis, with at least two different values.
      estimator: takes a weight for each point and returns the estimate of the weighted sum of the effects there.

    Raises:
      ValueError: all points have the same position.
    """
    positions = np.asarray(x, float)
    if not np.ptp(positions):
        raise ValueError("a trend needs points at different positions of its axis")
    first, last = (np.eye(len(positions))[point] for point in (positions.argmin(), positions.argmax()))
    return Trend(*map(estimator, (slope_weights(positions), last - first, first, last)))


def smallest_effect(error: float, df: float, power: float = 0.8) -> float:
    """Returns the true difference that is detected (p < 0.05) with this power, for a standard error and its df."""
    if not (error > 0 and df > 0):
        return math.nan
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, df)
    low, high = 0.0, 100.0  # in standard errors
    while high - low > 1e-6:
        middle = (low + high) / 2
        # The other tail (significant, with the wrong sign) is below 1e-5 here. SciPy returns NaN for some.
        low, high = (low, middle) if stats.nct.sf(critical, df, middle) > power else (middle, high)
    return high * error
