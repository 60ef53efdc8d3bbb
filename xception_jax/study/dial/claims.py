"""Tests the claims of the dial study, H1 to H5, and of its second run, D1 to D4.

The unit is the seed: banks, images and initial parameters are drawn anew for each. All arms of a seed face the same
banks and test images, so their differences are analysed. This was chosen beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float

from xception_jax.study.dial.design import REGULAR, DialStudy
from xception_jax.study.dial.results import DialResults
from xception_jax.study.inference import slope_weights
from xception_jax.study.seed_claims import SeedClaim, Seeds, evaluate, median_part_of, part_of
from xception_jax.study.verdicts import TestedClaim, TestedPart

DEPTHWISE, POINTWISE = "depthwise_first", "pointwise_first"
REGULAR_8, DEPTHWISE_8 = "regular_8", "depthwise_first_8"
REGULAR_WIDE, DEPTHWISE_WIDE = "regular_wide", "depthwise_first_wide"
REGULAR_LONG, DEPTHWISE_LONG = "regular_long", "depthwise_first_long"
DEPTHWISE_6 = "depthwise_first_multiplier_6"
DEPTHWISE_ENDS, POINTWISE_ENDS = "depthwise_first_ends", "pointwise_first_ends"
SEGMENTS = {"segments_1": 1, "segments_2": 2, "segments_4": 4, DEPTHWISE: 12}
"""Arms with the spatial convolution first, by the segments of the image's 12 channels."""

SLOPE = "points per unit of the dial"

MakePart = Callable[[str, Seeds, str, float], TestedPart]


def _order(results: DialResults, part: MakePart = part_of, across: str = "above") -> Iterator[TestedPart]:
    """Yields the parts about the two orders; `across` is the side of the margin on which across_0 is claimed to be."""
    margin = results.study.margin
    for bank, side, bound in (("across_0", across, margin), ("within_0", "below", -margin)):
        values = results.accuracy(DEPTHWISE, bank) - results.accuracy(POINTWISE, bank)
        yield part(f"depthwise first - pointwise first, {bank}", values, side, bound)


def _price(results: DialResults) -> Iterator[TestedPart]:
    slopes = _slopes(results, DEPTHWISE, REGULAR)
    yield part_of("slope of depthwise first - regular over the dial across", slopes, "below", 0.0, SLOPE)
    values = results.accuracy(DEPTHWISE, "across_0") - results.accuracy(REGULAR, "across_0")
    yield part_of("depthwise first - regular, across_0", values, "within", results.study.margin)


def _segments(results: DialResults) -> Iterator[TestedPart]:
    slopes = _slope_of_segments(results, lambda accuracy: np.log2(list(SEGMENTS.values()))[accuracy.argmax(1)])
    if slopes is not None:
        name = "slope of log2 of the best number of segments over the dial across"
        yield part_of(name, slopes, "below", 0.0, unit="")


def _slope_of_segments(results: DialResults, choose: Callable[[np.ndarray], np.ndarray]) -> Seeds | None:
    """Returns the slope over the dial across, for each seed, of what `choose` chooses by the accuracies.

    Args:
      results: all records.
      choose: takes accuracies [banks, arms of `SEGMENTS`, seeds] and returns a number for each [bank, seed].

    Returns:
      The slopes, or None if the study has fewer than two banks for them.
    """
    banks = [bank.name for bank in results.dial_of("across", *SEGMENTS)]
    if len(banks) < 2:
        return None
    accuracy = np.stack([[results.accuracy(arm, bank) for arm in SEGMENTS] for bank in banks])
    chosen = np.where(np.isnan(accuracy).any(1), np.nan, choose(accuracy))
    return _slope(_positions(results, banks), chosen)


def beside_claims(results: DialResults) -> dict[str, tuple[Seeds, str]]:
    """Returns numbers that help to read the claims. They were chosen before any counted accuracy was known.

    For H1, depthwise first with as many spatial filters as pointwise first; for H2, what is left of its slope with
    twice the steps; for H3, numbers that tell more where chance chooses among equally good numbers of segments.

    Returns:
      (the value of each seed, its unit as in `TestedPart`) by name.
    """
    found: dict[str, tuple[Seeds, str]] = {}
    arms = {row.arm.name for row in results.study.rows}
    if {DEPTHWISE_6, POINTWISE} <= arms:
        found |= {name: (values, "points") for name, values in _six_filters_minus_pointwise(results)}
    if {REGULAR_LONG, DEPTHWISE_LONG} <= arms:
        common = [bank.name for bank in results.dial_of("across", DEPTHWISE_LONG, REGULAR_LONG, DEPTHWISE, REGULAR)]
        long, usual = (
            _slopes(results, *pair, common) for pair in ((DEPTHWISE_LONG, REGULAR_LONG), (DEPTHWISE, REGULAR))
        )
        found["slope of depthwise first - regular with twice the steps"] = long, SLOPE
        found["the same, minus the slope with the usual steps"] = long - usual, SLOPE
    if set(SEGMENTS) <= arms:
        values = results.accuracy(DEPTHWISE, "across_0") - results.accuracy("segments_1", "across_0")
        found["depthwise first - segments_1, across_0"] = values, "points"

    def largest(accuracy: np.ndarray) -> np.ndarray:
        good = accuracy >= accuracy.max(1, keepdims=True) - results.study.margin
        return np.where(good, np.log2(list(SEGMENTS.values()))[:, None], -np.inf).max(1)

    slopes = _slope_of_segments(results, largest)
    if slopes is not None:
        name = "slope of log2 of the largest number of segments within the margin of the best, over the dial across"
        found[name] = slopes, ""
    return found


def _depth(results: DialResults) -> Iterator[TestedPart]:
    pairs = ((DEPTHWISE, REGULAR), (DEPTHWISE_8, REGULAR_8), (DEPTHWISE_WIDE, REGULAR_WIDE))
    common = tuple(bank.name for bank in results.dial_of("across", *itertools.chain(*pairs)))
    two, eight, wide = (_slopes(results, *pair, common) for pair in pairs)
    yield part_of("slope of depthwise first - regular at two blocks", two, "below", 0.0, SLOPE)
    yield part_of("slope at eight blocks - half of the slope at two", eight - two / 2, "above", 0.0, SLOPE)
    yield part_of("slope at eight blocks - slope at two blocks that cost as much", eight - wide, "above", 0.0, SLOPE)


def _ends(results: DialResults, part: MakePart = part_of) -> Iterator[TestedPart]:
    for bank in ("across_0", "within_0"):
        values = results.accuracy(DEPTHWISE_ENDS, bank) - results.accuracy(POINTWISE_ENDS, bank)
        yield part(f"order with a pointwise layer at both ends, {bank}", values, "within", results.study.margin)


def _six_filters_minus_pointwise(results: DialResults) -> Iterator[tuple[str, Seeds]]:
    for bank in ("across_0", "within_0"):
        values = results.accuracy(DEPTHWISE_6, bank) - results.accuracy(POINTWISE, bank)
        yield f"depthwise first with six filters for each channel - pointwise first, {bank}", values


def _six_filters(results: DialResults) -> Iterator[TestedPart]:
    for name, values in _six_filters_minus_pointwise(results):
        yield median_part_of(name, values, "within", results.study.margin)


def _price_with_ends(results: DialResults) -> Iterator[TestedPart]:
    values = results.accuracy(DEPTHWISE_ENDS, "free") - results.accuracy(REGULAR, "free")
    yield median_part_of(
        "depthwise first with a pointwise layer at both ends - regular, free", values, "within", results.study.margin
    )


def _slopes(results: DialResults, arm: str, baseline: str, banks: Sequence[str] | None = None) -> Seeds:
    """Returns, for each seed, the least-squares slope of a difference in accuracy over the measured dial across.

    The banks are by default all on which both arms are trained.
    """
    if banks is None:
        banks = [bank.name for bank in results.dial_of("across", arm, baseline)]
    if len(banks) < 2:
        return np.full(len(results.study.seeds), np.nan)
    effects = np.stack([results.accuracy(arm, bank) - results.accuracy(baseline, bank) for bank in banks])
    return _slope(_positions(results, banks), effects)


def _positions(results: DialResults, banks: Sequence[str]) -> Float[np.ndarray, "banks seeds"]:
    return np.stack([results.of_banks("across", bank) for bank in banks])


def _slope(x: Float[np.ndarray, "banks seeds"], y: Float[np.ndarray, "banks seeds"]) -> Seeds:
    slope = (slope_weights(x) * y).sum(0)
    return np.where(np.ptp(y, axis=0) == 0, 0.0, slope)  # exactly: rounding must not decide a claim with a bound of 0


FIRST: dict[str, SeedClaim[DialResults]] = {
    "H1": SeedClaim(
        "On banks that are separable across filters, depthwise first is better than pointwise first by more than one "
        "percentage point; on banks that are separable within filters, it is worse by more than one point.",
        _order,
        (DEPTHWISE, POINTWISE),
    ),
    "H2": SeedClaim(
        "Along the dial across filters, the accuracy of depthwise first minus that of the regular network falls; at "
        "the separable end the two are equivalent within one point.",
        _price,
        (DEPTHWISE, REGULAR),
    ),
    "H3": SeedClaim(
        "With the spatial convolution first, the best number of segments falls along the dial across filters.",
        _segments,
        tuple(SEGMENTS),
    ),
    "H4": SeedClaim(
        "At eight blocks, the slope of H2 is less than half of that at two blocks, which is below zero; and it is less "
        "steep than at two blocks that cost as much as the eight.",
        _depth,
        (DEPTHWISE, REGULAR, DEPTHWISE_8, REGULAR_8, DEPTHWISE_WIDE, REGULAR_WIDE),
    ),
    "H5": SeedClaim(
        "With a pointwise layer at both ends of the network, the two orders are equivalent within one point on the "
        "banks of H1.",
        _ends,
        (DEPTHWISE_ENDS, POINTWISE_ENDS),
    ),
}

SECOND: dict[str, SeedClaim[DialResults]] = {
    "D1": SeedClaim(
        "In the median over seeds, the two orders are equivalent within one percentage point on banks that are "
        "separable across filters, and depthwise first is worse by more than one point on banks that are separable "
        "within filters.",
        partial(_order, part=median_part_of, across="within"),
        (DEPTHWISE, POINTWISE),
    ),
    "D2": SeedClaim(
        "In the median, depthwise first with six filters for each channel is equivalent to pointwise first, within one "
        "point, on across_0 and on within_0.",
        _six_filters,
        (DEPTHWISE_6, POINTWISE),
    ),
    "D3": SeedClaim(
        "In the median, with a pointwise layer at both ends of the network, the two orders are equivalent within one "
        "point on across_0 and on within_0.",
        partial(_ends, part=median_part_of),
        (DEPTHWISE_ENDS, POINTWISE_ENDS),
    ),
    "D4": SeedClaim(
        "In the median, depthwise first with a pointwise layer at both ends is equivalent to the regular network, "
        "within one point, on free banks.",
        _price_with_ends,
        (DEPTHWISE_ENDS, REGULAR),
    ),
}

CLAIMS = FIRST | SECOND


def unknown_claims(study: DialStudy) -> list[str]:
    """Returns the codes of the claims that cannot be tested, because `CLAIMS` lacks them or states another text."""
    return [code for code, text in study.hypotheses.items() if code not in CLAIMS or CLAIMS[code].text != text]


def evaluate_claims(results: DialResults) -> tuple[TestedClaim, ...]:
    """Tests the claims that a study states. A claim that lacks a cell, or an arm, is not tested."""
    stated = {code: CLAIMS[code] for code in results.study.hypotheses if code in CLAIMS}
    return evaluate(stated, results, [row.arm.name for row in results.study.rows])
