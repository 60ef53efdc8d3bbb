"""Describes claims about several arms, as data that a study states beforehand. `tested_claims.py` tests them.

A claim consists of parts. A part is a number that is said to lie above or below a bound, or between -bound and bound:

'sum'    the weighted sum of differences in accuracy, such as the mean effect of an activation over four networks.
'slope'  the least-squares slope of weighted differences over the axis of the study.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping

MEASURES = {"sum": 1, "slope": 2}  # and the least number of terms
SIDES = ("above", "below", "within")

Term = tuple[str, str, float]
"""(arm, baseline, weight): the accuracy of the arm minus that of the baseline, or minus 0 if the baseline is ''."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a claim.

    Attributes:
      name: what is estimated.
      terms: the differences in accuracy that it consists of.
      side: one of `SIDES`.
      bound: a difference in accuracy as a share (0.003 is 0.3 percentage points), or a slope per unit of the axis (per
        doubling on the axis of channels).
      measure: one of `MEASURES`.
    """

    name: str
    terms: tuple[Term, ...]
    side: str
    bound: float
    measure: str = "sum"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim that is supported only if each of its parts holds.

    Attributes:
      code: such as 'H1'.
      text: the claim in a sentence.
      parts: what is tested.
    """

    code: str
    text: str
    parts: tuple[Part, ...]

    @property
    def arms(self) -> set[str]:
        """Returns the names of the arms that it needs."""
        return {name for part in self.parts for term in part.terms for name in term[:2] if name}


Weights = Mapping[str, float]
"""Weight of each arm in a sum of accuracies."""


def of_differences(terms: Iterable[tuple[tuple[str, str], float]]) -> Weights:
    """Returns the weights of a sum of weighted differences ((arm, baseline), weight); a baseline '' is zero."""
    weights: dict[str, float] = {}
    for pair, weight in terms:
        for name, sign in zip(pair, (1, -1), strict=True):
            weights[name] = weights.get(name, 0.0) + sign * weight
    return {name: weight for name, weight in weights.items() if name and weight}


def claim_problems(claims: Collection[Claim], arms: Collection[str], axis: str) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, how to fix it) for the claims of a study with these arms and this axis."""
    codes = [claim.code for claim in claims]
    for claim in claims:
        if codes.count(claim.code) > 1 or not claim.code:
            yield f"two claims are called {claim.code!r}, or one has no code", "give each claim its own code"
        if not claim.parts:
            yield f"claim {claim.code} has no parts", "state what it predicts"
        for name in sorted(claim.arms - set(arms)):
            yield f"claim {claim.code} names an arm {name!r} that does not exist", f"choose one of {', '.join(arms)}"
        for part in claim.parts:
            for what, fix in _part_problems(part, axis):
                yield f"claim {claim.code}, {part.name!r}: {what}", fix


def _part_problems(part: Part, axis: str) -> Iterator[tuple[str, str]]:
    if part.measure not in MEASURES:
        yield f"the measure is {part.measure!r}", f"set it to one of {', '.join(MEASURES)}"
    elif len(part.terms) < MEASURES[part.measure]:
        yield f"it has {len(part.terms)} terms", f"a {part.measure} needs at least {MEASURES[part.measure]}"
    if part.side not in SIDES:
        yield f"the side is {part.side!r}", f"set it to one of {', '.join(SIDES)}"
    if not all(math.isfinite(weight) for *_, weight in part.terms) or not any(weight for *_, weight in part.terms):
        yield "its weights are zero or not finite", "set the weight of each term"
    elif part.measure == "sum" and not of_differences(((arm, other), weight) for arm, other, weight in part.terms):
        yield "its terms cancel", "name arms that differ"
    if not math.isfinite(part.bound) or (part.side == "within" and part.bound <= 0):
        yield f"the bound is {part.bound}", "set it to a number, above 0 for 'within'"
    if part.measure == "slope" and not axis:
        yield "a slope needs an axis", "set the axis of the study"
