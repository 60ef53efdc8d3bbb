"""The ways to compare two arms: against SciPy and statsmodels, and on simulated studies whose truth is known."""

import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.power import TTestIndPower

from xception_jax.study.analysis import ANALYSES, Sample, crossed, crossed_pairs, image_variance, resample_images
from xception_jax.study.power import MAX_SEEDS, seeds_needed

RNG = np.random.default_rng(0)
A, B, C = (Sample(RNG.normal(mean, sd, 6)) for mean, sd in ((0.9, 0.004), (0.89, 0.01), (0.88, 0.006)))
GAP = Sample(np.array([*B.accuracy[:4], np.nan, B.accuracy[5]]))


def compare(name, arm, baseline, *others):
    """Compares two arms of a study that may have others."""
    samples = dict(enumerate((arm, baseline, *others)))
    return ANALYSES[name]({0: 1.0, 1: -1.0}, samples)


def test_the_error_of_the_images_does_not_depend_on_the_seeds():
    """Images differ in difficulty, and each cell errs on others besides. Only the former stays with many seeds."""
    rng, images = np.random.default_rng(0), 400
    of_images = rng.uniform(0.5, 0.9, (50, 2, 1, images))  # chance of being right, by study and arm
    truth = (of_images[:, 0] - of_images[:, 1]).var(-1).mean() / images
    for seeds in (2, 12):
        right = rng.random((50, 2, seeds, images)) < of_images
        found = [image_variance({0: a, 1: b}, {0: 1.0, 1: -1.0}) for a, b in right.astype(float)]
        assert np.mean(found) == pytest.approx(truth, rel=0.25 if seeds == 2 else 0.1)


@pytest.mark.parametrize("baseline", [B, GAP], ids=["complete", "gap"])
@pytest.mark.parametrize(("name", "equal_var"), [("welch", False), ("pooled", True)])
def test_independent_seeds_are_scipy_s(name, equal_var, baseline):
    ours = compare(name, A, baseline)
    theirs = scipy.stats.ttest_ind(A.known, baseline.known, equal_var=equal_var)
    interval = theirs.confidence_interval(0.95)
    assert (ours.low, ours.high, ours.p) == pytest.approx((interval.low, interval.high, theirs.pvalue))
    assert ours.df == pytest.approx(theirs.df)


def test_pairs_are_scipy_s():
    ours = compare("paired", A, GAP)
    both = np.isfinite(GAP.accuracy)
    assert ours.p == pytest.approx(scipy.stats.ttest_rel(A.accuracy[both], GAP.accuracy[both]).pvalue)
    assert ours.n == 5


@pytest.mark.parametrize("name", ANALYSES)
def test_weights_are_those_of_a_sum(name):
    whole, other = answers(1, 0.3, 0.05), answers(2, 0.3, 0.05)
    samples = {"a": whole, "b": other}
    one = ANALYSES[name]({"a": 1.0, "b": -1.0}, samples)
    three = ANALYSES[name]({"a": 3.0, "b": -3.0}, samples)
    for field in ("mean", "sd", "error", "low", "bootstrap_low", "bootstrap_high"):
        assert getattr(three, field) == pytest.approx(3 * getattr(one, field))
    assert (three.df, three.p) == (pytest.approx(one.df), pytest.approx(one.p))


@pytest.mark.parametrize("name", ["welch", "pooled"])
def test_a_difference_of_differences_has_the_errors_of_four_means(name):
    found = ANALYSES[name]({"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}, dict(zip("abcd", (A, B, C, A), strict=True)))
    variances = [x.known.var(ddof=1) / 6 for x in (A, B, C, A)]
    assert found.mean == pytest.approx(2 * A.known.mean() - B.known.mean() - C.known.mean())
    assert found.error == pytest.approx(math.sqrt(sum(variances)))


def test_the_variance_of_every_arm_is_pooled():
    found = compare("pooled", A, B, C)
    values = [sample.known for sample in (A, B, C)]
    pooled = np.mean([x.var(ddof=1) for x in values])
    assert (found.error, found.df) == (pytest.approx(math.sqrt(pooled / 3)), 15)
    assert found.sd == pytest.approx(math.sqrt(2 * pooled))


@pytest.mark.parametrize("name", ANALYSES)
def test_too_few_cells_decide_nothing(name):
    nothing = Sample(np.array([math.nan, math.nan]))
    one = Sample(np.array([0.5, math.nan]), np.ones((1, 7), bool))
    for pair in ((nothing, one), (one, one), (one, nothing), (nothing, nothing)):
        found = compare(name, *pair)
        assert math.isnan(found.low)
        assert math.isnan(found.p)


def answers(draw, image, seed, seeds=4, images=500):
    """Answers of cells whose accuracy varies by the given amounts over images and seeds."""
    rng = np.random.default_rng(draw)
    level = 0.6 + image * rng.choice([-1, 1], images) + seed * rng.normal(0, 1, (seeds, 1))
    right = rng.uniform(0, 1, (seeds, images)) < level
    return Sample(right.mean(1), right, resample_images(right, 300))


def test_images_add_to_the_variance_of_seeds():
    arm, baseline = answers(1, 0.39, 0.001), answers(2, 0.39, 0.001)
    found, of_seeds = compare("crossed", arm, baseline), compare("welch", arm, baseline)
    assert found.mean == of_seeds.mean
    assert found.error > of_seeds.error
    assert found.sd == pytest.approx(of_seeds.sd)  # more seeds reduce only this
    assert found.df > of_seeds.df  # most of the variance comes from many images
    width = found.bootstrap_high - found.bootstrap_low
    assert width == pytest.approx(2 * 1.96 * found.error, rel=0.3)


def test_the_variance_of_seeds_and_images_counts_nothing_twice():
    arm, baseline = answers(1, 0.39, 0.01), answers(2, 0.39, 0.01)
    found, of_seeds = compare("crossed", arm, baseline), compare("welch", arm, baseline)
    cells = {name: sample.right.astype(float) for name, sample in (("a", arm), ("b", baseline))}
    of_images = image_variance(cells, {"a": 1.0, "b": -1.0})
    assert found.error**2 == pytest.approx(of_seeds.error**2 + of_images, rel=1e-9)


def test_pairs_cancel_what_both_arms_share():
    """Both arms see the same hard images and the same good and bad seeds; one seed of an arm is missing."""
    rng = np.random.default_rng(4)
    level = 0.6 + 0.3 * rng.choice([-1, 1], 500) + rng.choice([-0.05, 0.05], (12, 1))
    draws = rng.uniform(0, 1, (12, 500))
    right = {"a": draws < level + 0.1 * rng.choice([-1, 1], 500), "b": draws < level}
    accuracy = {name: values.mean(1) for name, values in right.items()}
    accuracy["b"][2] = math.nan
    right["b"] = np.delete(right["b"], 2, axis=0)
    samples = {name: Sample(accuracy[name], right[name], resample_images(right[name])) for name in right}
    weights = {"a": 1.0, "b": -1.0}
    found, apart = crossed_pairs(weights, samples), crossed(weights, samples)
    pairs = ANALYSES["paired"](weights, samples)
    assert (found.mean, found.n) == (pytest.approx(pairs.mean), 11)
    assert pairs.error < found.error < 0.5 * apart.error
    width = found.bootstrap_high - found.bootstrap_low
    assert 0.7 < width / (2 * 1.96 * found.error) < 2  # the bootstrap counts the noise of single answers twice


def test_the_bootstrap_resamples_seeds_too():
    """All images are equal, so that only the seeds differ."""
    right = np.repeat(np.random.default_rng(0).uniform(0, 1, (8, 1)) < 0.5, 400, axis=1)
    arm = Sample(right.mean(1), right, resample_images(right, 300))
    baseline = Sample(np.zeros(8), np.zeros_like(right), resample_images(np.zeros_like(right), 300))
    found = compare("crossed", arm, baseline)
    assert found.bootstrap_high - found.bootstrap_low > 0.3


def test_equal_answers_leave_no_difference():
    arm = answers(1, 0.1, 0.0)
    twins = Sample(np.full(3, arm.accuracy[0]), np.repeat(arm.right[:1], 3, axis=0))
    found = compare("crossed", twins, twins)
    assert (found.mean, found.error, found.p) == (0.0, 0.0, 1.0)


def test_resampled_images_are_the_same_for_all_cells():
    right = np.random.default_rng(2).uniform(0, 1, (3, 400)) < 0.7
    means = resample_images(np.vstack([right, right[:1]]), 200)
    assert means.shape == (200, 4)
    np.testing.assert_array_equal(means[:, 0], means[:, 3])
    np.testing.assert_allclose(means.mean(0)[:3], right.mean(1), atol=0.01)
    assert means[:, 0].std() == pytest.approx(math.sqrt(0.7 * 0.3 / 400), rel=0.2)


@pytest.mark.parametrize(("sd", "margin"), [(0.0041, 0.005), (0.0041, 0.003)])
def test_the_seeds_for_a_difference_are_statsmodels_power(sd, margin):
    theirs = TTestIndPower().solve_power(margin / sd, None, 0.05, 0.8)
    assert seeds_needed(sd, margin, paired=False)[1] == math.ceil(theirs)


def test_the_seeds_for_equivalence_are_those_of_a_simulation():
    sd, margin = 0.0041, 0.005
    equivalence, _ = seeds_needed(sd, margin, paired=True)
    rng = np.random.default_rng(3)

    def share(n):
        x = rng.normal(0, sd * math.sqrt(2), (20_000, n))
        half = scipy.stats.t.ppf(0.975, n - 1) * x.std(1, ddof=1) / math.sqrt(n)
        return (np.abs(x.mean(1)) + half < margin).mean()

    assert equivalence == 17
    assert share(equivalence - 2) < 0.8 < share(equivalence + 1)


def test_no_seeds_decide_less_than_the_images_allow():
    assert seeds_needed(0.004, 0.005, paired=False, images=0.004) == (None, None)
    few, many = (seeds_needed(0.004, 0.005, paired=False, images=error)[0] for error in (0.0, 0.001))
    assert few < many < MAX_SEEDS


def test_the_seeds_that_images_ask_for_are_those_of_a_simulation():
    """The error of the images is known, that of the seeds is estimated: Satterthwaite's degrees of freedom."""
    sd, margin, images = 0.004, 0.01, 0.003
    _, difference = seeds_needed(sd, margin, paired=False, images=images)
    rng = np.random.default_rng(3)

    def share(n):
        a, b = rng.normal(0, sd, (2, 20_000, n)) + np.array([margin, 0]).reshape(2, 1, 1)
        mean = a.mean(1) - b.mean(1) + rng.normal(0, images, 20_000)
        of_seeds = (a.var(1, ddof=1) + b.var(1, ddof=1)) / n
        variance = of_seeds + images**2
        half = scipy.stats.t.ppf(0.975, 2 * (n - 1) * (variance / of_seeds) ** 2) * np.sqrt(variance)
        return (mean > half).mean()

    assert share(difference - 1) < 0.8 < share(difference)
    assert difference == 9


def test_coverage_of_every_analysis():
    """250 studies; `tools.simulate_statistics` measures more. Four standard errors of a coverage of 0.95 are 0.055."""
    from xception_jax.tools.simulate_statistics import measure_analyses

    found = measure_analyses(studies=250, seeds=5)
    for name in ("paired", "welch", "pooled", "crossed"):
        assert found[name] == pytest.approx(0.95, abs=0.055), found
    assert found["paired_other_images"] < 0.9  # the interval does not cover other images
    assert found["crossed_bootstrap"] > 0.85
