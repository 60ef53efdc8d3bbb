"""Writes the report of a dial study: report.md and figures/."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from xception_jax.names import LINE_LENGTH, printable
from xception_jax.reports.environment import format_percent, make_environment
from xception_jax.reports.style import COLORS, MARGIN, QUIET, ZERO, draw_svg, legend_label, on_white
from xception_jax.study.controls import EQUAL_WITHIN
from xception_jax.study.dial.banks import BankSpec
from xception_jax.study.dial.claims import DEPTHWISE, DEPTHWISE_6, POINTWISE, SEGMENTS, beside_claims, evaluate_claims
from xception_jax.study.dial.design import REGULAR, DialStudy
from xception_jax.study.dial.execute import chosen_rates, tried_rates
from xception_jax.study.dial.gates import check_gates
from xception_jax.study.dial.network import DialCost
from xception_jax.study.dial.results import DialResults, collect_dial
from xception_jax.study.figures import CLAIMED_DIFFERENCES, claimed_differences
from xception_jax.study.gates import CheckedGate
from xception_jax.study.inference import Estimate, estimate
from xception_jax.study.seed_claims import Seeds
from xception_jax.study.store import write_report_files
from xception_jax.study.verdicts import TestedClaim, show_interval

BASE = (REGULAR, DEPTHWISE, POINTWISE)
_CROSSING = {
    REGULAR: "regular",
    DEPTHWISE: "depthwise first",
    POINTWISE: "pointwise first",
    DEPTHWISE_6: "depthwise first, six filters a channel",
}
_PAIRS = {
    "": "two blocks", "_4": "four blocks", "_8": "eight blocks", "_wide": "two, as costly as eight",
    "_long": "two, twice the steps",
}  # fmt: skip
_ACROSS = "dial across filters: 1 - share of the best rank-one part"


@dataclasses.dataclass(frozen=True)
class DialReport:
    """What a report says.

    Attributes:
      results: all records.
      gates: gates of the study.
      claims: tested, or () if a gate is not passed.
      beside: numbers that help to read the claims, and their units, by name; none if a gate is not passed.
    """

    results: DialResults
    gates: Sequence[CheckedGate]
    claims: Sequence[TestedClaim]
    beside: Mapping[str, tuple[Estimate, str]]

    @property
    def passed(self) -> bool:
        """Returns whether all gates are passed."""
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        """Returns gates and claims as plain data; NaN is None."""
        gates = [gate.to_json() for gate in self.gates]
        claims = [tested.to_json() for tested in self.claims]
        beside = {name: found.to_json() for name, (found, _) in self.beside.items()}
        return {"passed": self.passed, "gates": gates, "claims": claims, "beside": beside}


def write_dial_report(root: Path) -> DialReport:
    """Tests gates and claims of a study directory, and writes report.md and figures/*.svg into it.

    Raises:
      InputMissingError: there is no dial study.
      BadDataError: a file is damaged.
      StorageError: a file cannot be written.
    """
    results = collect_dial(root)
    gates = check_gates(results)
    passed = all(gate.passed for gate in gates)
    beside = {name: (estimate(values), unit) for name, (values, unit) in beside_claims(results).items()}
    report = DialReport(results, gates, evaluate_claims(results) if passed else (), beside if passed else {})
    study = results.study
    drawn = _figures(results, report.claims) if passed else {}
    rates, costs = chosen_rates(study, results.cells), study.costs()
    context = {
        "results": results,
        "study": study,
        "gates": gates,
        "claims": report.claims,
        "passed": passed,
        "headline": headline(study, costs),
        "banks": list(dict.fromkeys(bank.name for row in study.rows for bank in row.banks)),
        "rates": rates,
        "edges": edges(study, rates),
        "tried": tried_rates(study, results.cells),
        "costs": costs,
        "beside": report.beside,
        "mean": _mean,
        "show_interval": show_interval,
        "figures": {name: title for name, (title, _) in drawn.items()},
    }
    files = {"report.md": make_environment(Path(__file__).parent).get_template("report.md").render(context)}
    for name, (_, svg) in drawn.items():
        files[f"figures/{name}.svg"] = on_white(svg)
    write_report_files(root, files)
    return report


def headline(study: DialStudy, costs: Mapping[str, DialCost]) -> str:
    """Returns which cost is equal, and which arms differ by over a tenth in the other one."""
    other = {"multiply_adds": "live_parameters", "live_parameters": "multiply_adds"}[study.control]
    off = {
        row.arm.name: getattr(costs[row.arm.name], other) / getattr(study.reference(row.arm), other) - 1
        for row in study.rows
    }
    named = [f"{name} {value:+.0%}" for name, value in off.items() if abs(value) > EQUAL_WITHIN]
    names = {"multiply_adds": "multiply-adds", "live_parameters": "live parameters"}
    equal = f"Arms of one reference have equal {names[study.control]}"
    return f"{equal}, but not equal {names[other]} ({', '.join(named)})." if named else f"{equal}."


def edges(study: DialStudy, rates: Mapping[str, float]) -> list[str]:
    """Returns the arms whose best rate is the smallest or the largest that was tried."""
    tried = study.tuning.rates
    return [name for name, rate in rates.items() if len(tried) > 2 and rate in (min(tried), max(tried))]


def format_dial(report: DialReport) -> str:
    """Returns a summary in a few lines, for a terminal."""
    results = report.results
    lines = [f"{results.study.name}: {len(results.done)} of {len(results.planned)} cells done"]
    lines += [
        f"  gate not passed: {gate.name}: {gate.value:.4g}, limit {gate.limit:g} ({gate.detail})"
        for gate in report.gates
        if not gate.passed
    ]
    if not report.passed:
        lines.append("  a gate is not passed, so nothing is interpreted")
    lines += [f"  {tested.code} {tested.verdict}" for tested in report.claims]
    lines.append(f"report: {results.root / 'report.md'}")
    return "\n".join(printable(line, LINE_LENGTH) for line in lines)


def _mean(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    if not len(known):
        return "-"
    spread = f" ({100 * known.std(ddof=1):.2f}; {100 * np.median(known):.2f})" if len(known) > 1 else ""
    return f"{format_percent(float(known.mean()))}{spread}"


def _figures(results: DialResults, claims: Sequence[TestedClaim]) -> dict[str, tuple[str, str]]:
    """Returns (title, SVG) of each figure for which there are cells, by file name."""
    found = {}
    if claimed := claimed_differences(claims, results.study.margin):
        found["claims"] = (CLAIMED_DIFFERENCES, claimed)
    dials = [results.dial_of(family, *BASE) for family in ("within", "across")]
    if all(len(banks) > 1 and banks[-1].name == "free" for banks in dials):  # where both meet
        title = "Accuracy from the separable end within filters, over free banks, to the separable end across filters"
        found["crossing"] = (title, _crossing(results))
    arms = [arm for arm in SEGMENTS if len(results.dial_of("across", arm)) > 1]
    if len(arms) > 1:
        found["segments"] = ("Accuracy by segments, along the dial across filters", _segments(results, arms))
    pairs = {
        label: (f"{DEPTHWISE}{suffix}", f"{REGULAR}{suffix}")
        for suffix, label in _PAIRS.items()
        if len(results.dial_of("across", f"{DEPTHWISE}{suffix}", f"{REGULAR}{suffix}")) > 1
    }
    if pairs:
        found["price"] = ("Depthwise first minus regular, by depth, width and training", _price(results, pairs))
    return found


def _points(results: DialResults, family: str, banks: Sequence[BankSpec]) -> list[float]:
    return [float(np.nanmean(results.of_banks(family, bank.name))) for bank in banks]


def _line(axes: Axes, x: Sequence[float], y: Sequence[Seeds], label: str, number: int) -> None:
    """Draws a line through the medians over seeds, and a dot for each seed: a network that collapsed is one dot."""
    style: dict[str, Any] = {"color": COLORS[number], "marker": "os^Dv"[number % 5]}
    axes.plot(x, [np.median(values) for values in y], label=legend_label(label), markersize=4.5, **style)
    for place, values in zip(x, y, strict=True):
        axes.scatter([place] * len(values), values, 9, alpha=0.45, linewidth=0, zorder=2, **style)


def _crossing(results: DialResults) -> str:
    """Draws the base arms over both dials: within filters to the left of the free bank, across them to the right."""
    within, across = (results.dial_of(family, *BASE) for family in ("within", "across"))
    left, right = np.array(_points(results, "within", within)), np.array(_points(results, "across", across))
    free = left[-1], right[-1]
    x = [*(left - free[0]), *(free[1] - right[-2::-1])]
    banks = [bank.name for bank in (*within, *across[-2::-1])]

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=ZERO, linewidth=1)
        bayes = [results.of_banks("bayes_accuracy", bank).mean() for bank in banks]
        axes.plot(x, bayes, color=QUIET, linewidth=1, linestyle=(0, (4, 2)), label="best possible")
        for number, (arm, label) in enumerate(_CROSSING.items()):
            trained = {bank.name for bank in results.banks_of(arm)}
            own = [(place, bank) for place, bank in zip(x, banks, strict=True) if bank in trained]
            if own:
                accuracies = [results.accuracy(arm, bank) for _, bank in own]
                _line(axes, [place for place, _ in own], accuracies, label, number)
        dials = np.arange(0, min(free) - 0.02, 0.2)
        axes.set_xticks([*(dials - free[0]), *(free[1] - dials)], [f"{dial:.1f}" for dial in (*dials, *dials)])
        places = (("separable within filters", "left", -free[0]), ("free", "center", 0))
        for text, align, place in (*places, ("separable across filters", "right", free[1])):
            axes.text(place, 1.02, text, ha=align, transform=axes.get_xaxis_transform())
        axes.set_xlabel("dial: 1 - share of the best rank-one part of each filter (left), channel (right)", color=QUIET)
        axes.set_ylabel("test accuracy", color=QUIET)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.legend()

    return draw_svg(560, 320, (0.1, 0.15, 0.88, 0.77), draw)


def _segments(results: DialResults, arms: Sequence[str]) -> str:
    def draw(axes: Axes) -> None:
        for number, arm in enumerate(arms):
            banks = results.dial_of("across", arm)
            accuracies = [results.accuracy(arm, bank.name) for bank in banks]
            _line(axes, _points(results, "across", banks), accuracies, arm.replace("_", " "), number)
        axes.set_xlabel(_ACROSS, color=QUIET)
        axes.set_ylabel("test accuracy", color=QUIET)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend()

    return draw_svg(420, 300, (0.17, 0.17, 0.81, 0.79), draw)


def _price(results: DialResults, pairs: Mapping[str, tuple[str, str]]) -> str:
    margin = 100 * results.study.margin

    def draw(axes: Axes) -> None:
        axes.axhspan(-margin, margin, color=MARGIN, zorder=0, linewidth=0)
        axes.axhline(0, color=ZERO, linewidth=1)
        for number, (label, (arm, baseline)) in enumerate(pairs.items()):
            banks = results.dial_of("across", arm, baseline)
            effects = [
                100 * (results.accuracy(arm, bank.name) - results.accuracy(baseline, bank.name)) for bank in banks
            ]
            _line(axes, _points(results, "across", banks), effects, label, number)
        axes.set_xlabel(_ACROSS, color=QUIET)
        axes.set_ylabel("depthwise first - regular, points", color=QUIET)
        axes.legend()

    return draw_svg(420, 300, (0.17, 0.17, 0.81, 0.79), draw)
