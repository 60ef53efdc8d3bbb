"""Estimates a weighted sum of the mean accuracies of several arms, in the same ways as analysis.py compares two.

With the weights 1 and -1, each function gives the mean, the error and the degrees of freedom of its namesake there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from xception_jax.study.analysis import Sample, mean_square_of_both
from xception_jax.study.statistics import Estimate, estimate, from_error

Weights = Mapping[str, float]
Samples = Mapping[str, Sample]


def paired(weights: Weights, samples: Samples) -> Estimate:
    """Estimates the mean, over the seeds that all arms have, of the weighted sum."""
    return estimate(np.sum([weight * samples[arm].accuracy for arm, weight in weights.items()], axis=0))


def welch(weights: Weights, samples: Samples) -> Estimate:
    """Estimates it from independent arms with variances of their own, with Satterthwaite's degrees of freedom."""
    used = {arm: samples[arm].known for arm in weights}
    if min(map(len, used.values())) < 2:
        return _unknown(used)
    parts = {arm: weights[arm] ** 2 * values.var(ddof=1) / len(values) for arm, values in used.items()}
    degrees = sum(part**2 / (len(used[arm]) - 1) for arm, part in parts.items())
    variance = sum(parts.values())
    return _estimate(weights, used, variance, variance**2 / degrees if degrees else math.inf)


def pooled(weights: Weights, samples: Samples) -> Estimate:
    """Estimates it with one variance, pooled over all arms of the study."""
    used = {arm: samples[arm].known for arm in weights}
    known = [sample.known for sample in samples.values() if len(sample.known) > 1]
    df = sum(len(values) - 1 for values in known)
    if not df or not min(map(len, used.values())):
        return _unknown(used)
    variance = sum((len(values) - 1) * values.var(ddof=1) for values in known) / df
    return _estimate(weights, used, variance * sum(weights[arm] ** 2 / len(v) for arm, v in used.items()), df)


def crossed(weights: Weights, samples: Samples) -> Estimate:
    """Estimates it over other seeds and other test images; see `analysis.crossed`."""
    used = {arm: samples[arm].known for arm in weights}
    right = {arm: samples[arm].right for arm in weights}
    cells = {arm: values.astype(np.float64) for arm, values in right.items() if values is not None}
    if len(cells) < len(weights) or min(map(len, cells.values())) < 2:
        return _unknown(used)
    images = np.sum([weights[arm] * values.mean(0) for arm, values in cells.items()], axis=0)
    of_seeds = {arm: weights[arm] ** 2 * values.mean(1).var(ddof=1) / len(values) for arm, values in cells.items()}
    of_both = sum(weights[arm] ** 2 * mean_square_of_both(values) for arm, values in cells.items())
    of_images = images.var(ddof=1) / len(images)
    variance = sum(of_seeds.values()) + max(of_images - of_both, 0.0)
    degrees = sum(part**2 / (len(cells[arm]) - 1) for arm, part in of_seeds.items())
    degrees += of_images**2 / (len(images) - 1)
    return _estimate(weights, used, variance, variance**2 / degrees if degrees else math.inf)


CONTRASTS: dict[str, Callable[[Weights, Samples], Estimate]] = {
    "paired": paired,
    "welch": welch,
    "pooled": pooled,
    "crossed": crossed,
}


def _estimate(weights: Weights, used: Mapping[str, np.ndarray], variance: float, df: float) -> Estimate:
    mean = float(sum(weight * used[arm].mean() for arm, weight in weights.items()))
    return from_error(mean, math.sqrt(variance), df, n=min(map(len, used.values())))


def _unknown(used: Mapping[str, np.ndarray]) -> Estimate:
    return from_error(math.nan, math.nan, math.nan, n=min(map(len, used.values())))
