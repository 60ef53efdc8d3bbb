import dataclasses
import math

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from xception_jax.evaluation import tables as result
from xception_jax.evaluation import temperature as calibration
from xception_jax.metrics.predictions import Predictions, expected_calibration_error


def predictions(logits, label, index=None):
    order = np.argsort(-logits, axis=1)[:, :3]
    probabilities = np.take_along_axis(softmax(logits, axis=1), order, axis=1).astype(np.float32)
    index = np.arange(len(label)) if index is None else index
    return Predictions(index, label, order.astype(np.int32), probabilities, logits)


def drawn(n=3000, c=8, temperature=1.0, seed=0):
    """Logits whose probabilities are right once they are divided by the temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2, size=(n, c))
    label = np.array([rng.choice(c, p=p) for p in softmax(logits, axis=1)])
    return (logits * temperature).astype(np.float32), label


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_minimises_scikit_learns_log_loss(temperature):
    logits, label = drawn(temperature=temperature)
    fitted = calibration.fit_temperature(logits, label)
    assert fitted == pytest.approx(temperature, rel=0.1)

    def loss(t):
        return log_loss(label, softmax(logits.astype(np.float64) / t, axis=1), labels=range(8))

    assert loss(fitted) < min(loss(fitted * 1.01), loss(fitted / 1.01))


def test_honest_probabilities_stay_and_overconfident_ones_become_honest():
    sure = calibration.calibrate(predictions(*drawn(temperature=3.0)))
    assert sure.calibration_error > 0.1
    assert sure.calibration_error_after < 0.03
    honest = calibration.calibrate(predictions(*drawn()))
    assert honest.calibration_error < 0.03
    assert honest.temperature == pytest.approx(1, rel=0.1)


def test_no_image_is_scored_with_a_temperature_that_it_was_fitted_on():
    """Even images need 3 and odd ones 1 / 3, so each half makes the other worse, and not better."""
    (even, even_label), (odd, odd_label) = drawn(temperature=3.0), drawn(temperature=1 / 3, seed=1)
    logits, label = np.stack([even, odd], 1).reshape(-1, 8), np.stack([even_label, odd_label], 1).reshape(-1)
    found = calibration.calibrate(predictions(logits, label))
    by_hand = predictions(logits, label)
    temperatures = np.where(
        np.arange(len(label)) % 2,
        calibration.fit_temperature(even, even_label),
        calibration.fit_temperature(odd, odd_label),
    )
    best = softmax(logits.astype(np.float64) / temperatures[:, None], axis=1).max(axis=1)
    expected = expected_calibration_error(dataclasses.replace(by_hand, probabilities=best[:, None]))
    assert found.calibration_error_after == pytest.approx(expected, abs=1e-4)
    assert found.calibration_error_after > found.calibration_error


def test_the_halves_are_of_the_index_and_not_of_the_order():
    logits, label = drawn(n=400, temperature=2.0)
    order = np.random.default_rng(3).permutation(400)
    shuffled = calibration.calibrate(predictions(logits[order], label[order], order))
    assert shuffled.calibration_error_after == pytest.approx(
        calibration.calibrate(predictions(logits, label)).calibration_error_after, abs=5e-5
    )


@pytest.mark.parametrize(("sign", "limit"), [(1, calibration.LOWEST), (-1, calibration.HIGHEST)])
def test_a_temperature_at_its_limit_is_said_to_be_there(sign, limit):
    """Logits that are always right, or always wrong, have no best temperature."""
    label = np.arange(40) % 4
    found = calibration.calibrate(predictions((sign * 0.1 * np.eye(4)[label]).astype(np.float32), label))
    assert (found.temperature, found.temperature_at_limit) == (limit, True)
    metrics = {f"ema_{name}": value for name, value in dataclasses.asdict(found).items()}
    metrics |= {"source": "x", "dataset": "y", "split": "z", "count": 40}
    lines = result.as_text(metrics, ["ema_"], []).splitlines()
    assert [line for line in lines if "at its limit" in line] == [f"{'temperature':<28}{limit:.4f}  at its limit"]
    assert not calibration.calibrate(predictions(*drawn(n=200))).temperature_at_limit


def test_nothing_and_what_is_not_finite_have_no_temperature():
    logits, label = drawn(n=10)
    assert math.isnan(calibration.fit_temperature(logits[:0], label[:0]))
    logits[3, 2] = np.nan
    assert math.isnan(calibration.fit_temperature(logits, label))
    found = calibration.calibrate(predictions(logits, label))
    assert math.isnan(found.calibration_error_after)
    assert not found.temperature_at_limit
    single = calibration.calibrate(predictions(*drawn(n=1)))  # no other image to fit on
    assert math.isnan(single.calibration_error_after)
