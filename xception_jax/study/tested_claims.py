"""Tests the claims of a study about its arms, once all cells of the arms are done.

Sums and slopes are linear in the accuracies of the arms, so that the analysis of the study gives their error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set

import numpy as np

from xception_jax.study.analysis import ANALYSES, Sample
from xception_jax.study.claims import Claim, Part, of_differences
from xception_jax.study.inference import slope_weights
from xception_jax.study.verdicts import NOT_INTERPRETED, TestedClaim, TestedPart, decide


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements with which the claims of a study are tested.

    Attributes:
      samples: the finished cells of each arm.
      positions: positions of each arm on the axis; logarithms to base 2 on an axis of channels.
      slope_unit: unit of a slope, such as 'points per doubling'.
    """

    samples: Mapping[str, Sample]
    positions: Mapping[str, float]
    slope_unit: str


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
        claim.code: [_tested(part, measured, analysis) for part in claim.parts] if claim.arms <= complete else []
        for claim in claims
    }
    decided = decide({claim.code: claim.text for claim in claims}, parts)
    return tuple(
        TestedClaim(claim.code, claim.text, verdict=NOT_INTERPRETED) if below & claim.arms else tested
        for claim, tested in zip(claims, decided, strict=True)
    )


def _tested(part: Part, measured: Measured, analysis: str) -> TestedPart:
    weights = of_differences(
        ((arm, baseline), factor * weight)
        for (arm, baseline, weight), factor in zip(part.terms, _factors(part, measured), strict=True)
    )
    seeds = np.sum([weight * measured.samples[arm].accuracy for arm, weight in weights.items()], axis=0)
    return TestedPart(
        part.name,
        ANALYSES[analysis](weights, measured.samples),
        part.side,
        part.bound,
        measured.slope_unit if part.measure == "slope" else "points",
        seeds=tuple(seeds) if analysis == "paired" else (),  # elsewhere, no seed of one arm belongs to one of another
    )


def _factors(part: Part, measured: Measured) -> Sequence[float]:
    """Returns the factors of the terms: 1 for a sum; for a slope, those of the least-squares fit over the axis."""
    if part.measure == "sum":
        return [1.0] * len(part.terms)
    return slope_weights(np.array([measured.positions[arm] for arm, *_ in part.terms])).tolist()
