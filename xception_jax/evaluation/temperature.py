"""Calibrates probabilities by temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2).

Logits are divided by a temperature that minimizes the negative log-likelihood. The order of the classes, and so the
accuracy, does not change.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar

from xception_jax.metrics.predictions import Predictions, expected_calibration_error

LOWEST, HIGHEST = 0.02, 50.0


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Calibration of the probabilities, before and after temperature scaling.

    Attributes:
      calibration_error: expected calibration error before scaling, in 15 bins.
      temperature: temperature fitted on all images, to use on other images.
      temperature_at_limit: whether the temperature is `LOWEST` or `HIGHEST`; the optimum may then lie beyond.
      calibration_error_after: expected calibration error after scaling, by cross-fitting.
    """

    calibration_error: float
    temperature: float
    temperature_at_limit: bool
    calibration_error_after: float


def calibrate(predictions: Predictions) -> Calibration:
    """Measures the calibration error before and after temperature scaling.

    The error after scaling is cross-fitted: the temperature of the images with even indices is applied to those with
    odd indices, and vice versa. Every image counts, no image is scaled by a temperature that was fitted on it, and no
    second split is needed. The images are divided by parity because a dataset may be sorted by class.

    Args:
      predictions: single-label predictions with logits.
    """
    assert predictions.logits is not None
    even = predictions.index % 2 == 0
    probabilities = predictions.probabilities.astype(np.float64)
    for fitted, applied in ((even, ~even), (~even, even)):
        temperature = fit_temperature(predictions.logits[fitted], predictions.label[fitted])
        probabilities[applied] = _best_probability(predictions.logits[applied], temperature)[:, None]
    temperature = fit_temperature(predictions.logits, predictions.label)
    return Calibration(
        calibration_error=expected_calibration_error(predictions),
        temperature=temperature,
        temperature_at_limit=temperature in (LOWEST, HIGHEST),
        calibration_error_after=expected_calibration_error(
            dataclasses.replace(predictions, probabilities=probabilities)
        ),
    )


def fit_temperature(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> float:
    """Returns the temperature in [LOWEST, HIGHEST] that minimizes the negative log-likelihood.

    The minimum is unique, because the loss is convex in 1 / temperature. Returns NaN if there are no images or if a
    logit is not finite.
    """
    if not len(logits) or not np.isfinite(logits).all():
        return math.nan
    shifted = logits - logits.max(axis=1, keepdims=True)
    true = shifted[np.arange(len(labels)), labels].astype(np.float64)

    def loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return float(np.mean(_log_sum_exp(shifted, scale) - true * scale))

    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = math.exp(minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-4}).x)
    # The search approaches a bound but never reaches it.
    return next((limit for limit in (LOWEST, HIGHEST) if math.isclose(found, limit, rel_tol=1e-3)), found)


def _best_probability(logits: np.ndarray, temperature: float) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.exp(-_log_sum_exp(shifted, 1 / temperature))


def _log_sum_exp(shifted: np.ndarray, scale: float) -> np.ndarray:
    """Returns log-sum-exp [n] of scaled logits [n, c], whose maximum in each row is zero."""
    return np.log(np.exp(shifted * np.float32(scale)).sum(axis=1, dtype=np.float64))
