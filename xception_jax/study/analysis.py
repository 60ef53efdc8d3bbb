"""Estimates a weighted sum of the mean accuracies of several arms, in one of several ways.

The weights 1 and -1 compare two arms; claims about several arms have others. A study chooses its way beforehand.

'paired'   Student's t over the sums of cells that share a seed.
'welch'    Welch's t: seeds are independent between arms, whose variances may differ.
'pooled'   Student's t with one variance, pooled over all arms of the study: the most degrees of freedom.
'crossed'  seeds and test images both vary. Seeds are independent between arms, and all arms see the same images.

The first three describe other seeds on the same test images. The last one describes other test images, too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Float, Shaped

from xception_jax.study.claims import Weights
from xception_jax.study.inference import CONFIDENCE, Estimate, bootstrap_means, estimate, from_error

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
    right: Shaped[Array, "cells images"] | None = None
    resampled: Float[Array, "resamples cells"] | None = None

    @property
    def known(self) -> Float[Array, " cells"]:
        """Returns the accuracies that are known."""
        return self.accuracy[np.isfinite(self.accuracy)]


Samples = Mapping[str, Sample]
"""The finished cells of all arms of a study."""


def versus(arm: str, baseline: str) -> Weights:
    """Returns the weights of a comparison of two arms."""
    return {arm: 1.0, baseline: -1.0}


def paired(weights: Weights, samples: Samples) -> Estimate:
    """Estimates the sum over the seeds that all arms have."""
    return estimate(np.sum([weight * samples[arm].accuracy for arm, weight in weights.items()], axis=0))


def welch(weights: Weights, samples: Samples) -> Estimate:
    """Estimates the sum from independent arms with variances of their own, with Satterthwaite's degrees of freedom."""
    known = {arm: samples[arm].known for arm in weights}
    parts = {arm: weights[arm] ** 2 * _variance_of_mean(values) for arm, values in known.items()}
    return _independent(weights, known, sum(parts.values()), _degrees(parts, known))


def pooled(weights: Weights, samples: Samples) -> Estimate:
    """Estimates the sum with the variance of all arms of the study, which must be the same."""
    known = {arm: samples[arm].known for arm in weights}
    every = [sample.known for sample in samples.values() if len(sample.known) > 1]
    df = sum(len(values) - 1 for values in every)
    variance = sum((len(values) - 1) * values.var(ddof=1) for values in every) / df if df else math.nan
    return _independent(weights, known, variance * _squares(weights, known), df)


def crossed(weights: Weights, samples: Samples) -> Estimate:
    """Estimates the sum over other seeds and other test images.

    The accuracy of a cell on an image is a sum of effects of the seed, of the image and of both (a two-way layout). The
    variance of the sum follows from the mean squares of seeds and of images, without what both count, and has
    Satterthwaite's degrees of freedom. The bootstrap resamples seeds and images independently (Owen 2007).
    """
    used = {arm: samples[arm] for arm in weights}
    cells = {arm: sample.right.astype(np.float64) for arm, sample in used.items() if sample.right is not None}
    if len(cells) < len(weights) or min(map(len, cells.values())) < 2:
        return from_error(math.nan, math.nan, math.nan, n=0)
    images = _of_images(cells, weights)
    of_seeds = {arm: weights[arm] ** 2 * _variance_of_mean(values.mean(1)) for arm, values in cells.items()}
    of_images = _variance_of_mean(images)
    variance = sum(of_seeds.values()) + image_variance(cells, weights)
    known = {arm: sample.known for arm, sample in used.items()}
    degrees = _degrees(of_seeds | {"": of_images}, cells | {"": images}, variance)  # no arm has an empty name
    found = _independent(weights, known, variance if variance > _ROUNDING else 0.0, degrees, sum(of_seeds.values()))
    drawn = [
        weights[arm] * _resample_cells(sample.resampled, seed)
        for seed, (arm, sample) in enumerate(used.items())
        if sample.resampled is not None
    ]
    if len(drawn) < len(weights):
        return found
    low, high = _percentiles(np.sum(drawn, axis=0))
    return dataclasses.replace(found, bootstrap_low=low, bootstrap_high=high)


def crossed_pairs(weights: Weights, samples: Samples) -> Estimate:
    """Estimates the sum as `crossed`, with the sums of cells that share a seed as the cells of a single arm."""
    return crossed({"pairs": 1.0}, {"pairs": _pairs(weights, samples)})


def _pairs(weights: Weights, samples: Samples) -> Sample:
    """Returns the weighted sum of the cells of each seed that all arms have."""
    used = {arm: samples[arm] for arm in weights}
    accuracy = np.sum([weights[arm] * sample.accuracy for arm, sample in used.items()], axis=0)
    common = {arm: np.isfinite(accuracy)[np.isfinite(sample.accuracy)] for arm, sample in used.items()}
    right = [weights[arm] * s.right[common[arm]] for arm, s in used.items() if s.right is not None]
    resampled = [weights[arm] * s.resampled[:, common[arm]] for arm, s in used.items() if s.resampled is not None]
    if min(len(right), len(resampled)) < len(weights):
        return Sample(accuracy)
    return Sample(accuracy, np.sum(right, axis=0), np.sum(resampled, axis=0))


ANALYSES: dict[str, Callable[[Weights, Samples], Estimate]] = {
    "paired": paired,
    "welch": welch,
    "pooled": pooled,
    "crossed": crossed,
}


def image_variance(cells: Mapping[str, Array], weights: Weights) -> float:
    """Returns the variance of a weighted sum of accuracies over other test images, without what more seeds reduce.

    Args:
      cells: whether each cell [cells, images] of an arm classifies each image correctly.
      weights: by arm.
    """
    of_both = sum(weights[arm] ** 2 * _mean_square_of_both(values) for arm, values in cells.items())
    return max(_variance_of_mean(_of_images(cells, weights)) - of_both, 0.0)


def _of_images(cells: Mapping[str, Array], weights: Weights) -> Float[Array, " images"]:
    """Returns the weighted sum of accuracies on each image."""
    return np.sum([weights[arm] * values.mean(0) for arm, values in cells.items()], axis=0)


def _variance_of_mean(values: Float[Array, " n"]) -> float:
    return float(values.var(ddof=1) / len(values)) if len(values) > 1 else math.nan


def _squares(weights: Weights, known: Mapping[str, Array]) -> float:
    """Returns the variance of the sum in units of the variance of a cell."""
    return sum(weights[arm] ** 2 / max(len(values), 1) for arm, values in known.items())


def _degrees(parts: Mapping[str, float], values: Mapping[str, Array], variance: float | None = None) -> float:
    """Returns Satterthwaite's degrees of freedom of a variance, by default the sum of its parts."""
    variance = sum(parts.values()) if variance is None else variance
    squares = sum(part**2 / max(len(values[name]) - 1, 1) for name, part in parts.items())
    return variance**2 / squares if squares and variance > _ROUNDING else math.inf


def _independent(
    weights: Weights, known: Mapping[str, Array], variance: float, df: float, of_seeds: float | None = None
) -> Estimate:
    """Returns the estimate of a sum of independent means. `sd` is that of the sum over one cell of each arm.

    Args:
      weights: by arm.
      known: accuracies of the cells of each arm.
      variance: the variance of the sum.
      df: its degrees of freedom.
      of_seeds: the part of the variance that `sd` covers; by default all of it.
    """
    n = min(map(len, known.values()))
    mean = float(sum(weight * known[arm].mean() for arm, weight in weights.items())) if n else math.nan
    if n < 2 or not df > 0:
        return from_error(mean, math.nan, math.nan, n=n)
    drawn = [weights[arm] * bootstrap_means(values[None], seed)[0] for seed, (arm, values) in enumerate(known.items())]
    error = math.sqrt(variance)
    cells = sum(weight**2 for weight in weights.values()) / _squares(weights, known)
    sd = math.sqrt((variance if of_seeds is None else of_seeds) * cells)
    return from_error(mean, error, df, n=n, sd=sd, bootstrap=_percentiles(np.sum(drawn, axis=0)))


def _percentiles(drawn: Float[Array, " resamples"]) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _mean_square_of_both(cells: Float[Array, "cells images"]) -> float:
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
