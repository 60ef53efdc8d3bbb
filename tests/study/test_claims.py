"""Claims about several arms, on arms whose accuracies are known."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from tests.study.simulated import small_study, write_simulated
from xception_jax.errors import ConfigError
from xception_jax.study.analysis import Sample
from xception_jax.study.checks import check_study
from xception_jax.study.claims import Claim, Part
from xception_jax.study.collect import collect
from xception_jax.study.inference import estimate, holm
from xception_jax.study.seed_claims import median_part_of, part_of
from xception_jax.study.tested_claims import Measured, evaluate_claims
from xception_jax.study.verdicts import TestedPart, decide

RNG = np.random.default_rng(0)
SAMPLES = {
    name: Sample((right := RNG.random((6, 300)) < share).mean(1), right)
    for name, share in {"a": 0.9, "b": 0.7, "c": 0.5, "d": 0.3, "zero": 0.9}.items()
}
MEASURED = Measured(SAMPLES, {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0, "zero": 0.0}, "points per doubling")
LINE = tuple((name, "", 1.0) for name in "abcd")


@pytest.mark.parametrize(
    ("part", "verdict"),
    [
        (Part("difference", (("a", "b", 1.0),), "above", 0.1), "supported"),
        (Part("difference", (("a", "b", 1.0),), "below", 0.1), "contradicted"),
        (Part("mean", (("a", "b", 0.5), ("c", "d", 0.5)), "above", 0.1), "supported"),
        (Part("slope", LINE, "below", -0.15, "slope"), "supported"),
        (Part("slope", LINE, "above", 0.0, "slope"), "contradicted"),
    ],
)
def test_known_effects(part, verdict):
    claim = Claim("X", "It is so.", (part,))
    assert evaluate_claims((claim,), MEASURED, "welch", set())[0].verdict == verdict
    assert evaluate_claims((claim,), MEASURED, "welch", {part.terms[0][0]})[0].verdict == "not interpreted"


@pytest.mark.parametrize("analysis", ["paired", "welch", "pooled"])
def test_a_claim_waits_for_all_seeds_of_its_arms(analysis):
    """Those that are left after some have diverged are not those that were planned."""
    gap = SAMPLES["b"].accuracy.copy()
    gap[2] = np.nan
    measured = dataclasses.replace(MEASURED, samples=SAMPLES | {"b": Sample(gap)})
    parts = (Part("ab", (("a", "b", 1.0),), "above", 0.1),), (Part("ac", (("a", "c", 1.0),), "above", 0.1),)
    claims = tuple(Claim(code, "It is so.", part) for code, part in zip("XY", parts, strict=True))
    found = evaluate_claims(claims, measured, analysis, set())
    assert [(tested.verdict, len(tested.parts)) for tested in found] == [("not tested", 0), ("supported", 1)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"terms": (("nobody", "", 1.0),)}, "nobody"),
        ({"side": "left"}, "side is 'left'"),
        ({"measure": "slope"}, "has 1 terms"),
        ({"measure": "guess"}, "measure is 'guess'"),
        ({"bound": float("nan")}, "bound is nan"),
        ({"terms": (("1_relu", "1_relu", 1.0),)}, "its terms cancel"),
    ],
)
def test_a_claim_that_makes_no_sense_is_refused(fields, words):
    part = dataclasses.replace(Part("p", (("1_relu", "1_none", 1.0),), "above", 0.0), **fields)
    with pytest.raises(ConfigError, match=words):
        check_study(small_study(claims=(Claim("X", "It is so.", (part,)),)), "a test")


def test_claims_are_corrected_as_one_family():
    """Also for those that cannot be tested, which would otherwise make the others easier to support."""
    found = estimate(np.array([0.02, 0.05, 0.03, 0.01, 0.04]))
    part = TestedPart("a", found, "above", found.low - 1e-4)  # the interval just lies above: p is a little below 0.025
    assert 0.02 < part.p < 0.025
    assert decide({"A": ""}, {"A": [part]})[0].verdict == "supported"
    family = decide(dict.fromkeys("ABC", ""), {"A": [part], "B": [part], "C": []})
    assert [claim.verdict for claim in family] == ["undecided", "undecided", "not tested"]
    assert family[0].p_holm == pytest.approx(3 * part.p)


def test_a_contradiction_has_a_corrected_p_value_too():
    """One-sided, times the parts of the claim (two sides for 'within'), then Holm's over the claims."""
    x = np.array([0.02, 0.05, 0.03, 0.01, 0.04])
    above, below = (
        scipy.stats.ttest_1samp(x, bound, alternative=side).pvalue
        for bound, side in ((0.01, "greater"), (0.08, "less"))
    )
    signs = scipy.stats.binomtest(5, 5, 0.5, alternative="greater").pvalue
    parts = {
        "below": [part_of("a", x, "below", 0.01)],
        "above": [part_of("a", x, "above", 0.08), part_of("b", x, "above", 0.0)],
        "within": [part_of("a", x, "within", 0.01)],
        "median": [median_part_of("a", x, "above", 0.08)],
        "not tested": [],
    }
    assert [part.p_contrary for part in parts["above"]] == pytest.approx([below, 1 - parts["above"][1].p])
    p = {"below": above, "above": 2 * below, "within": 2 * above, "median": signs, "not tested": math.nan}
    found = decide(dict.fromkeys(parts, ""), parts)
    assert [claim.p_contrary for claim in found] == pytest.approx(holm(list(p.values())), nan_ok=True)
    assert found[1].verdict == "contradicted"
    assert found[1].p_text == f"{found[1].p_contrary:.4f} (contrary)"
    assert "contrary" not in found[4].p_text


def test_a_slope_is_per_doubling_on_an_axis_of_channels(tmp_path):
    """The simulated effect rises by 0.004 for each doubling."""
    arms = ("1", "2", "4", "8", "16", "depthwise")
    terms = tuple((f"{arm}_relu", f"{arm}_none", 1.0) for arm in arms)
    claim = Claim("X", "It rises.", (Part("slope", terms, "above", 0.002, "slope"),))
    study = small_study(seeds=(0, 1, 2), comparisons=(), interactions=())
    found = collect(write_simulated(tmp_path, dataclasses.replace(study, claims=(claim,))))
    (part,) = found.claims[0].parts
    assert part.estimate.mean == pytest.approx(0.004, abs=0.001)
    assert part.unit == "points per doubling"
    assert np.mean(part.seeds) == pytest.approx(part.estimate.mean)
