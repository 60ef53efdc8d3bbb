"""Tests the claims of the dial study, H1 to H5.

The unit is the seed: banks, images and initial parameters are drawn anew for each. All arms of a seed face the same
banks and test images, so their differences are analysed. This was chosen beforehand.

A claim consists of parts, each a mean over seeds that is said to lie above or below a bound, or within a margin. A part
holds if the whole 95 % t interval lies where the claim says, and fails if the whole interval lies elsewhere. A claim is
supported if all of its parts hold (an intersection-union test) and its p-value, corrected by Holm's method over the
claims, is below 0.05; it is contradicted if a part fails; otherwise it is undecided.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from xception_jax.study.dial.design import REGULAR
from xception_jax.study.dial.results import DialResults
from xception_jax.study.statistics import Estimate, estimate, region_p, region_state
from xception_jax.study.tested_claims import Seeds, decide

DEPTHWISE, POINTWISE = "depthwise_first", "pointwise_first"
REGULAR_8, DEPTHWISE_8 = "regular_8", "depthwise_first_8"
REGULAR_WIDE, DEPTHWISE_WIDE = "regular_wide", "depthwise_first_wide"
DEPTHWISE_ENDS, POINTWISE_ENDS = "depthwise_first_ends", "pointwise_first_ends"
SEGMENTS = {"segments_1": 1, "segments_2": 2, "segments_4": 4, DEPTHWISE: 12}
"""Arms with the spatial convolution first, by the segments of the image's 12 channels."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a claim.

    Attributes:
      name: what is estimated.
      values: one for each seed.
      side: 'above', 'below' or 'within'.
      bound: bound of the claim; within means from -bound to bound.
      points: whether the values are shares, which are shown in percentage points.
    """

    name: str
    values: Seeds
    side: str
    bound: float
    points: bool = True

    @property
    def estimate(self) -> Estimate:
        """Returns the mean over seeds and its interval."""
        return estimate(self.values)

    @property
    def state(self) -> str:
        """Returns 'holds', 'fails' or 'open'."""
        return region_state(self.estimate, self.side, self.bound)

    @property
    def p(self) -> float:
        """Returns the one-sided p-value of the claim; that of two one-sided tests for 'within'."""
        return region_p(self.estimate, self.side, self.bound)

    def to_json(self) -> dict[str, Any]:
        """Returns claim, state and estimate as plain data; NaN is None."""
        stated = {"name": self.name, "side": self.side, "bound": self.bound, "state": self.state}
        return stated | self.estimate.to_json()


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim that can be tested.

    Attributes:
      text: the claim, as it is stated beforehand.
      arms: names of the arms that it needs.
      parts: computes its parts from the results.
    """

    text: str
    arms: tuple[str, ...]
    parts: Callable[[DialResults], Iterator[Part]]


@dataclasses.dataclass(frozen=True)
class Tested:
    """A claim and its outcome.

    Attributes:
      code: such as 'H1'.
      claim: the claim.
      parts: its parts; empty if arms or banks are missing.
      p_holm, verdict: see `tested_claims.decide`.
    """

    code: str
    claim: Claim
    parts: tuple[Part, ...]
    p_holm: float
    verdict: str


def _order(results: DialResults) -> Iterator[Part]:
    for bank, side, bound in (
        ("across_0", "above", results.study.margin),
        ("within_0", "below", -results.study.margin),
    ):
        values = results.accuracy(DEPTHWISE, bank) - results.accuracy(POINTWISE, bank)
        yield Part(f"depthwise first - pointwise first, {bank}", values, side, bound)


def _price(results: DialResults) -> Iterator[Part]:
    slopes = _slopes(results, DEPTHWISE, REGULAR)
    yield Part("slope of depthwise first - regular over the dial across", slopes, "below", 0.0)
    values = results.accuracy(DEPTHWISE, "across_0") - results.accuracy(REGULAR, "across_0")
    yield Part("depthwise first - regular, across_0", values, "within", results.study.margin)


def _segments(results: DialResults) -> Iterator[Part]:
    banks = [bank.name for bank in results.dial_of("across", *SEGMENTS)]
    if len(banks) < 2:
        return
    accuracy = np.stack([[results.accuracy(arm, bank) for arm in SEGMENTS] for bank in banks])  # [banks, arms, seeds]
    best = np.log2(np.array(list(SEGMENTS.values())))[accuracy.argmax(1)]
    best[np.isnan(accuracy).any(1)] = np.nan
    slopes = _slope(_positions(results, banks), best)
    yield Part("slope of log2 of the best number of segments over the dial across", slopes, "below", 0.0, points=False)


def _depth(results: DialResults) -> Iterator[Part]:
    pairs = ((DEPTHWISE, REGULAR), (DEPTHWISE_8, REGULAR_8), (DEPTHWISE_WIDE, REGULAR_WIDE))
    common = tuple(bank.name for bank in results.dial_of("across", *itertools.chain(*pairs)))
    two, eight, wide = (_slopes(results, *pair, common) for pair in pairs)
    yield Part("slope of depthwise first - regular at two blocks", two, "below", 0.0)
    yield Part("slope at eight blocks - half of the slope at two", eight - two / 2, "above", 0.0)
    yield Part("slope at eight blocks - slope at two blocks that cost as much", eight - wide, "above", 0.0)


def _ends(results: DialResults) -> Iterator[Part]:
    for bank in ("across_0", "within_0"):
        values = results.accuracy(DEPTHWISE_ENDS, bank) - results.accuracy(POINTWISE_ENDS, bank)
        yield Part(f"order with a pointwise layer at both ends, {bank}", values, "within", results.study.margin)


def _slopes(results: DialResults, arm: str, baseline: str, banks: Sequence[str] = ()) -> Seeds:
    """Returns, for each seed, the least-squares slope of a difference in accuracy over the measured dial across."""
    banks = banks or [bank.name for bank in results.dial_of("across", arm, baseline)]
    if len(banks) < 2:
        return np.full(len(results.study.seeds), np.nan)
    effects = np.stack([results.accuracy(arm, bank) - results.accuracy(baseline, bank) for bank in banks])
    return _slope(_positions(results, banks), effects)


def _positions(results: DialResults, banks: Sequence[str]) -> Float[np.ndarray, "banks seeds"]:
    return np.stack([results.of_banks("across", bank) for bank in banks])


def _slope(x: Float[np.ndarray, "banks seeds"], y: Float[np.ndarray, "banks seeds"]) -> Seeds:
    centred = x - x.mean(0)
    return (centred * y).sum(0) / np.square(centred).sum(0)


CLAIMS = {
    "H1": Claim(
        "On banks that are separable across filters, depthwise first is better than pointwise first by more than one "
        "percentage point; on banks that are separable within filters, it is worse by more than one point.",
        (DEPTHWISE, POINTWISE),
        _order,
    ),
    "H2": Claim(
        "Along the dial across filters, the accuracy of depthwise first minus that of the regular network falls; at "
        "the separable end the two are equivalent within one point.",
        (DEPTHWISE, REGULAR),
        _price,
    ),
    "H3": Claim(
        "With the spatial convolution first, the best number of segments falls along the dial across filters.",
        tuple(SEGMENTS),
        _segments,
    ),
    "H4": Claim(
        "At eight blocks, the slope of H2 is less than half of that at two blocks, which is below zero; and it is less "
        "steep than at two blocks that cost as much as the eight.",
        (DEPTHWISE, REGULAR, DEPTHWISE_8, REGULAR_8, DEPTHWISE_WIDE, REGULAR_WIDE),
        _depth,
    ),
    "H5": Claim(
        "With a pointwise layer at both ends of the network, the two orders are equivalent within one point on the "
        "banks of H1.",
        (DEPTHWISE_ENDS, POINTWISE_ENDS),
        _ends,
    ),
}


def evaluate_claims(results: DialResults) -> list[Tested]:
    """Tests all claims whose arms the study has. Seeds with missing cells are left out."""
    arms = {row.arm.name for row in results.study.rows}
    parts = {code: tuple(claim.parts(results)) if set(claim.arms) <= arms else () for code, claim in CLAIMS.items()}
    decided = decide(parts)
    return [Tested(code, CLAIMS[code], found, *decided[code]) for code, found in parts.items()]
