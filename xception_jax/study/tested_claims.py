"""Tests the claims of a study.

A claim is tested once all cells of its arms are done. A part holds if the whole 95 % interval lies where the claim
says, and fails if the whole interval lies elsewhere. A claim is supported if all of its parts hold (an
intersection-union test, Berger 1982) and its p-value, the largest of its parts, is below 0.05 after Holm's correction
over all claims of the study. It is contradicted if a part fails. Otherwise it is undecided.

Sums and slopes are linear in the accuracies of the arms, so that the analysis of the study gives their error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from typing import Protocol

import numpy as np

from xception_jax.study.analysis import ANALYSES, Sample, of_differences
from xception_jax.study.claims import Claim, Part
from xception_jax.study.statistics import holm, region_p, region_state

NOT_INTERPRETED = "not interpreted"  # the outcome where an arm does not pass the gate
NOT_TESTED = "not tested"
_SIGNIFICANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements with which the claims of a study are tested.

    Attributes:
      samples: the finished cells of each arm.
      positions: positions of each arm on the axis; logarithms to base 2 on an axis of channels.
    """

    samples: Mapping[str, Sample]
    positions: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class TestedPart:
    """A part of a claim and its outcome.

    Attributes:
      part: the part.
      n: number of seeds.
      value, low, high: the estimate and its 95 % interval, in the unit of the part's bound.
      p: one-sided p-value of the part; that of two one-sided tests for 'within'.
      state: 'holds', 'fails' or 'open'.
    """

    __test__ = False  # not a test of pytest's

    part: Part
    n: int
    value: float
    low: float
    high: float
    p: float
    state: str


@dataclasses.dataclass(frozen=True)
class TestedClaim:
    """A claim and its outcome.

    Attributes:
      claim: the claim.
      parts: its parts; none if it is not tested or not interpreted.
      p_holm: the largest p-value of its parts, corrected for all claims of the study; then NaN.
      verdict: 'supported', 'contradicted', 'undecided', `NOT_TESTED` if cells are missing, or `NOT_INTERPRETED`.
    """

    __test__ = False

    claim: Claim
    parts: tuple[TestedPart, ...]
    p_holm: float
    verdict: str


def evaluate_claims(
    claims: Sequence[Claim], measured: Measured, analysis: str, below: Set[str]
) -> tuple[TestedClaim, ...]:
    """Tests all claims.

    Args:
      claims: claims of the study.
      measured: its finished cells. A claim is not tested unless all cells of its arms are done: the seeds that are
        left may differ from those that are missing.
      analysis: analysis of the study.
      below: the arms that do not pass its gate. Claims that need them are not interpreted.
    """
    complete = {name for name, sample in measured.samples.items() if np.isfinite(sample.accuracy).all()}
    parts = {
        claim.code: tuple(_tested(part, measured, analysis) for part in claim.parts) if claim.arms <= complete else ()
        for claim in claims
    }
    decided = decide(parts)
    return tuple(
        TestedClaim(claim, (), math.nan, NOT_INTERPRETED)
        if below & claim.arms
        else TestedClaim(claim, parts[claim.code], *decided[claim.code])
        for claim in claims
    )


class Judged(Protocol):
    """A part of a claim: whether it 'holds', 'fails' or is 'open', and its p-value, NaN if it cannot be tested."""

    @property
    def state(self) -> str: ...

    @property
    def p(self) -> float: ...


def decide(parts: Mapping[str, Sequence[Judged]]) -> dict[str, tuple[float, str]]:
    """Decides claims by their parts, as one family.

    Args:
      parts: parts of each claim, by code; empty if it cannot be tested.

    Returns:
      (p after Holm's correction, verdict) by code; the verdict is 'supported', 'contradicted', 'undecided', or
      `NOT_TESTED` if one of the parts cannot be tested.
    """
    p = [_largest([part.p for part in found]) for found in parts.values()]
    decided = {}
    for (code, found), p_holm in zip(parts.items(), holm(p), strict=True):
        states = {part.state for part in found}
        if math.isnan(p_holm):
            verdict = NOT_TESTED
        elif "fails" in states:
            verdict = "contradicted"
        else:
            verdict = "supported" if states == {"holds"} and p_holm < _SIGNIFICANCE else "undecided"
        decided[code] = p_holm, verdict
    return decided


def _largest(p: Sequence[float]) -> float:
    return math.nan if not p or any(map(math.isnan, p)) else max(p)


def _tested(part: Part, measured: Measured, analysis: str) -> TestedPart:
    weights = of_differences(
        ((arm, baseline), factor * weight)
        for (arm, baseline, weight), factor in zip(part.terms, _factors(part, measured), strict=True)
    )
    found = ANALYSES[analysis](weights, measured.samples)
    state, p = region_state(found, part.side, part.bound), region_p(found, part.side, part.bound)
    return TestedPart(part, found.n, found.mean, found.low, found.high, p, state)


def _factors(part: Part, measured: Measured) -> Sequence[float]:
    """Returns the factors of the terms: 1 for a sum; for a slope, those of the least-squares fit over the axis."""
    if part.measure == "sum":
        return [1.0] * len(part.terms)
    x = np.array([measured.positions[arm] for arm, *_ in part.terms])
    centred = x - x.mean()
    return (centred / (centred @ centred)).tolist()
