"""Computes the results of a study so far: a row for each cell, estimates for each arm, comparisons, interactions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
from jaxtyping import Float

from xception_jax.logs.metrics_log import read_metrics
from xception_jax.study import inference
from xception_jax.study.analysis import ANALYSES, Sample, crossed, crossed_pairs, resample_images, versus
from xception_jax.study.cells import Cell, state_of
from xception_jax.study.checks import field_value
from xception_jax.study.claims import of_differences
from xception_jax.study.design import CHANNEL_AXES
from xception_jax.study.gates import check_gates
from xception_jax.study.inference import Trend
from xception_jax.study.predictions import Answers, read_answers
from xception_jax.study.results import ArmResult, ComparisonResult, Curve, InteractionResult, Results
from xception_jax.study.rows import ACCURACIES, row_of
from xception_jax.study.store import StoredStudy
from xception_jax.study.tested_claims import Measured, evaluate_claims
from xception_jax.study.turns import lacks_turns, read_turns
from xception_jax.study.verdicts import NOT_INTERPRETED


class _Values:
    """Values of the cells of a study, as one array of seeds for each arm.

    Args:
      rows: rows of the cells that count.
      seeds: seeds of the study.
      name: the column.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], name: str):
        self._values = {(row["arm"], row["seed"]): row[name] for row in rows if row[name] is not None}
        self._seeds = seeds

    def of(self, arm: str) -> Float[np.ndarray, " seeds"]:
        """Returns the value for each seed, NaN where there is none."""
        return np.array([self._values.get((arm, seed), math.nan) for seed in self._seeds], float)


def collect(stored: StoredStudy) -> Results:
    """Reads all cells of a study directory and analyses those that are done.

    A cell counts only if it ended with exit code 0. Counting an accuracy from before a failure would be a choice.

    If the study states claims, accuracies stay unknown until all cells have ended: whoever had read some of them could
    no longer decide about seeds, gates or cells that failed without knowing the outcome. Cells of an arm without a
    learning rate, because all of its trials have failed, are not waited for.
    """
    cells = stored.cells()
    trials = stored.search()
    tuned = {arm.name for arm in stored.study.arms}
    if trials and not _some_unfinished(trials):
        tuned = set(stored.tuned())
    hidden = bool(stored.study.claims) and _some_unfinished([cell for cell in cells if cell.arm in tuned])
    unknown = dict.fromkeys(ACCURACIES) if hidden else {}
    rows = tuple(row_of(stored, cell) | unknown for cell in cells)
    done = [row for row in rows if state_of(row["exit_code"]) == "done"]
    accuracy = _Values(done, stored.study.seeds, "test_accuracy")
    answers = read_answers(stored.root, [cell for cell in cells if cell.state() == "done"])
    arms = _arms(stored, [] if hidden else cells, rows, accuracy)
    complete = {arm.name: arm.accuracy.mean if arm.accuracy.n == len(stored.study.seeds) else math.nan for arm in arms}
    turns = read_turns(stored.root)
    if lacks_turns(stored.study, turns):
        turns = []  # a gate about some of the seeds is none
    gates = check_gates(stored.study.gates, complete, turns)
    open_to_claims = hidden or all(gate.passed for gate in gates)
    below = {arm.name for arm in arms if arm.passes is False or not open_to_claims}
    samples = _samples(stored, accuracy, answers)
    return Results(
        stored,
        hidden,
        rows,
        arms,
        () if hidden else _comparisons(stored, samples, below),
        () if hidden else _interactions(stored, samples, below),
        evaluate_claims(stored.study.claims, _measured(stored, samples), stored.study.analysis, below),
        gates,
        answers,
    )


def _some_unfinished(cells: Iterable[Cell]) -> bool:
    """Returns whether some of the cells have not ended."""
    return any(cell.state() in ("waiting", "stopped") for cell in cells)


def _measured(stored: StoredStudy, samples: Mapping[str, Sample]) -> Measured:
    """Returns what claims are tested on."""
    x = {arm: _axis_value(stored, arm) for arm in samples}
    positions = {arm: math.log2(value) for arm, value in x.items()} if stored.study.logarithmic else x
    return Measured(samples, positions, f"points {stored.study.per_unit}")


def read_samples(stored: StoredStudy) -> dict[str, Sample]:
    """Returns the finished cells of each arm."""
    done = [cell for cell in stored.cells() if cell.state() == "done"]
    accuracy = _Values([row_of(stored, cell) for cell in done], stored.study.seeds, "test_accuracy")
    return _samples(stored, accuracy, read_answers(stored.root, done))


def _arms(
    stored: StoredStudy, cells: Sequence[Cell], rows: Sequence[Mapping[str, Any]], accuracy: _Values
) -> tuple[ArmResult, ...]:
    study, tuned = stored.study, stored.tuned()
    speeds = _Values(rows, study.seeds, "images_per_second")
    training = _Values([row for row in rows if state_of(row["exit_code"]) == "done"], study.seeds, "train_accuracy")
    arms = []
    for arm in study.arms:
        chosen, own_cells = tuned.get(arm.name, {}), [cell for cell in cells if cell.arm == arm.name]
        reached, finished = inference.estimate(training.of(arm.name)), sum(c.state() == "done" for c in own_cells)
        codes = {row["seed"]: row["exit_code"] for row in rows if row["arm"] == arm.name}
        arms.append(
            ArmResult(
                name=arm.name,
                line=arm.line,
                x=_axis_value(stored, arm.name),
                accuracy=inference.estimate(accuracy.of(arm.name)),
                train_accuracy=reached,
                passes=None
                if study.gate is None or not finished
                else reached.n == finished and reached.mean >= study.gate,
                images_per_second=inference.estimate(speeds.of(arm.name)),
                cost=stored.costs[arm.name],
                tuned=chosen,
                tuned_at_edge=_at_edge(study.trials, chosen),
                failed={seed: code for seed, code in codes.items() if state_of(code) == "failed"},
                curve=_curve(own_cells, "dev", study.metric),
                train_curve=_curve(own_cells, "train", "top1"),
            )
        )
    return tuple(arms)


def _samples(stored: StoredStudy, accuracy: _Values, answers: Mapping[tuple[str, int], Answers]) -> dict[str, Sample]:
    """Returns the finished cells of each arm, with their answers if all cells have some and the metric counts them."""
    study = stored.study
    if study.metric != study.metric_of_answers:
        answers = {}
    resampled = dict(zip(answers, resample_images(_right(answers.values())).T, strict=True)) if answers else {}
    samples = {}
    for arm in study.arms:
        values = accuracy.of(arm.name)
        keys = [(arm.name, seed) for seed, value in zip(study.seeds, values, strict=True) if math.isfinite(value)]
        if keys and all(key in answers for key in keys):
            right, again = _right(answers[key] for key in keys), np.stack([resampled[key] for key in keys], axis=1)
            samples[arm.name] = Sample(values, right, again)
        else:
            samples[arm.name] = Sample(values)
    return samples


def _right(answers: Iterable[Answers]) -> np.ndarray:
    return np.stack([each.right for each in answers])


def _comparisons(stored: StoredStudy, samples: Mapping[str, Sample], below: Set[str]) -> tuple[ComparisonResult, ...]:
    study = stored.study
    of_images = crossed_pairs if study.analysis == "paired" else crossed
    pairs = [versus(entry.arm, entry.baseline) for entry in study.comparisons]
    estimates = [ANALYSES[study.analysis](pair, samples) for pair in pairs]
    adjusted = inference.holm_within([entry.claim for entry in study.comparisons], [found.p for found in estimates])
    results = []
    for comparison, pair, difference, p in zip(study.comparisons, pairs, estimates, adjusted, strict=True):
        gated = below & {comparison.arm, comparison.baseline}
        verdict = NOT_INTERPRETED if gated else inference.verdict(difference, study.margin, p)
        results.append(
            ComparisonResult(
                comparison=comparison,
                difference=difference,
                over_images=of_images(pair, samples),
                p_holm=p,
                p_equivalent=inference.tost_p(difference, study.margin),
                verdict=verdict,
                outcome=NOT_INTERPRETED if gated else _outcome(comparison.expected, verdict),
                detectable=inference.smallest_effect(difference.error, difference.df),
            )
        )
    return tuple(results)


def _interactions(stored: StoredStudy, samples: Mapping[str, Sample], below: Set[str]) -> tuple[InteractionResult, ...]:
    study, results = stored.study, []
    for interaction in study.interactions:
        pairs = sorted(interaction.pairs, key=lambda pair: _axis_value(stored, pair[0]))
        x = [_axis_value(stored, arm) for arm, _ in pairs]

        def weighted(weights: np.ndarray, pairs: Sequence[tuple[str, str]] = pairs) -> inference.Estimate:
            return ANALYSES[study.analysis](of_differences(zip(pairs, weights, strict=True)), samples)

        complete = int(np.isfinite([samples[arm].accuracy for pair in pairs for arm in pair]).all(0).sum())
        positions = np.log2(x) if study.logarithmic else x
        trend = inference.trend(positions, weighted) if complete >= 2 and len(set(x)) > 1 else None
        results.append(
            InteractionResult(
                interaction=interaction,
                x=tuple(x),
                effects=tuple(weighted(point) for point in np.eye(len(pairs))),
                trend=trend,
                seeds=complete,
                outcome=NOT_INTERPRETED
                if below & {arm for pair in pairs for arm in pair}
                else _interaction_outcome(interaction.expected, trend, study.margin),
            )
        )
    return tuple(results)


def _axis_value(stored: StoredStudy, arm: str) -> float:
    axis = stored.study.axis
    if axis == "":
        return math.nan
    if axis in CHANNEL_AXES:
        return stored.costs[arm].channels_per_segment
    return float(field_value(stored.study.arm_config(stored.study.arm(arm)), axis))


def _curve(cells: list[Cell], split: str, metric: str) -> Curve:
    """Returns (steps, mean, half width of the interval) of the accuracy of an arm on a split.

    Only steps that all finished cells have are included.
    """
    curves = []
    for cell in cells:
        if cell.state() == "done":
            entries = read_metrics(cell.metrics_file())
            curves.append({e["step"]: e[metric] for e in entries if e["split"] == split and metric in e})
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    points = np.array([[curve[step] for curve in curves] for step in steps]).reshape(len(steps), len(curves))
    if len(curves) < 2:
        return np.array(steps), points.mean(1) if curves else np.zeros(0), np.zeros(len(steps))
    low, high, _ = inference.t_intervals(points)
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
    """Compares the expected course of an effect with the result.

    A change of sign is 'as expected' only if the slope and both ends are significant. It is 'against it' if the slope
    is significant in the other direction, or if both ends are decided otherwise.
    """
    if expected == "unknown":
        return ""
    if trend is None:
        return "undecided"
    if trend.flips == expected != "no":
        return "as expected"
    ends = [inference.verdict(end, margin, end.p) for end in (trend.first, trend.last)]
    settled = "undecided" not in ends
    if expected == "no":
        return "against it" if trend.flips != "no" else "as expected" if settled else "undecided"
    falls, rises = trend.slope.high < 0, trend.slope.low > 0
    opposite = falls if expected == "rises through zero" else rises
    as_expected = ["worse", "better"] if expected == "rises through zero" else ["better", "worse"]
    return "against it" if opposite or (settled and ends != as_expected) else "undecided"
