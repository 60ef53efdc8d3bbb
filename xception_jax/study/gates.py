"""Gates of a study beside its training accuracy. Unless all of them are passed, no claim of the study is interpreted.

'flat'       the mean accuracies of some arms lie within a range: what changes between them is as difficult for all.
'kronecker'  Kronecker turns leave the separability of the images as it is, see turns.py.
'free'       free turns of the largest angle lower it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from xception_jax.study.turns import TurnedShare


@dataclasses.dataclass(frozen=True)
class Gate:
    """A condition that a study states beforehand.

    Attributes:
      kind: one of `GATES`.
      limit: the largest value with which the gate is passed: a range of accuracies as a share ('flat'), a difference of
        the share of separable covariance ('kronecker'), or its ratio to that of images as they are ('free').
      arms: that are compared, for 'flat'.
    """

    kind: str
    limit: float
    arms: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckedGate:
    """A gate and what was measured.

    Attributes:
      name: what must hold.
      value: the measured value; NaN if it is not known yet.
      limit: the largest value with which the gate is passed.
      detail: where the value was found.
    """

    name: str
    value: float
    limit: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Returns whether the value is known and within the limit."""
        return math.isfinite(self.value) and self.value <= self.limit

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as plain data; NaN is None."""
        value = self.value if math.isfinite(self.value) else None
        return dataclasses.asdict(self) | {"value": value, "passed": self.passed}


Key = TypeVar("Key")
Accuracies = Mapping[str, float]
_Found = tuple[str, float, str]  # name, value and detail of a checked gate


def check_gates(
    gates: Sequence[Gate], accuracies: Accuracies, shares: Sequence[TurnedShare]
) -> tuple[CheckedGate, ...]:
    """Checks all gates.

    Args:
      gates: gates of the study.
      accuracies: the mean accuracy of each arm on the test split; NaN while cells of the arm are missing.
      shares: the separability of turned images.
    """
    found = ((GATES[gate.kind](gate, accuracies, shares), gate.limit) for gate in gates)
    return tuple(CheckedGate(name, value, limit, detail) for (name, value, detail), limit in found)


def _flat(gate: Gate, accuracies: Accuracies, shares: Sequence[TurnedShare]) -> _Found:
    name = f"range of the accuracy of {', '.join(gate.arms)}"
    return name, *range_of({arm: accuracies[arm] for arm in gate.arms})


def range_of(means: Accuracies) -> tuple[float, str]:
    """Returns the range of some accuracies, NaN if one is, and which are the lowest and the highest."""
    if any(map(math.isnan, means.values())):
        return math.nan, "cells are missing or have failed"
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    return means[high] - means[low], f"{low} {means[low]:.2%}, {high} {means[high]:.2%}"


def key_of_largest(values: Mapping[Key, float]) -> Key:
    """Returns the key of the largest value; NaN, for what is missing, is the largest."""
    return max(values, key=lambda key: (math.isnan(values[key]), values[key]))


def _kronecker(gate: Gate, accuracies: Accuracies, shares: Sequence[TurnedShare]) -> _Found:
    name = "largest change of the separable share by a Kronecker turn"
    return name, *_largest(shares, "kronecker", lambda turned, plain: abs(turned - plain))


def _free(gate: Gate, accuracies: Accuracies, shares: Sequence[TurnedShare]) -> _Found:
    largest = max((share.angle for share in shares if share.turn == "free"), default=math.nan)
    shares = [share for share in shares if share.turn != "free" or share.angle == largest]
    name = "largest separable share after a free turn, relative to images as they are"
    return name, *_largest(shares, "free", lambda turned, plain: turned / plain)


def _largest(shares: Iterable[TurnedShare], kind: str, compare: Callable[[float, float], float]) -> tuple[float, str]:
    """Returns the largest comparison of turned images with those as they are, and where it was found."""
    shares = list(shares)
    plain = {share.seed: share.raw for share in shares if share.angle == 0}
    turned = [share for share in shares if share.turn == kind and share.seed in plain]
    if not turned:
        return math.nan, "not measured"
    values = {share: compare(share.raw, plain[share.seed]) for share in turned}
    worst = key_of_largest(values)
    return values[worst], f"angle {worst.angle:g}, seed {worst.seed}: {plain[worst.seed]:.4f} to {worst.raw:.4f}"


GATES: dict[str, Callable[[Gate, Accuracies, Sequence[TurnedShare]], _Found]] = {
    "flat": _flat,
    "kronecker": _kronecker,
    "free": _free,
}


def gate_problems(gates: Iterable[Gate], arms: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, how to fix it) for the gates of a study with these arms."""
    for gate in gates:
        if gate.kind not in GATES:
            yield f"a gate is of the kind {gate.kind!r}", f"set it to one of {', '.join(GATES)}"
        if not (math.isfinite(gate.limit) and gate.limit >= 0):
            yield f"the limit of the gate {gate.kind} is {gate.limit}", "set it to a number of at least 0"
        if (gate.kind == "flat") != (len(gate.arms) > 1):
            yield (
                f"the gate {gate.kind} compares {len(gate.arms)} arms",
                "name two or more for 'flat', and none otherwise",
            )
        for name in sorted(set(gate.arms) - set(arms)):
            yield f"the gate {gate.kind} names an arm {name!r} that does not exist", f"choose one of {', '.join(arms)}"
