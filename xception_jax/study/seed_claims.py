"""Claims about numbers that each seed of a study yields. The studies `dial` and `kernels` state and test such claims.

The unit is the seed. A claim consists of parts, each a mean or median over seeds that is said to lie above or below a
bound, or within a margin; `verdicts` has the rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float

from xception_jax.study.inference import estimate, estimate_median, sign_p
from xception_jax.study.verdicts import TestedClaim, TestedPart, decide

Seeds = Float[np.ndarray, " seeds"]

_Results = TypeVar("_Results")


@dataclasses.dataclass(frozen=True)
class SeedClaim(Generic[_Results]):
    """A claim that can be tested.

    Attributes:
      text: the claim, as it is stated beforehand.
      parts: computes its parts from the results; none if they cannot be computed.
      arms: names of the arms that it needs, where studies of the same kind may lack some.
    """

    text: str
    parts: Callable[[_Results], Iterator[TestedPart]]
    arms: tuple[str, ...] = ()


def part_of(name: str, values: Seeds, side: str, bound: float, unit: str = "points") -> TestedPart:
    """Returns a part about the mean of a value of each seed, NaN where it is not known."""
    is_complete = bool(np.isfinite(values).all())
    return TestedPart(name, estimate(values), side, bound, unit, is_complete, seeds=tuple(values.tolist()))


def median_part_of(name: str, values: Seeds, side: str, bound: float, unit: str = "points") -> TestedPart:
    """Returns a part about the median of a value of each seed, which single outliers do not decide."""
    is_complete = bool(np.isfinite(values).all())
    p = sign_p(values, side, bound)
    seeds = tuple(values.tolist())
    return TestedPart(f"median of {name}", estimate_median(values), side, bound, unit, is_complete, p, seeds)


def evaluate(
    claims: Mapping[str, SeedClaim[_Results]], results: _Results, arms: Collection[str] = ()
) -> tuple[TestedClaim, ...]:
    """Tests claims together.

    Args:
      claims: the claims by code.
      results: what their parts are computed from.
      arms: names of the arms in the results. A claim that needs another one is not tested.
    """
    parts = {code: [*claim.parts(results)] if set(claim.arms) <= set(arms) else [] for code, claim in claims.items()}
    return decide({code: claim.text for code, claim in claims.items()}, parts)
