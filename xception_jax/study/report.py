"""Writes the report of a study: report.html, report.md with figures/, cells.csv, and a summary for the terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from markupsafe import Markup

from xception_jax.config import to_json
from xception_jax.errors import DivergedError
from xception_jax.names import LINE_LENGTH, csv_cell, printable
from xception_jax.reports.environment import format_interval, format_p, format_points, make_environment
from xception_jax.reports.style import on_white, themed
from xception_jax.study import figures
from xception_jax.study.activation_files import ACTIVATION_COLUMNS, activations_csv
from xception_jax.study.cells import State, state_of
from xception_jax.study.collect import collect
from xception_jax.study.controls import cost_headline, deviations
from xception_jax.study.design import COSTS
from xception_jax.study.inference import Estimate
from xception_jax.study.predictions import write_answers
from xception_jax.study.results import Results
from xception_jax.study.rows import COLUMNS
from xception_jax.study.store import read_study, write_report_files
from xception_jax.study.turns import mean_shares, read_turns
from xception_jax.study.verdicts import NOT_INTERPRETED

# What an interval of each analysis is.
INTERVALS = {
    "paired": "Student's t over paired seeds",
    "welch": "Welch's t over independent seeds",
    "pooled": "Student's t over independent seeds, with a variance pooled over all arms",
    "crossed": "t over seeds and test images, both random",
}
HIDDEN = "Accuracies are shown once all cells have ended, because this study states its claims beforehand."
_MAX_CURVES = 7  # in one figure
_COSTS = {
    **{name: (f"Against {label}", label) for name, label in COSTS.items()},
    "images_per_second": ("Against measured speed", "training speed, images/s"),
}


def write_study_report(root: Path) -> Results:
    """Analyses a study directory and writes its reports, figures, cells.csv, activations.csv and predictions.npz.

    Raises:
      InputMissingError: there is no study in the directory.
      BadDataError: the study is damaged.
      StorageError: a file could not be written.
    """
    results = collect(read_study(root))
    drawn = _figures(results)
    context = _context(results, drawn)
    environment = make_environment(Path(__file__).parent)
    files = {name: environment.get_template(name).render(context) for name in ("report.html", "report.md")}
    for name, figure in drawn.items():
        files[f"figures/{name}.svg"] = on_white(figure["file"])
    files["cells.csv"] = cells_csv(results)
    if found := activations_csv(results.stored.cells() if results.stored.study.activations else []):
        files["activations.csv"] = found
    write_answers(root, dict(results.answers))
    write_report_files(root, files)
    return results


def cells_csv(results: Results) -> str:
    """Returns the raw data as CSV: a row for each cell, with empty fields for unknown values."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in results.rows)
    return buffer.getvalue()


def format_results(results: Results) -> str:
    """Returns a summary in a few lines, for a terminal."""
    done = len(_cells_in(results, "done"))
    lines = [f"{results.stored.study.name}: {done} of {len(results.rows)} cells done"]
    if results.hidden:
        lines.append(f"  {HIDDEN}")
    if results.below_gate:
        lines.append(f"  {gate_notice(results)}")
    for gate in results.gates:
        if not gate.passed and not results.hidden:
            found = f"{gate.name}: {gate.value:.4g}, limit {gate.limit:g} ({gate.detail})"
            lines.append(f"  gate not passed, so that nothing is interpreted: {found}")
    for entry in results.comparisons:
        d = entry.difference
        outcome = f" ({entry.outcome})" if entry.outcome else ""
        lines.append(
            f"  {entry.comparison.name}: {_difference(d)} points, n={d.n}, Holm p {format_p(entry.p_holm)}: "
            f"{entry.verdict}{outcome}"
        )
    for tested in results.claims:
        lines.append(f"  {tested.code}: {tested.verdict}, Holm p {tested.p_text}: {tested.text}")
        lines += [f"    {part.name}: {part.interval}, claimed: {part.claimed}: {part.state}" for part in tested.parts]
    for interaction in results.interactions:
        if interaction.trend is not None:
            found = NOT_INTERPRETED if interaction.outcome == NOT_INTERPRETED else interaction.trend.flips
            lines.append(
                f"  {interaction.interaction.name}: slope {_difference(interaction.trend.slope)} points "
                f"{results.stored.study.per_unit}, change of sign: {found} ({interaction.outcome})"
            )
    lines.append(f"report: {results.stored.root / 'report.html'}")
    return "\n".join(printable(line, LINE_LENGTH) for line in lines)


def gate_notice(results: Results) -> str:
    """Returns what the report says about the training accuracy of the arms; '' if all of them pass the gate."""
    gate, below = results.stored.study.gate, results.below_gate
    if gate is None:
        return "No gate on the training accuracy was stated: differences may reflect how fast the arms train."
    if not below:
        return ""
    return (
        f"The training accuracy of {', '.join(below)} is below the gate of {gate:.1%}. Differences with these arms may "
        "reflect how fast they train, and are not interpreted."
    )


def _difference(estimate: Estimate) -> str:
    return f"{format_points(estimate.mean)} {format_interval((estimate.low, estimate.high))}"


def _cells_in(results: Results, state: State) -> list[dict[str, Any]]:
    return [row for row in results.rows if state_of(row["exit_code"]) == state]


def _context(results: Results, drawn: dict[str, dict[str, Any]]) -> dict[str, Any]:
    study = results.stored.study
    return {
        "study": study,
        "durations": " or ".join(dict.fromkeys(study.arm_config(arm).duration for arm in study.arms)),
        "stored": results.stored,
        "results": results,
        "config_json": to_json(study.config),
        "columns": COLUMNS,
        "done": len(_cells_in(results, "done")),
        "hidden": HIDDEN if results.hidden else "",
        "failed": _cells_in(results, "failed"),
        "stopped": _cells_in(results, "stopped"),
        "diverged": DivergedError.exit_code,
        "costs": COSTS,
        "headline": cost_headline(study, results.stored.costs),
        "not_equal": set(deviations(study, results.stored.costs)) - set(study.unequal),
        "reference": results.stored.costs[study.reference],
        "unit": results.stored.study.per_unit,
        "seconds": sum(row["seconds"] for row in results.rows if not row["reused_from"]),
        "cpu_seconds": sum(row["cpu_seconds"] or 0 for row in results.rows if not row["reused_from"]),
        "reused": sum(bool(row["reused_from"]) for row in results.rows),
        "edges": [arm for arm in results.arms if arm.tuned_at_edge],
        "drawn": drawn,
        "gate": gate_notice(results),
        "interval": INTERVALS[study.analysis],
        "claims": list(dict.fromkeys(entry.claim for entry in study.comparisons)),
        "activations": _activations(results),
        "turns": mean_shares(read_turns(results.stored.root)),
        "main_figures": [drawn[name] for name in ("axis", "effects") if name in drawn],
        "cost_figures": [drawn[name] for name in _COSTS if name in drawn],
        "curves": [_marked(title, svg) for title, svg in _curves(results) if svg],
    }


def _activations(results: Results) -> dict[str, list[float]]:
    """Returns the means over finished cells of what the arms measured in front of their activations."""
    found: dict[str, list[float]] = {}
    for arm in results.arms:
        rows = [row for row in _cells_in(results, "done") if row["arm"] == arm.name and row["dead_end"] is not None]
        if rows:
            found[arm.name] = [sum(row[name] for row in rows) / len(rows) for name in ACTIVATION_COLUMNS]
    return found


def _figures(results: Results) -> dict[str, dict[str, Any]]:
    """Returns the figures for which there are results, by file name."""
    drawn = {
        "axis": ("Accuracy over the axis", figures.over_axis(results)),
        "effects": ("Effects over the axis", figures.effects(results)),
        "claims": (
            figures.CLAIMED_DIFFERENCES,
            figures.claimed_differences(results.claims, results.stored.study.margin),
        ),
        "comparisons": ("Differences", figures.forest(results)),
    }
    for name, (title, label) in _COSTS.items():
        drawn[name] = (title, figures.over_cost(results, name, label))
    return {name: _marked(title, svg) for name, (title, svg) in drawn.items() if svg}


def _curves(results: Results) -> list[tuple[str, str | None]]:
    """Returns learning curves: all in one figure if they fit, else one or more figures for each line of arms."""
    lines = list(dict.fromkeys(arm.line for arm in results.arms))
    groups = [(line, [arm for arm in results.arms if arm.line == line]) for line in lines]
    if len(results.arms) <= _MAX_CURVES:
        groups = [("", list(results.arms))]
    return [
        (line, figures.learning_curves(arms[start : start + _MAX_CURVES]))
        for line, arms in groups
        for start in range(0, len(arms), _MAX_CURVES)
    ]


def _marked(title: str, svg: str) -> dict[str, Any]:
    # Safe without escaping: matplotlib escapes the names in the text of an SVG, and draws the rest from numbers.
    return {"title": title, "svg": Markup(themed(svg)), "file": svg}
