import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import DescrStatsW

from xception_jax.study import inference
from xception_jax.study.inference import Estimate

DIFFERENCES = np.random.default_rng(1).normal(0.002, 0.004, (6, 5))


@pytest.mark.parametrize("values", list(DIFFERENCES), ids=range(6))
def test_t_interval_and_p_are_scipy_s(values):
    ours, theirs = inference.estimate(values), scipy.stats.ttest_1samp(values, 0)
    interval = theirs.confidence_interval(0.95)
    np.testing.assert_allclose((ours.low, ours.high, ours.p), (*interval, theirs.pvalue), rtol=1e-12)
    assert (ours.mean, ours.sd, ours.n) == (values.mean(), pytest.approx(values.std(ddof=1)), 5)


def test_rounding_is_no_difference():
    assert inference.estimate([3e-18, 4e-18, 3e-18]).p == 1.0
    assert inference.from_error(-2e-16, 1e-17, 4, n=5).high == 0.0


def test_the_bootstrap_is_scipy_s():
    values = np.random.default_rng(2).normal(0, 1, 40)
    ours = inference.estimate(values)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0)
    np.testing.assert_allclose((ours.bootstrap_low, ours.bootstrap_high), theirs.confidence_interval, atol=0.02)


def test_holm_is_statsmodels_():
    for p in np.random.default_rng(3).uniform(0, 0.2, (5, 7)):
        np.testing.assert_allclose(inference.holm(p), multipletests(p, method="holm")[1], rtol=1e-12)


def test_holm_counts_what_could_not_be_compared():
    with_gap = inference.holm([0.01, math.nan, 0.04])
    assert math.isnan(with_gap[1])
    assert [with_gap[0], with_gap[2]] == inference.holm([0.01, 0.04, 1.0])[:2] == [0.03, 0.08]
    assert inference.holm([]) == []


@pytest.mark.parametrize("values", list(DIFFERENCES), ids=range(6))
def test_equivalence_is_statsmodels_tost(values):
    theirs = DescrStatsW(values).ttost_mean(-0.005, 0.005)[0]
    assert inference.tost_p(inference.estimate(values), 0.005) == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_smallest_effect_is_statsmodels_power(n):
    theirs = TTestPower().solve_power(None, n, 0.05, 0.8)
    assert inference.smallest_effect(0.004 / n**0.5, n - 1) == pytest.approx(0.004 * float(theirs), rel=1e-4)


def test_too_few_values():
    one, none = inference.estimate([0.5, math.nan]), inference.estimate([math.nan])
    assert (one.mean, one.n, none.n) == (0.5, 1, 0)
    assert all(math.isnan(value) for value in (one.sd, one.low, one.p, none.mean, none.bootstrap_high))
    assert inference.verdict(one, 0.01, one.p) == inference.verdict(none, 0.01, none.p) == "undecided"
    assert math.isnan(inference.tost_p(inference.estimate([0.1]), 0.2))


def test_equal_differences():
    same = inference.estimate([0.02, 0.02, 0.02])
    assert (same.low, same.high, same.p) == (0.02, 0.02, 0.0)
    assert inference.estimate([0.0, 0.0]).p == 1.0
    assert inference.tost_p(inference.estimate([0.02, 0.02]), 0.01) == 1.0
    assert inference.tost_p(inference.estimate([0.0, 0.0]), 0.01) == 0.0


def between(low, high):
    return Estimate((low + high) / 2, 1.0, 5, low, high, low, high, 0.0)


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict"),
    [
        (0.001, 0.02, 0.01, "better"),
        (0.001, 0.02, 0.06, "undecided"),  # Holm
        (-0.02, -0.001, 0.01, "worse"),
        (-0.004, 0.004, 0.9, "equivalent"),
        (0.001, 0.004, 0.001, "equivalent"),  # surely positive, and surely too small to matter
        (-0.006, 0.004, 0.9, "undecided"),
        (0.006, 0.01, 0.001, "better"),
        (0.0, 0.02, 0.04, "undecided"),
    ],
)
def test_verdict(low, high, p, verdict):
    assert inference.verdict(between(low, high), 0.005, p) == verdict


def over_seeds(effects):
    """Returns the estimator of weighted sums of effects [seeds, points]."""
    return lambda weights: inference.estimate(effects @ weights)


def test_a_trend_is_the_mean_of_the_seeds_slopes():
    x, effects = np.array([0.0, 1.0, 3.0, 5.0]), np.random.default_rng(4).normal(0, 1, (6, 4))
    trend = inference.trend(x, over_seeds(effects))
    slopes = [scipy.stats.linregress(x, row).slope for row in effects]
    np.testing.assert_allclose(dataclasses.astuple(trend.slope), dataclasses.astuple(inference.estimate(slopes)))
    assert trend.contrast == inference.estimate(effects[:, 3] - effects[:, 0])
    reverse = inference.trend(x[::-1], over_seeds(effects[:, ::-1]))
    assert reverse.slope.mean == pytest.approx(trend.slope.mean)
    assert reverse.first == trend.first
    with pytest.raises(ValueError, match="different positions"):
        inference.trend([1.0, 1.0], over_seeds(effects[:, :2]))


def test_a_change_of_sign_needs_the_slope_and_both_ends():
    x, noise = np.array([0.0, 1.0, 2.0]), np.random.default_rng(5).normal(0, 0.02, (5, 3))
    assert inference.trend(x, over_seeds(x - 1 + noise)).flips == "rises through zero"
    assert inference.trend(x, over_seeds(1 - x + noise)).flips == "falls through zero"
    assert inference.trend(x, over_seeds(x + noise)).flips == "no"  # rises from zero
    assert inference.trend(x, over_seeds(x + 1 + noise)).flips == "no"
    assert inference.trend(x, over_seeds(noise)).flips == "no"


def test_intervals_cover_and_false_positives_are_rare():
    """2,000 studies whose truth is known; `tools.simulate_statistics` measures more."""
    from xception_jax.tools.simulate_statistics import measure

    found = measure(studies=2_000, seeds=5, comparisons=6)
    assert found["coverage_t"] == pytest.approx(0.95, abs=0.01)
    assert 0.78 < found["coverage_bootstrap"] < 0.88  # as it is known to be for five values: verdicts do not rest on it
    assert found["family_error_uncorrected"] > 0.2
    assert found["family_error_holm"] <= 0.06
    assert found["false_equivalence_at_margin"] <= 0.035
    assert found["false_flip"] <= 0.035
    assert found["flip_found"] > 0.9


@pytest.mark.parametrize(("side", "alternative"), [("above", "greater"), ("below", "less")])
def test_the_p_of_a_one_sided_claim_is_that_of_scipy(side, alternative):
    values = np.array([0.012, 0.02, 0.004, 0.017])
    expected = scipy.stats.ttest_1samp(values, 0.01, alternative=alternative).pvalue
    found = inference.estimate(values)
    assert inference.region_p(found, side, 0.01) == pytest.approx(expected)
    assert inference.region_p(found, "within", 0.05) == inference.tost_p(found, 0.05)
    equal = inference.estimate(np.full(3, 0.5))
    assert inference.region_p(equal, side, 0.25) == (0 if side == "above" else 1)


@pytest.mark.parametrize(("n", "kth"), [(6, 1), (10, 2), (20, 6)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(n, kth):
    x = np.arange(float(n))
    found = inference.estimate_median(x[::-1])
    assert (found.mean, found.low, found.high) == (np.median(x), x[kth - 1], x[-kth])
    assert math.isnan(inference.estimate_median(x[:5]).low)  # five values cannot tell
    assert scipy.stats.binomtest(kth - 1, n).pvalue <= 0.05 < scipy.stats.binomtest(kth, n).pvalue


@pytest.mark.parametrize(("side", "bound", "hits"), [("above", 1, 9), ("below", 7, 7), ("within", 8.5, 9)])
def test_p_values_of_medians_are_those_of_scipy(side, bound, hits):
    x = np.array([1.5, 2.0, 3.0, 4.0, 5.0, 6.5, 7.5, 8.0, 9.0, 0.5])
    assert inference.sign_p(x, side, bound) == pytest.approx(
        scipy.stats.binomtest(hits, 10, alternative="greater").pvalue
    )
