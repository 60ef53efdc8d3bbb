"""Decides claims by the estimates of their parts.

A part holds if the whole 95 % interval lies where the claim says, and fails if the whole interval lies elsewhere. A
claim is supported if all of its parts hold (an intersection-union test, Berger 1982) and its p-value, the largest of
its parts, is below 0.05 after Holm's correction over the claims that are tested together. It is contradicted if a part
fails; this is not corrected, but reports show the corrected p-value of the contrary. Otherwise it is undecided.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from xception_jax.logs.metrics_log import json_ready
from xception_jax.reports.environment import format_p, format_points
from xception_jax.study.inference import Estimate, holm, region_p, region_state, sign_p

NOT_INTERPRETED = "not interpreted"  # the outcome where an arm does not pass the gate
NOT_TESTED = "not tested"
_SIGNIFICANCE = 0.05


def show(value: float, unit: str) -> str:
    """Returns a number with its sign. A unit of points says that it is a share."""
    return format_points(value) if unit else f"{value:+.3f}"


def show_interval(found: Estimate, unit: str) -> str:
    """Returns a mean and its interval with the unit, such as '+1.10 [+0.80, +1.40] points'."""
    mean, low, high = (show(value, unit) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}] {unit}".rstrip()


@dataclasses.dataclass(frozen=True)
class TestedPart:
    """A part of a claim and its outcome.

    Attributes:
      name: what is estimated.
      estimate: the mean or median and its interval.
      side: 'above', 'below' or 'within'.
      bound: bound of the claim; within means from -bound to bound.
      unit: 'points', also 'points per doubling' and the like, for differences in accuracy: shares that are shown in
        percentage points; '' for other numbers.
      is_complete: whether all seeds are known. Otherwise it is not tested: those that are left may differ from those
        that are missing.
      sign_p: p-value of a sign test, for a median; NaN for a mean, which has a t test.
      seeds: the number of each seed, where there is one.
    """

    __test__ = False  # not a test of pytest's

    name: str
    estimate: Estimate
    side: str
    bound: float
    unit: str = "points"
    is_complete: bool = True
    sign_p: float = math.nan
    seeds: tuple[float, ...] = ()

    @property
    def state(self) -> Literal["holds", "fails", "open"]:
        """Returns where the interval lies."""
        return region_state(self.estimate, self.side, self.bound)

    @property
    def p(self) -> float:
        """Returns the one-sided p-value; that of two one-sided tests for 'within'; NaN if it is not complete."""
        if not self.is_complete:
            return math.nan
        return region_p(self.estimate, self.side, self.bound) if math.isnan(self.sign_p) else self.sign_p

    @property
    def p_contrary(self) -> float:
        """Returns the p-value of the contrary, times two if it has two sides; NaN if it is not complete."""
        if not self.is_complete:
            return math.nan
        below, above = ("below", -self.bound if self.side == "within" else self.bound), ("above", self.bound)
        contrary = {"above": [below], "below": [above], "within": [below, above]}[self.side]
        if math.isnan(self.sign_p):
            p = [region_p(self.estimate, side, bound) for side, bound in contrary]
        else:
            p = [sign_p(np.array(self.seeds), side, bound) for side, bound in contrary]
        return min(1.0, len(p) * min(p))

    @property
    def claimed(self) -> str:
        """Returns where the claim says that the number lies, such as 'above +1.00' or 'within ±1.00'."""
        shown = show(self.bound, self.unit)
        return (
            f"within \N{PLUS-MINUS SIGN}{shown.removeprefix('+')}" if self.side == "within" else f"{self.side} {shown}"
        )

    @property
    def interval(self) -> str:
        """Returns the mean and its interval, such as '+1.10 [+0.80, +1.40] points'."""
        return show_interval(self.estimate, self.unit)

    def to_json(self) -> dict[str, Any]:
        """Returns claim, state and estimate as plain data; NaN is None."""
        stated = {"name": self.name, "side": self.side, "bound": self.bound, "unit": self.unit, "state": self.state}
        p = self.p if math.isfinite(self.p) else None
        return stated | self.estimate.to_json() | {"p": p, "seeds": json_ready(list(self.seeds))}


@dataclasses.dataclass(frozen=True)
class TestedClaim:
    """A claim and its outcome.

    Attributes:
      code: such as 'H1'.
      text: the claim in a sentence.
      parts: its parts; none if it is not tested or not interpreted.
      p_holm: the largest p-value of its parts after Holm's correction; then NaN.
      p_contrary: p-value of the contrary, that a part fails, corrected for its parts by Bonferroni's and then for the
        claims by Holm's method.
      verdict: 'supported', 'contradicted', 'undecided', `NOT_TESTED` or `NOT_INTERPRETED`.
    """

    __test__ = False

    code: str
    text: str
    parts: tuple[TestedPart, ...] = ()
    p_holm: float = math.nan
    p_contrary: float = math.nan
    verdict: str = NOT_TESTED

    @property
    def p_text(self) -> str:
        """Returns the p-value that belongs to the verdict."""
        contradicted = self.verdict == "contradicted"
        return f"{format_p(self.p_contrary)} (contrary)" if contradicted else format_p(self.p_holm)

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as plain data; NaN is None."""
        return {
            "code": self.code,
            "claim": self.text,
            "verdict": self.verdict,
            "p_holm": self.p_holm if math.isfinite(self.p_holm) else None,
            "p_contrary": self.p_contrary if math.isfinite(self.p_contrary) else None,
            "parts": [part.to_json() for part in self.parts],
        }


def decide(texts: Mapping[str, str], parts: Mapping[str, Sequence[TestedPart]]) -> tuple[TestedClaim, ...]:
    """Decides claims together, as one family, to which claims that cannot be tested belong as well.

    Args:
      texts: the claims by code.
      parts: parts of each claim, by code; none if it cannot be tested.
    """
    p_holm = holm([_largest([part.p for part in parts[code]]) for code in texts])
    p_contrary = holm([_smallest([part.p_contrary for part in parts[code]]) for code in texts])
    decided = []
    for code, p, contrary in zip(texts, p_holm, p_contrary, strict=True):
        states = {part.state for part in parts[code]}
        if math.isnan(p):
            verdict = NOT_TESTED
        elif "fails" in states:
            verdict = "contradicted"
        else:
            verdict = "supported" if states == {"holds"} and p < _SIGNIFICANCE else "undecided"
        decided.append(TestedClaim(code, texts[code], tuple(parts[code]), p, contrary, verdict))
    return tuple(decided)


def _largest(p: Sequence[float]) -> float:
    return math.nan if not p or any(map(math.isnan, p)) else max(p)


def _smallest(p: Sequence[float]) -> float:
    """Returns the smallest p-value with Bonferroni's correction; NaN if one is not known."""
    return math.nan if not p or any(map(math.isnan, p)) else min(1.0, len(p) * min(p))
