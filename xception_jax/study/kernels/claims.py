"""States what study 4 claims beforehand, K1 to K6, and tests it. docs/studies/kernels.md has the reasons.

K1 to K4 are about networks of the dial study, where the truth is known. K5 and K6 are about two arms of studies/kernels
that see the same few images, one with true and one with random labels. The rules are those of the dial study: a claim
has parts, the unit is the seed, and the p-values of claims that are tested together are corrected together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from xception_jax.names import LINE_LENGTH, printable
from xception_jax.study.cells import read_outcome
from xception_jax.study.dial.design import REGULAR
from xception_jax.study.gates import CheckedGate
from xception_jax.study.kernels import RANDOM_LABELS, TRUE_LABELS
from xception_jax.study.kernels.calibration import Calibration
from xception_jax.study.kernels.networks import KernelReport, LayerSeparability
from xception_jax.study.seed_claims import SeedClaim, Seeds, evaluate, part_of
from xception_jax.study.store import StoredStudy
from xception_jax.study.verdicts import TestedClaim, TestedPart

RECOVERED = 0.5
"""The slope of the position over the true dial above which a layer tells it: 1 recovers the dial, 0 is blind to it."""

POSITION_MARGIN = 0.1
"""The smallest difference of positions that matters; 0 is separable, 1 is as random kernels with the same energies."""

LATER_MARGIN = 0.02
"""The smallest difference that matters of mean positions over many layers, which vary less."""

MEMORISED = 0.9
"""The training accuracy that both arms must reach whose labels are compared."""

FIRST_LAYER, FIRST_CONVOLUTION = "block1_spatial", "block1_conv1"
_STEM = ("block1_conv1", "block1_conv2")

_Results = TypeVar("_Results")


@dataclasses.dataclass(frozen=True)
class Labels:
    """The networks of two arms that differ only in their labels.

    Attributes:
      positions: by arm and layer, by seed; of the dial within filters.
      gates: both arms are complete and have learned their labels.
    """

    positions: Mapping[tuple[str, str], np.ndarray]
    gates: Sequence[CheckedGate]


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Claims that were tested together, or were not because a gate failed.

    Attributes:
      gates: gates of the study.
      claims: the claims and their outcomes.
    """

    gates: Sequence[CheckedGate]
    claims: Sequence[TestedClaim]

    def to_json(self) -> dict[str, Any]:
        """Returns gates and claims as plain data; NaN is None."""
        return {
            "gates": [gate.to_json() for gate in self.gates],
            "claims": [tested.to_json() for tested in self.claims],
        }


def _recovers(family: str) -> Callable[[Calibration], Iterator[TestedPart]]:
    def parts(found: Calibration) -> Iterator[TestedPart]:
        values = found.recoveries(REGULAR, FIRST_LAYER, family)
        name = f"slope of the position {family} filters over the relative true dial, {FIRST_LAYER}"
        yield part_of(name, values, "above", RECOVERED, unit="")

    return parts


def _position_at(found: Calibration, bank: str, family: str) -> Seeds:
    return found.values(REGULAR, FIRST_LAYER, bank, "position", family)


def _free(found: Calibration) -> Iterator[TestedPart]:
    values = _position_at(found, "free", "within") - 1
    yield part_of("position within filters - 1, free bank", values, "within", POSITION_MARGIN, unit="")


def _separable(found: Calibration) -> Iterator[TestedPart]:
    for family, other in (("within", "across"), ("across", "within")):
        bank = f"{family}_0"
        separable = _position_at(found, bank, family)
        name = f"position {family} filters, bank {bank}"
        yield part_of(name, separable, "below", 1 - POSITION_MARGIN, unit="")
        less = separable - _position_at(found, "free", family)
        yield part_of(f"{name} - bank free", less, "below", -POSITION_MARGIN, unit="")
        more = _position_at(found, bank, other) - separable
        yield part_of(f"position {other} - {family} filters, bank {bank}", more, "above", POSITION_MARGIN, unit="")


def _first_layer(found: Labels) -> Iterator[TestedPart]:
    true, random = (found.positions[arm, FIRST_CONVOLUTION] for arm in (TRUE_LABELS, RANDOM_LABELS))
    name = f"position within filters, {FIRST_CONVOLUTION}"
    yield part_of(f"{name}, true - random labels", true - random, "within", POSITION_MARGIN, unit="")
    for labels, values in (("true", true), ("random", random)):  # or both are as they started
        yield part_of(f"{name}, {labels} labels", values, "below", 1 - POSITION_MARGIN, unit="")


def _later_layers(found: Labels) -> Iterator[TestedPart]:
    later = [layer for arm, layer in found.positions if arm == TRUE_LABELS and layer not in _STEM]
    differences = [found.positions[TRUE_LABELS, layer] - found.positions[RANDOM_LABELS, layer] for layer in later]
    values = np.mean(differences, axis=0)
    name = "position within filters, true - random labels, mean over the layers behind the stem"
    yield part_of(name, values, "below", -LATER_MARGIN, unit="")


CALIBRATION: dict[str, SeedClaim[Calibration]] = {
    "K1": SeedClaim(
        "In the first layer of the regular network of two blocks, the position across filters recovers the dial of the "
        "bank: its slope over the dial, relative to that of the free bank, is above 0.5.",
        _recovers("across"),
    ),
    "K2": SeedClaim(
        "In the same layer, the position within filters recovers the dial of the bank: the slope is above 0.5.",
        _recovers("within"),
    ),
    "K3": SeedClaim(
        "Where the bank is free, the filters of this layer are as random ones with the same energies: their position "
        "within filters is 1, within 0.1.",
        _free,
    ),
    "K4": SeedClaim(
        "Where the bank is separable within (across) filters, the position of this layer within (across) filters is "
        "below 0.9, by more than 0.1 below that on the free bank, and by more than 0.1 below the other position.",
        _separable,
    ),
}

LABELS: dict[str, SeedClaim[Labels]] = {
    "K5": SeedClaim(
        "The separability of the first convolution is that of the images: its position within filters is below 0.9 for "
        "true and for random labels, and the same for both, within 0.1.",
        _first_layer,
    ),
    "K6": SeedClaim(
        "Behind the stem, true labels make kernels more separable within filters than random labels do: the mean "
        "position over these layers is lower by more than 0.02.",
        _later_layers,
    ),
}


def _test(claims: Mapping[str, SeedClaim[_Results]], found: _Results, gates: Sequence[CheckedGate]) -> Verdicts:
    if all(gate.passed for gate in gates):
        return Verdicts(gates, evaluate(claims, found))
    return Verdicts(gates, [TestedClaim(code, claim.text) for code, claim in claims.items()])


def judge_calibration(found: Calibration) -> Verdicts:
    """Tests K1 to K4, if the gates of the dial study are passed."""
    return _test(CALIBRATION, found, found.gates)


def judge_labels(stored: StoredStudy, report: KernelReport) -> Verdicts | None:
    """Tests K5 and K6 if a study has an arm with true and one with random labels, and both pass their gates.

    Args:
      stored: the study.
      report: its kernels.
    """
    names = {arm.name for arm in stored.study.arms}
    if not {TRUE_LABELS, RANDOM_LABELS} <= names:
        return None
    arms = (TRUE_LABELS, RANDOM_LABELS)
    cells = [cell for cell in stored.cells() if cell.arm in arms]
    by_cell = {(layer.network, layer.layer): layer for layer in report.layers}
    layers = dict.fromkeys(layer.layer for layer in report.layers if layer.network.startswith(TRUE_LABELS))
    positions = {
        (arm, layer): np.array(
            [_position(by_cell.get((cell.name, layer))) for cell in cells if cell.arm == arm], np.float64
        )
        for arm in arms
        for layer in layers
    }
    measured = {layer.network for layer in report.layers}
    missing = sum(cell.state() != "done" or cell.name not in measured for cell in cells)
    gates = [CheckedGate("cells that are missing", missing, 0, f"{len(cells) - missing} of {len(cells)}")]
    for arm in arms:
        accuracy = [read_outcome(cell, stored.study.metric)["train_accuracy"] for cell in cells if cell.arm == arm]
        known = [value for value in accuracy if value is not None]
        mean = float(np.mean(known)) if known else math.nan
        gates.append(CheckedGate(f"training error of {arm}, mean over seeds", 1 - mean, 1 - MEMORISED))
    return _test(LABELS, Labels(positions, gates), gates)


def _position(layer: LayerSeparability | None) -> float:
    return math.nan if layer is None else layer.position("within")


def format_verdicts(verdicts: Verdicts) -> str:
    """Returns gates that are not passed, and the claims, for a terminal."""
    lines = [
        f"gate not passed: {gate.name}: {gate.value:.4g}, limit {gate.limit:g} ({gate.detail})"
        for gate in verdicts.gates
        if not gate.passed
    ]
    lines += ["a gate is not passed, so no claim is tested"] if lines else []
    for tested in verdicts.claims:
        p = f" (p {tested.p_text})" if math.isfinite(tested.p_holm) else ""
        lines.append(f"{tested.code} {tested.verdict}{p}: {tested.text}")
        for part in tested.parts:
            lines.append(f"  {part.name}: {part.interval}, n {part.estimate.n}: {part.state}")
    return "\n".join(printable(line, LINE_LENGTH) for line in lines)
