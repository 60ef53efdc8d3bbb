"""Estimates the difference of two arms in one of several ways. A study chooses its way beforehand.

'paired'   Student's t over the differences of cells that share a seed.
'welch'    Welch's t: seeds are independent between arms, whose variances may differ.
'pooled'   Student's t with one variance, pooled over all arms of the study: the most degrees of freedom.
'crossed'  seeds and test images both vary. Seeds are independent between arms, and all arms see the same images.

The first three describe other seeds on the same test images. The last one describes other test images, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from xception_jax.study.statistics import CONFIDENCE, Estimate, bootstrap_means, estimate, from_error

Array = np.ndarray
IMAGE_RESAMPLES = 2_000
_ROUNDING = 1e-24  # the variance that equal answers have in float64
_CHUNK = 100  # resamples of the images in memory at a time


@dataclasses.dataclass(frozen=True)
class Sample:
    """The finished cells of an arm.

    Attributes:
      accuracy: for each seed of the study, NaN where there is none.
      right: whether each cell classified each test image correctly, for the seeds with an accuracy; None if unknown.
      resampled: the accuracy of each of these cells on resampled images, from `resample_images`.
    """

    accuracy: Float[Array, " seeds"]
    right: Bool[Array, "cells images"] | None = None
    resampled: Float[Array, "resamples cells"] | None = None

    @property
    def known(self) -> Float[Array, " cells"]:
        """Returns the accuracies that are known."""
        return self.accuracy[np.isfinite(self.accuracy)]


def paired(arm: Sample, baseline: Sample, study: Sequence[Sample]) -> Estimate:
    """Estimates the mean difference over the seeds that both arms have."""
    return estimate(arm.accuracy - baseline.accuracy)


def welch(arm: Sample, baseline: Sample, study: Sequence[Sample]) -> Estimate:
    """Estimates the difference of the means of two independent samples."""
    parts = [
        sample.known.var(ddof=1) / len(sample.known) if len(sample.known) > 1 else math.nan
        for sample in (arm, baseline)
    ]
    error = math.sqrt(sum(parts))
    degrees = sum(part**2 / max(len(sample.known) - 1, 1) for part, sample in zip(parts, (arm, baseline), strict=True))
    return _independent(arm, baseline, error, sum(parts) ** 2 / degrees if degrees else math.inf)


def pooled(arm: Sample, baseline: Sample, study: Sequence[Sample]) -> Estimate:
    """Estimates the difference of two means with the variance of all arms of the study, which must be the same."""
    known = [sample.known for sample in study if len(sample.known) > 1]
    df = sum(len(values) - 1 for values in known)
    variance = sum((len(values) - 1) * values.var(ddof=1) for values in known) / df if df else math.nan
    sizes = [len(sample.known) for sample in (arm, baseline)]
    error = math.sqrt(variance * sum(1 / size for size in sizes)) if all(sizes) else math.nan
    return _independent(arm, baseline, error, df)


def crossed(arm: Sample, baseline: Sample, study: Sequence[Sample]) -> Estimate:
    """Estimates the difference of two arms over other seeds and other test images.

    The accuracy of a cell on an image is a sum of effects of the seed, of the image and of both (a two-way layout). The
    variance of the difference follows from the mean squares of seeds and of images, without what both count, and has
    Satterthwaite's degrees of freedom. The bootstrap resamples seeds and images independently (Owen 2007).
    """
    if arm.right is None or baseline.right is None or min(len(arm.right), len(baseline.right)) < 2:
        return from_error(math.nan, math.nan, math.nan, n=0)
    cells = [sample.right.astype(np.float64) for sample in (arm, baseline) if sample.right is not None]
    images = cells[0].mean(0) - cells[1].mean(0)
    of_seeds = [values.mean(1).var(ddof=1) / len(values) for values in cells]
    of_images = images.var(ddof=1) / len(images)
    variance = sum(of_seeds) + max(of_images - sum(map(mean_square_of_both, cells)), 0.0)
    degrees = sum(part**2 / (len(values) - 1) for part, values in zip(of_seeds, cells, strict=True))
    degrees += of_images**2 / (len(images) - 1)
    variance = variance if variance > _ROUNDING else 0.0
    found = _independent(arm, baseline, math.sqrt(variance), variance**2 / degrees if variance else math.inf)
    if arm.resampled is None or baseline.resampled is None:
        return found
    drawn = [
        _resample_cells(sample.resampled, seed)
        for seed, sample in enumerate((arm, baseline))
        if sample.resampled is not None
    ]
    low, high = np.quantile(drawn[0] - drawn[1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return dataclasses.replace(found, bootstrap_low=float(low), bootstrap_high=float(high))


ANALYSES: dict[str, Callable[[Sample, Sample, Sequence[Sample]], Estimate]] = {
    "paired": paired,
    "welch": welch,
    "pooled": pooled,
    "crossed": crossed,
}


def _independent(arm: Sample, baseline: Sample, error: float, df: float) -> Estimate:
    """Returns the estimate of a difference of independent means. `sd` is that of a difference of two cells."""
    a, b = arm.known, baseline.known
    n = min(len(a), len(b))
    mean = float(a.mean() - b.mean()) if n else math.nan
    if n < 2 or not df > 0:
        return from_error(mean, math.nan, math.nan, n=n)
    drawn = bootstrap_means(a[None], seed=0)[0] - bootstrap_means(b[None], seed=1)[0]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return from_error(
        mean, error, df, n=n, sd=error / math.sqrt(1 / len(a) + 1 / len(b)) * math.sqrt(2), bootstrap=(low, high)
    )


def mean_square_of_both(cells: Float[Array, "cells images"]) -> float:
    """Returns the part of the variance of a mean that varies with seed and image together."""
    residual = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
    n, count = cells.shape
    return float((residual**2).sum() / ((n - 1) * (count - 1)) / (n * count))


def resample_images(
    right: Bool[Array, "cells images"], resamples: int = IMAGE_RESAMPLES
) -> Float[Array, "resamples cells"]:
    """Returns the accuracies of cells on resampled images, the same images for all cells.

    Each image is drawn a Poisson number of times with mean one, which is close to drawing with replacement.
    """
    rng = np.random.default_rng(0)
    values = right.T.astype(np.float32)
    means = []
    for _ in range(0, resamples, _CHUNK):
        counts = rng.poisson(1.0, (_CHUNK, len(values))).astype(np.float32)
        means.append(counts @ values / np.maximum(counts.sum(1, keepdims=True), 1))
    return np.concatenate(means)[:resamples]


def _resample_cells(resampled: Float[Array, "resamples cells"], seed: int) -> Float[Array, " resamples"]:
    """Returns the mean of resampled cells for each resample of the images."""
    resamples, n = resampled.shape
    drawn = np.random.default_rng(seed + 1).integers(0, n, (resamples, n))
    return np.take_along_axis(resampled, drawn, axis=1).mean(1)


def seeds_needed(
    sd: float, margin: float, *, paired: bool, images: float = 0.0, power: float = 0.8
) -> tuple[int | None, int | None]:
    """Returns the seeds of each arm that decide a margin with this power.

    Args:
      sd: standard deviation of a cell over seeds.
      margin: the margin.
      paired: whether the differences of pairs are analysed, with half of the degrees of freedom.
      images: standard error of a difference that comes from the test images, which no seed reduces.
      power: the power.

    Returns:
      (equivalence, difference): seeds with which two arms without any difference are found equivalent, and with which a
      difference as large as the margin is found. None for more than `MAX_SEEDS`.
    """

    def smallest(chance: Callable[[float, float, float], float]) -> int | None:
        def enough(n: int) -> bool:
            return chance(math.sqrt(2 / n) * sd, (n - 1) * (1 if paired else 2), images) >= power

        if not enough(MAX_SEEDS):
            return None
        low, high = 1, MAX_SEEDS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    return smallest(lambda *parts: _power(0.0, margin, *parts)[0]), smallest(
        lambda *parts: _power(margin, margin, *parts)[1]
    )


MAX_SEEDS = 10_000
_QUANTILES = (np.arange(100) + 0.5) / 100


def _power(true: float, margin: float, error: float, df: float, images: float) -> tuple[float, float]:
    """Returns the probabilities of finding equivalence, and of finding a difference of the right sign."""
    # Averaged over the estimated variance, of which only the part of the seeds is uncertain.
    estimated = np.sqrt(error**2 * stats.chi2.ppf(_QUANTILES, df) / df + images**2)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, df) * estimated
    spread = math.hypot(error, images)
    inside = stats.norm.cdf((margin - half - true) / spread) - stats.norm.cdf((-margin + half - true) / spread)
    return float(np.maximum(inside, 0).mean()), float(stats.norm.sf((half - true) / spread).mean())
