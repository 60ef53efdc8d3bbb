"""Claims about numbers that each seed of a study yields. The studies `dial` and `kernels` state and test such claims.

The unit is the seed. A claim consists of parts, each a mean over seeds that is said to lie above or below a bound, or
within a margin. `tested_claims` has the rules: a part holds if the whole 95 % t interval lies where the claim says, and
the p-values of claims that are tested together are corrected together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float

from xception_jax.study.statistics import Estimate, estimate, region_p, region_state
from xception_jax.study.tested_claims import decide

Seeds = Float[np.ndarray, " seeds"]

_Results = TypeVar("_Results")


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a claim.

    Attributes:
      name: what is estimated.
      values: one for each seed; NaN where it is not known.
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
        """Returns the one-sided p-value of the claim; that of two one-sided tests for 'within'.

        It is NaN unless the values of all seeds are known: those that are left may differ from those that are missing.
        """
        return region_p(self.estimate, self.side, self.bound) if np.isfinite(self.values).all() else math.nan

    def to_json(self) -> dict[str, Any]:
        """Returns claim, state and estimate as plain data; NaN is None."""
        stated = {"name": self.name, "side": self.side, "bound": self.bound, "state": self.state}
        return stated | self.estimate.to_json()


@dataclasses.dataclass(frozen=True)
class Claim(Generic[_Results]):
    """A claim that can be tested.

    Attributes:
      text: the claim, as it is stated beforehand.
      parts: computes its parts from the results; none if they cannot be computed.
      arms: names of the arms that it needs, where studies of the same kind may lack some.
    """

    text: str
    parts: Callable[[_Results], Iterator[Part]]
    arms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tested:
    """A claim and its outcome.

    Attributes:
      code: such as 'H1'.
      text: the claim.
      parts: its parts; empty if it cannot be tested.
      p_holm, verdict: see `tested_claims.decide`.
    """

    code: str
    text: str
    parts: tuple[Part, ...]
    p_holm: float
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as plain data; NaN is None."""
        return {
            "code": self.code,
            "claim": self.text,
            "verdict": self.verdict,
            "p_holm": None if math.isnan(self.p_holm) else self.p_holm,
            "parts": [part.to_json() for part in self.parts],
        }


def evaluate(
    claims: Mapping[str, Claim[_Results]], results: _Results, arms: Collection[str] = ()
) -> tuple[Tested, ...]:
    """Tests claims together.

    Args:
      claims: the claims by code.
      results: what their parts are computed from.
      arms: names of the arms in the results. A claim that needs another one is not tested.
    """
    parts = {
        code: tuple(claim.parts(results)) if set(claim.arms) <= set(arms) else () for code, claim in claims.items()
    }
    decided = decide(parts)
    return tuple(Tested(code, claim.text, parts[code], *decided[code]) for code, claim in claims.items())
