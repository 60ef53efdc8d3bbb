"""The report of a study: report.html in one file, report.md with figures/, cells.csv, the lines a run ends with."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from xception_jax.config import to_json
from xception_jax.files import write_atomically
from xception_jax.logs.console import format_count, format_duration
from xception_jax.study import figures
from xception_jax.study.results import COLUMNS, Results, collect
from xception_jax.study.statistics import Estimate
from xception_jax.study.store import read_study

_MAX_CURVES = 7  # in one figure
_COSTS = {
    "parameters": ("Against parameters", "parameters"),
    "multiply_adds": ("Against multiply-adds", "multiply-adds for an image"),
    "images_per_second": ("Against measured speed", "images/s while training"),
}


def write_study_report(root: Path) -> Results:
    """Analyses a study directory and writes report.html, report.md, figures/*.svg and cells.csv into it.

    Raises:
      InputMissingError, BadDataError: there is no study, or it is damaged.
      OSError: a file could not be written.
    """
    results = collect(read_study(root))
    drawn = _figures(results)
    context = _context(results, drawn)
    for name, escape in (("report.html", True), ("report.md", False)):
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=escape,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {
            "percent": _percent,
            "points": _points,
            "interval": _interval,
            "p": _p,
            "count": format_count,
            "number": _number,
            "duration": format_duration,
        }
        write_atomically(root / name, environment.get_template(name).render(context))
    (root / "figures").mkdir(exist_ok=True)
    for name, figure in drawn.items():
        standing_alone = str(figure["svg"]).replace("<svg ", '<svg style="background: white" ', 1)
        write_atomically(root / "figures" / f"{name}.svg", standing_alone)
    write_atomically(root / "cells.csv", cells_csv(results))
    return results


def cells_csv(results: Results) -> str:
    """Returns the raw data: a row for each cell, empty where nothing is known yet."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results.rows)
    return buffer.getvalue()


def format_results(results: Results) -> str:
    """Returns the results in a few lines, for a terminal."""
    done = sum(row["exit_code"] == 0 for row in results.rows)
    lines = [f"{results.stored.study.name}: {done} of {len(results.rows)} cells done"]
    for entry in results.comparisons:
        d = entry.difference
        outcome = f" ({entry.outcome})" if entry.outcome else ""
        lines.append(
            f"  {entry.comparison.name}: {_points(d.mean)} {_interval(d)} points, n={d.n}, Holm p {_p(entry.p_holm)}: "
            f"{entry.verdict}{outcome}"
        )
    for interaction in results.interactions:
        if interaction.trend is not None:
            slope = interaction.trend.slope
            lines.append(
                f"  {interaction.interaction.name}: slope {_points(slope.mean)} {_interval(slope)} points "
                f"{_unit(results)}, change of sign: {interaction.trend.flips} ({interaction.outcome})"
            )
    lines.append(f"report: {results.stored.root / 'report.html'}")
    return "\n".join(lines)


def _unit(results: Results) -> str:
    return "a doubling" if results.logarithmic else f"a unit of {results.stored.study.axis}"


def _context(results: Results, drawn: dict[str, dict[str, Any]]) -> dict[str, Any]:
    study = results.stored.study
    codes = [row["exit_code"] for row in results.rows]
    return {
        "study": study,
        "stored": results.stored,
        "results": results,
        "config_json": to_json(study.config),
        "columns": COLUMNS,
        "done": codes.count(0),
        "failed": [row for row in results.rows if row["exit_code"] not in (None, 0, 75)],
        "reference": results.stored.costs[study.reference],
        "unit": _unit(results),
        "seconds": sum(row["seconds"] for row in results.rows if not row["reused_from"]),
        "reused": sum(bool(row["reused_from"]) for row in results.rows),
        "edges": [arm for arm in results.arms if arm.tuned_at_edge],
        "drawn": drawn,
        "main_figures": [drawn[name] for name in ("axis", "effects") if name in drawn],
        "cost_figures": [drawn[name] for name in _COSTS if name in drawn],
        "curves": [_marked(title, svg) for title, svg in _curves(results) if svg],
    }


def _figures(results: Results) -> dict[str, dict[str, Any]]:
    """Returns the figures for which there are results, by the name of their file."""
    drawn = {
        "axis": ("Accuracy over the axis", figures.over_axis(results)),
        "effects": ("Effects over the axis", figures.effects(results)),
        "comparisons": ("Paired differences", figures.forest(results)),
    }
    for name, (title, label) in _COSTS.items():
        drawn[name] = (title, figures.over_cost(results, name, label))
    return {name: _marked(title, svg) for name, (title, svg) in drawn.items() if svg}


def _curves(results: Results) -> list[tuple[str, str | None]]:
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
    # matplotlib escapes the names in an SVG's text; everything else in it is drawn from numbers.
    return {"title": title, "svg": Markup(svg)}


def _percent(share: float | None, digits: int = 2) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}" if math.isfinite(share) else "-"


def _interval(estimate: Estimate, kind: str = "t") -> str:
    ends = (estimate.low, estimate.high) if kind == "t" else (estimate.bootstrap_low, estimate.bootstrap_high)
    return f"[{_points(ends[0])}, {_points(ends[1])}]" if math.isfinite(ends[0]) else "[-, -]"


def _p(value: float) -> str:
    return "-" if not math.isfinite(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _number(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
