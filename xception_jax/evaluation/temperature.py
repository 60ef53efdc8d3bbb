"""Temperature scaling (Guo et al. 2017, 1706.04599, section 4.2): one number that makes probabilities honest.

Logits are divided by a temperature, fitted by minimising the negative log-likelihood. The order of the classes, and so
the accuracy, stays as it is.
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
    """How honest the probabilities are.

    Attributes:
      calibration_error: expected calibration error of the probabilities as they are, in 15 bins.
      temperature: fitted on all images: the one to use on others.
      temperature_at_limit: it is `LOWEST` or `HIGHEST`, and the minimum there or beyond.
      calibration_error_after: with temperatures that were fitted on other images than those they are applied to.
    """

    calibration_error: float
    temperature: float
    temperature_at_limit: bool
    calibration_error_after: float


def calibrate(predictions: Predictions) -> Calibration:
    """Fits temperatures by cross-fitting: that of the images with an even index is applied to the odd, and vice versa.

    So the error afterwards is that on images which the temperature has not seen, every image counts, and no second
    split is needed, which ImageNet's validation set, for one, has not. Halves by parity, and not first and second,
    because a dataset may be sorted by class.

    Args:
      predictions: with logits, one label an image.
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
    """Returns the temperature in [LOWEST, HIGHEST] with the smallest negative log-likelihood.

    That is convex in 1 / temperature, so the minimum is the only one. NaN without images, or if a logit is not finite.
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
    # The search comes close to a bound, and never reaches it.
    return next((limit for limit in (LOWEST, HIGHEST) if math.isclose(found, limit, rel_tol=1e-3)), found)


def _best_probability(logits: np.ndarray, temperature: float) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.exp(-_log_sum_exp(shifted, 1 / temperature))


def _log_sum_exp(shifted: np.ndarray, scale: float) -> np.ndarray:
    """Returns [n] of logits whose largest is zero, times a scale."""
    return np.log(np.exp(shifted * np.float32(scale)).sum(axis=1, dtype=np.float64))
