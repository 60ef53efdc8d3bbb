"""What a study has found so far: a row for each cell, estimates for each arm, comparisons and interactions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from xception_jax.logs.metrics_log import json_ready, read_metrics
from xception_jax.study import statistics
from xception_jax.study.cells import Cell, read_outcome
from xception_jax.study.design import CHANNELS_PER_SEGMENT, Comparison, Interaction
from xception_jax.study.statistics import Estimate, Trend
from xception_jax.study.store import StoredStudy

COLUMNS = (
    "arm", "seed", "exit_code", "test_accuracy", "dev_accuracy", "width_multiplier", "parameters", "multiply_adds",
    "channels_per_segment", "images_per_second", "steps", "seconds", "learning_rate", "weight_decay", "config_hash",
    "reused_from",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """An arm over its seeds.

    Attributes:
      name, line: of the arm.
      x: where it lies on the study's axis; NaN without one.
      accuracy: on the test split.
      images_per_second: while training.
      parameters, multiply_adds, width_multiplier: of its network.
      tuned: what the search chose, by field.
      tuned_at_edge: fields whose best value was the smallest or largest tried.
      failed: exit codes by seed, of the cells that failed.
      curve: (steps, mean, half width of the 95 % interval) of the development accuracy over the training.
    """

    name: str
    line: str
    x: float
    accuracy: Estimate
    images_per_second: Estimate
    parameters: int
    multiply_adds: int
    width_multiplier: float
    tuned: Mapping[str, Any]
    tuned_at_edge: tuple[str, ...]
    failed: Mapping[int, int]
    curve: tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ComparisonResult:
    """A paired difference in test accuracy.

    Attributes:
      comparison: what is compared.
      difference: over the seeds that both arms have.
      p_holm: its p-value, corrected for all comparisons of the study.
      p_equivalent: of the two one-sided tests against the margin.
      verdict: see `statistics.verdict`.
      outcome: 'as expected', 'against it', 'undecided'; '' where nothing was expected.
      detectable: the true difference that so many seeds find in 80 % of studies.
    """

    comparison: Comparison
    difference: Estimate
    p_holm: float
    p_equivalent: float
    verdict: str
    outcome: str
    detectable: float


@dataclasses.dataclass(frozen=True)
class InteractionResult:
    """How an effect goes along the axis.

    Attributes:
      interaction: what was expected.
      x: the points, where they lie in figures.
      effects: the paired difference at each.
      trend: slope (a doubling of x where the axis is logarithmic), ends and their contrast; None with fewer than two
        points or seeds.
      seeds: that have every point.
      outcome: 'as expected', 'against it', 'undecided'.
    """

    interaction: Interaction
    x: tuple[float, ...]
    effects: tuple[Estimate, ...]
    trend: Trend | None
    seeds: int
    outcome: str


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that a report shows."""

    stored: StoredStudy
    rows: tuple[dict[str, Any], ...]
    arms: tuple[ArmResult, ...]
    comparisons: tuple[ComparisonResult, ...]
    interactions: tuple[InteractionResult, ...]

    @property
    def logarithmic(self) -> bool:
        """Whether the axis is one of doublings."""
        return self.stored.study.axis == CHANNELS_PER_SEGMENT

    def to_json(self) -> dict[str, Any]:
        """Returns the results as plain data; what is not known is null."""
        study = self.stored.study
        return json_ready(
            {
                "study": study.name,
                "question": study.question,
                "hypothesis": study.hypothesis,
                "margin": study.margin,
                "control": study.control,
                "metric": study.metric,
                "history": list(self.stored.history),
                "arms": [dataclasses.asdict(dataclasses.replace(arm, curve=None)) for arm in self.arms],  # type: ignore[arg-type]
                "comparisons": [dataclasses.asdict(comparison) for comparison in self.comparisons],
                "interactions": [dataclasses.asdict(interaction) for interaction in self.interactions],
                "cells": list(self.rows),
            }
        )


def collect(stored: StoredStudy) -> Results:
    """Reads all cells of a study directory, finished or not, and analyses those that have a test accuracy.

    A cell counts only if it ended with exit code 0: an accuracy from before a failure would be a choice.
    """
    study = stored.study
    cells = stored.cells()
    rows = tuple(_row(stored, cell) for cell in cells)
    accuracy = {(row["arm"], row["seed"]): row["test_accuracy"] if row["exit_code"] == 0 else None for row in rows}
    speeds = {(row["arm"], row["seed"]): row["images_per_second"] for row in rows}

    def values(table: Mapping[tuple[str, int], Any], arm: str) -> np.ndarray:
        return np.array([math.nan if (v := table.get((arm, seed))) is None else v for seed in study.seeds], float)

    tuned = stored.tuned()
    arms = []
    for arm in study.arms:
        cost = stored.costs[arm.name]
        own = [cell for cell in cells if cell.arm == arm.name]
        codes = {row["seed"]: row["exit_code"] for row in rows if row["arm"] == arm.name}
        arms.append(
            ArmResult(
                name=arm.name,
                line=arm.line,
                x=_axis_value(stored, arm.name),
                accuracy=statistics.estimate(values(accuracy, arm.name)),
                images_per_second=statistics.estimate(values(speeds, arm.name)),
                parameters=cost.parameters,
                multiply_adds=cost.multiply_adds,
                width_multiplier=cost.width_multiplier,
                tuned=tuned.get(arm.name, {}),
                tuned_at_edge=_at_edge(study.search.trials if study.search else (), tuned.get(arm.name, {})),
                failed={seed: code for seed, code in codes.items() if code not in (None, 0, 75)},
                curve=_curve(own, study.metric),
            )
        )

    differences = [values(accuracy, c.arm) - values(accuracy, c.baseline) for c in study.comparisons]
    estimates = [statistics.estimate(difference) for difference in differences]
    adjusted = statistics.holm([difference.p for difference in estimates])
    comparisons = []
    for c, values_of, difference, p in zip(study.comparisons, differences, estimates, adjusted, strict=True):
        verdict = statistics.verdict(difference, study.margin, p)
        comparisons.append(
            ComparisonResult(
                comparison=c,
                difference=difference,
                p_holm=p,
                p_equivalent=statistics.equivalence_p(values_of, study.margin),
                verdict=verdict,
                outcome=_outcome(c.expected, verdict),
                detectable=statistics.smallest_effect(difference.sd, difference.n),
            )
        )

    interactions = []
    for interaction in study.interactions:
        pairs = sorted(interaction.pairs, key=lambda pair: _axis_value(stored, pair[0]))
        x = [_axis_value(stored, arm) for arm, _ in pairs]
        effects = np.stack([values(accuracy, arm) - values(accuracy, base) for arm, base in pairs], axis=1)
        whole = np.isfinite(effects).all(1)
        places = np.log2(x) if study.axis == CHANNELS_PER_SEGMENT else x
        trend = statistics.trend(places, effects) if whole.sum() >= 2 and len(set(x)) > 1 else None
        interactions.append(
            InteractionResult(
                interaction=interaction,
                x=tuple(x),
                effects=tuple(statistics.estimate(column) for column in effects.T),
                trend=trend,
                seeds=int(whole.sum()),
                outcome=_interaction_outcome(interaction.expected, trend, study.margin),
            )
        )
    return Results(stored, rows, tuple(arms), tuple(comparisons), tuple(interactions))


def _row(stored: StoredStudy, cell: Cell) -> dict[str, Any]:
    cost, config = stored.costs[cell.arm], cell.config
    record = cell.record()
    values = (
        dataclasses.asdict(cost)
        | read_outcome(cell, stored.study.metric)
        | {
            "arm": cell.arm,
            "seed": cell.seed,
            "exit_code": record.get("exit_code"),
            "learning_rate": config.schedule.learning_rate,
            "weight_decay": config.optimizer.weight_decay,
            "config_hash": cell.config_hash,
            "reused_from": record.get("reused_from", ""),
        }
    )
    return {name: values[name] for name in COLUMNS}


def _axis_value(stored: StoredStudy, arm: str) -> float:
    axis = stored.study.axis
    if axis == "":
        return math.nan
    if axis == CHANNELS_PER_SEGMENT:
        return stored.costs[arm].channels_per_segment
    value: Any = stored.study.arm_config(stored.study.arm(arm))
    for key in axis.split("."):
        value = value[key]
    return float(value)


def _curve(cells: list[Cell], metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the development accuracy at the steps that all finished cells have, its mean and half interval."""
    curves = []
    for cell in cells:
        if cell.record().get("exit_code") == 0:
            entries = read_metrics(cell.directory / "metrics.jsonl")
            curves.append({e["step"]: e[metric] for e in entries if e["split"] == "dev" and metric in e})
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    points = np.array([[curve[step] for curve in curves] for step in steps]).reshape(len(steps), len(curves))
    if len(curves) < 2:
        return np.array(steps), points.mean(1) if curves else np.zeros(0), np.zeros(len(steps))
    low, high, _ = statistics.t_intervals(points)
    return np.array(steps), points.mean(1), (high - low) / 2


def _at_edge(trials: tuple[Mapping[str, Any], ...], chosen: Mapping[str, Any]) -> tuple[str, ...]:
    edges = []
    for name, value in chosen.items():
        tried = {trial[name] for trial in trials if name in trial}
        if len(tried) > 2 and value in (min(tried), max(tried)):
            edges.append(name)
    return tuple(edges)


def _outcome(expected: str, verdict: str) -> str:
    if expected == "unknown":
        return ""
    if verdict == "undecided":
        return "undecided"
    return "as expected" if verdict == expected else "against it"


def _interaction_outcome(expected: str, trend: Trend | None, margin: float) -> str:
    """Compares what was expected with what was found.

    A flip needs the slope and both ends. Against it speak a slope the other way, or ends settled otherwise.
    """
    if trend is None:
        return "undecided"
    if trend.flips == expected != "no":
        return "as expected"
    ends = [statistics.verdict(end, margin, end.p) for end in (trend.first, trend.last)]
    settled = "undecided" not in ends
    if expected == "no":
        return "against it" if trend.flips != "no" else "as expected" if settled else "undecided"
    falls, rises = trend.slope.high < 0, trend.slope.low > 0
    opposite = falls if expected == "rises through zero" else rises
    return "against it" if settled or opposite else "undecided"
