"""Compares the separability of kernels with the truth, in the networks of a dial study.

The banks of a dial study say how separable the kernels are that its task needs. If the kernels of its regular networks
do not tell the same, those of other networks cannot be read either.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from tqdm import tqdm

from xception_jax.errors import InputMissingError
from xception_jax.reports.style import COLORS, QUIET, draw_svg, legend_label, on_white
from xception_jax.study.dial.design import REGULAR
from xception_jax.study.dial.gates import check_gates
from xception_jax.study.dial.records import network_path
from xception_jax.study.dial.results import DialResults, collect_dial
from xception_jax.study.gates import CheckedGate
from xception_jax.study.inference import estimate, slope_weights
from xception_jax.study.kernels.networks import LayerSeparability, measure_layer
from xception_jax.study.separability import FAMILIES
from xception_jax.study.store import write_report_files
from xception_jax.user_files import read_arrays, reading

_FEWEST_BANKS = 3  # for a slope


@dataclasses.dataclass(frozen=True)
class Point:
    """A layer of a regular network, and the bank that its task was made of.

    Attributes:
      arm, layer, bank, seed: those of the network.
      within, across: the dial of the bank.
      measured: the layer.
    """

    arm: str
    layer: str
    bank: str
    seed: int
    within: float
    across: float
    measured: LayerSeparability


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The regular layers of all networks of a dial study.

    Attributes:
      results: records of the dial study.
      points: a point for each layer, bank and seed.
      gates: the gates of the dial study, and one that all networks are there.
    """

    results: DialResults
    points: Sequence[Point]
    gates: Sequence[CheckedGate]

    @property
    def passed(self) -> bool:
        """Returns whether all gates are passed."""
        return all(gate.passed for gate in self.gates)

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """Returns (arm, layer) of all layers."""
        return tuple(dict.fromkeys((point.arm, point.layer) for point in self.points))

    def values(self, arm: str, layer: str, bank: str, kind: str, family: str) -> Float[np.ndarray, " seeds"]:
        """Returns a value of a layer by seed; NaN for missing ones.

        Args:
          arm: the arm.
          layer: the layer.
          bank: the bank.
          kind: 'true' (the dial of the bank), 'measured', 'null' or 'position', see `LayerSeparability`.
          family: 'within' or 'across' filters.
        """
        found = {
            point.seed: _KINDS[kind](point, family)
            for point in self.points
            if (point.arm, point.layer, point.bank) == (arm, layer, bank)
        }
        return np.array([found.get(seed, math.nan) for seed in self.results.study.seeds])

    def banks(self, arm: str, family: str) -> list[str]:
        """Returns the banks of one family by angle, with the free one, on which an arm is trained."""
        return [bank.name for bank in self.results.dial_of(family, arm)]

    def recoveries(self, arm: str, layer: str, family: str) -> Float[np.ndarray, " seeds"]:
        """Returns, for each seed, the slope of the position over the true dial of the banks of a family.

        The true dial is relative to that of the free bank. A layer that recovers it has a slope of 1, one that is blind
        to it has 0. The slope is NaN for seeds with missing networks, and where an arm has fewer than three banks.
        """
        banks = self.banks(arm, family)
        if len(banks) < _FEWEST_BANKS:
            return np.full(len(self.results.study.seeds), math.nan)
        truth, position = (
            np.stack([self.values(arm, layer, bank, kind, family) for bank in banks]) for kind in ("true", "position")
        )
        x = truth / truth[banks.index("free")]
        return (slope_weights(x) * position).sum(0)

    def to_json(self) -> dict[str, Any]:
        """Returns the points, slopes and gates as plain data; NaN is None."""
        points = [dataclasses.asdict(point) | {"measured": point.measured.to_json()} for point in self.points]
        recoveries = [
            {"arm": arm, "layer": layer, "family": family} | estimate(self.recoveries(arm, layer, family)).to_json()
            for arm, layer in self.layers
            for family in FAMILIES
        ]
        gates = [gate.to_json() for gate in self.gates]
        return {"passed": self.passed, "gates": gates, "recoveries": recoveries, "points": points}


_KINDS: dict[str, Callable[[Point, str], float]] = {
    "true": getattr,
    "measured": lambda point, family: getattr(point.measured, family),
    "null": lambda point, family: getattr(point.measured, f"null_{family}").mean,
    "position": lambda point, family: point.measured.position(family),
}


def calibrate(root: Path) -> Calibration:
    """Measures the kernels of a dial study's regular networks that did not diverge.

    Raises:
      InputMissingError: there is no dial study, some of its cells are not done, or there is no network of it.
      BadDataError: a file is damaged.
    """
    results = collect_dial(root)
    if not results.complete:
        done, planned = len(results.done & results.planned), len(results.planned)
        raise InputMissingError(
            f"{done} of {planned} cells of the dial study are done, and kernels are measured when all are",
            str(root),
            "run `xception-jax study run` for it again",
        )
    wanted = [
        (row.arm, bank.name, seed)
        for row in results.study.rows
        if row.arm.form == REGULAR
        for bank in row.banks
        for seed in results.study.seeds
    ]
    points: list[Point] = []
    missing = diverged = 0
    for arm, bank, seed in tqdm(wanted, "measuring networks", disable=None, leave=False):
        path = network_path(root, arm.name, bank, seed)
        place = results.study.seeds.index(seed)
        dials = {family: float(results.of_banks(family, bank)[place]) for family in FAMILIES}
        if not all(map(math.isfinite, dials.values())) or not path.exists():
            missing += 1
            continue
        kernels = _kernels(path, arm.depth)
        if not all(np.isfinite(kernel).all() and kernel.any() for kernel in kernels.values()):
            diverged += 1
            continue
        for layer, kernel in kernels.items():
            points.append(Point(arm.name, layer, bank, seed, **dials, measured=measure_layer(str(path), layer, kernel)))
    if not points:
        fix = "run `xception-jax study run` for it; studies of earlier releases did not keep their networks"
        raise InputMissingError("there are no networks of regular arms", str(root), fix)
    gates = (
        CheckedGate("networks or records that are missing", missing, 0, f"of {len(wanted)}"),
        CheckedGate("networks with kernels that are zero or not finite", diverged, 0, f"of {len(wanted)}"),
    )
    return Calibration(results, points, (*check_gates(results), *gates))


def _kernels(path: Path, depth: int) -> dict[str, np.ndarray]:
    """Reads the spatial kernels of a network, by layer."""
    names = {f"block{number}_spatial": f"params/block{number}_spatial/kernel" for number in range(1, depth + 1)}
    with reading("network", path, "restore it from a copy, or delete it"):
        arrays = read_arrays(path, names.values())
        kernels = {layer: np.asarray(arrays[name], np.float64) for layer, name in names.items()}
        for layer, kernel in kernels.items():
            if kernel.ndim != 4 or kernel.size == 0:
                raise ValueError(f"{layer} has the shape {kernel.shape}")
    return kernels


def write_calibration_figures(found: Calibration) -> list[Path]:
    """Writes figures/kernels_within.svg and figures/kernels_across.svg into the study directory.

    Returns:
      The files.

    Raises:
      StorageError: a file cannot be written.
    """
    files = {f"figures/kernels_{family}.svg": on_white(_figure(found, family)) for family in FAMILIES}
    write_report_files(found.results.root, files)
    return [found.results.root / name for name in files]


def _figure(found: Calibration, family: str) -> str:
    """Draws the measured dial of the first and last layer of each arm over that of the bank, with random kernels.

    A color is an arm; its last layer has hollow markers. Arms with fewer than two banks of the family are left out.
    """
    layers: dict[str, list[str]] = {}
    for arm, layer in found.layers:
        if len(found.banks(arm, family)) > 1:
            layers.setdefault(arm, []).append(layer)
    ends = [
        (number, arm, layer, is_last)
        for number, (arm, own) in enumerate(layers.items())
        for is_last, layer in enumerate(dict.fromkeys((own[0], own[-1])))
    ]

    def draw(axes: Axes) -> None:
        for number, arm, layer, is_last in ends:
            of_banks = [(arm, layer, bank) for bank in found.banks(arm, family)]
            true, measured, null = (
                [estimate(found.values(*each, kind, family)) for each in of_banks]
                for kind in ("true", "measured", "null")
            )
            x, half = ([e.mean for e in true], [e.mean - e.low if math.isfinite(e.low) else 0.0 for e in measured])
            color, marker = COLORS[number % len(COLORS)], "os^Dv"[number % 5]
            label = legend_label(f"{arm}, {layer}")
            y = [e.mean for e in measured]
            face = "white" if is_last else color
            axes.errorbar(x, y, half, label=label, color=color, marker=marker, mfc=face, markersize=4.5, capsize=2.5)
            axes.plot(x, [e.mean for e in null], color=color, linestyle=(0, (1, 1.5)), linewidth=1)
        axes.set_xlabel(f"true dial {family} filters, of the bank", color=QUIET)
        axes.set_ylabel(f"dial {family} filters, of the kernel (dotted: random)", color=QUIET)
        axes.set_ylim(bottom=0)
        axes.legend()

    return draw_svg(420, 320, (0.16, 0.16, 0.82, 0.8), draw)
