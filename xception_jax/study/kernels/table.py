"""Formats the separability of kernels as a table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from xception_jax.names import LINE_LENGTH, printable
from xception_jax.study.inference import estimate
from xception_jax.study.kernels.calibration import Calibration
from xception_jax.study.kernels.measure import FAMILIES
from xception_jax.study.kernels.networks import KernelReport, LayerSeparability, format_left_out

_RANKS = (1, 2, 3, 4)
_NOTES = (
    "first component: mean share of a filter's squared norm in its best blueprint (SD over networks)",
    "random: random kernels of the same shape",
    "within, across: 1 - share of the squared norm in the best rank-one part of each filter, of each channel;",
    "  0 is separable. Brackets: random kernels with the same energies for each tap, channel and filter",
    "error, rank r: relative error of a sum of r depthwise separable convolutions (random kernels of the same shape)",
)


def format_kernels(report: KernelReport) -> str:
    """Returns a table of the layers: means over the networks of an arm, with standard deviations in brackets."""
    squares = [layer for layer in report.layers if not layer.is_line]
    lines = [layer for layer in report.layers if layer.is_line]
    text = [f"axes of {name}: {axes}" for name, axes in report.axes.items()]
    text += _table(squares) if squares else []
    text += ["kernels that are a line of pixels; their rank is at most the number of taps"] if lines else []
    text += _table(lines) if lines else []
    if counts := format_left_out(report.left_out):
        text.append(f"left out: {counts}")
    return "\n".join([*(printable(line, LINE_LENGTH) for line in text), *_NOTES])


def _table(layers: Sequence[LayerSeparability]) -> list[str]:
    groups: dict[tuple[str, str], list[LayerSeparability]] = {}
    for layer in layers:
        groups.setdefault((layer.network.partition(" seed ")[0], printable(layer.layer)), []).append(layer)
    ranks = [rank for rank in _RANKS if all(rank <= len(layer.rank_errors) for layer in layers)]
    width = max(len(layer) for _, layer in groups)
    head = f"{'layer':{width}} {'kernel':>16} {'n':>3} {'first component':>17} {'random':>7} "
    head += f"{'within':>13} {'across':>13} " + " ".join(f"{f'error, rank {rank}':>13}" for rank in ranks)
    text: list[str] = []
    network = ""
    for (name, path), entries in groups.items():
        if name != network:
            text += [name, head]
            network = name
        firsts = [entry.first_component for entry in entries]
        spread = np.std(firsts, ddof=1) if len(firsts) > 1 else math.nan
        share = f"{np.mean(firsts):.1%}" + (f" ({spread:.1%})" if math.isfinite(spread) else "")
        dials = (
            _beside([getattr(entry, family) for entry in entries], [getattr(entry, null).mean for entry in entries])
            for family, null in (("within", "null_within"), ("across", "null_across"))
        )
        errors = (
            _beside([e.rank_errors[r - 1] for e in entries], [e.null_rank_errors[r - 1] for e in entries])
            for r in ranks
        )
        shape = "x".join(map(str, entries[0].shape))
        row = f"{path:{width}} {shape:>16} {len(entries):>3} {share:>17} {entries[0].null.mean:>7.1%} "
        text.append(row + " ".join(f"{cell:>13}" for cell in (*dials, *errors)))
    return text


def _beside(values: Sequence[float], random: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ({np.mean(random):.3f})"


def format_calibration(found: Calibration) -> str:
    """Returns tables of the measured dial of each layer beside that of its bank, and how much of it is recovered."""
    lines = []
    for family in FAMILIES:
        lines.append(
            f"dial {family} filters: mean over seeds, and of random kernels with the same energies in brackets"
        )
        for arm in dict.fromkeys(arm for arm, _ in found.layers):
            banks = found.banks(arm, family)
            layers = [layer for each, layer in found.layers if each == arm]
            width = max(map(len, (*layers, "true dial of the bank")))
            lines.append(f"{arm:{width}} " + " ".join(f"{bank:>13}" for bank in banks) + f" {'recovered':>22}")
            true = [estimate(found.values(arm, layers[0], bank, "true", family)).mean for bank in banks]
            lines.append(f"{'true dial of the bank':{width}} " + " ".join(f"{value:>13.3f}" for value in true))
            for layer in layers:
                cells = (
                    _beside(
                        *(
                            [estimate(found.values(arm, layer, bank, kind, family)).mean]
                            for kind in ("measured", "null")
                        )
                    )
                    for bank in banks
                )
                recovered = estimate(found.recoveries(arm, layer, family))
                shown = f"{recovered.mean:+.2f} [{recovered.low:+.2f}, {recovered.high:+.2f}]" if recovered.n else "-"
                lines.append(f"{layer:{width}} " + " ".join(f"{cell:>13}" for cell in cells) + f" {shown:>22}")
    lines += [
        "recovered: slope of the layer's position over the true dial relative to the free bank; mean and 95 % interval "
        "over seeds. 1 recovers the dial; at 0, the position does not depend on it",
    ]
    return "\n".join(printable(line, LINE_LENGTH) for line in lines)
