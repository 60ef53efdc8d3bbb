"""Plans the seeds of a study from the variance of a pilot: how many decide the margin?"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from xception_jax.errors import BadDataError, UsageError
from xception_jax.logs.metrics_log import json_ready
from xception_jax.study.analysis import Sample, image_variance
from xception_jax.study.cells import state_of
from xception_jax.study.inference import CONFIDENCE
from xception_jax.user_files import read_text, reading

POWER = 0.8
UPPER = 0.9  # one-sided confidence of the upper limit of a standard deviation
MAX_SEEDS = 10_000
_MARGINS = (0.5, 1.0, 2.0)  # times the margin
_LEAST_RATIO = 1e-6  # pairs that leave nothing of the variance need the fewest seeds
_QUANTILES = (np.arange(100) + 0.5) / 100


@dataclasses.dataclass(frozen=True)
class Row:
    """The seeds of each arm that decide a margin; None for more than `MAX_SEEDS`.

    Attributes:
      margin: the smallest difference that matters, as a share.
      analysis: as in `analysis.ANALYSES`.
      equivalence, difference: seeds with which arms without a difference are found equivalent, and with which a
        difference as large as the margin is found, with a power of 80 %.
      equivalence_at_most, difference_at_most: the same at the upper limit of the standard deviation.
    """

    margin: float
    analysis: str
    equivalence: int | None
    difference: int | None
    equivalence_at_most: int | None
    difference_at_most: int | None


@dataclasses.dataclass(frozen=True)
class SeedPlan:
    """The variance of a pilot, and the seeds that follow from it.

    Attributes:
      sd: standard deviation of a cell over seeds, pooled over the arms.
      sd_at_most: its upper limit, at a confidence of 90 %.
      df: its degrees of freedom.
      arms: the standard deviation of each arm with two finished cells or more.
      pairing: share of the variance of a difference that pairs leave: 1 if pairing buys nothing; None without pairs.
      images: standard error of a difference that comes from the test images; None without predictions.
      rows: the seeds.
    """

    sd: float
    sd_at_most: float
    df: int
    arms: Mapping[str, float]
    pairing: float | None
    images: float | None
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data."""
        return json_ready(dataclasses.asdict(self) | {"power": POWER, "max_seeds": MAX_SEEDS})


def plan_seeds(source: Path, margin: float | None = None) -> SeedPlan:
    """Plans the seeds of each arm.

    Args:
      source: the directory of a pilot study, or a cells.csv.
      margin: the margin; that of the pilot study if it is None.

    Raises:
      UsageError: there is no margin.
      InputMissingError: there is no study.
      BadDataError: the pilot is damaged, or no arm has two finished cells.
    """
    if source.is_dir():
        samples, pairs, own_margin = _from_study(source)
    else:
        samples, pairs, own_margin = _from_csv(source), None, None
    margin = own_margin if margin is None else margin
    if margin is None:
        raise UsageError(
            "cells.csv holds no margin", "--margin", "add the smallest difference that matters, such as 0.005"
        )
    known = {name: sample.known for name, sample in samples.items() if len(sample.known) > 1}
    df = sum(len(values) - 1 for values in known.values())
    squares = sum((len(values) - 1) * values.var(ddof=1) for values in known.values())
    if not squares > 0:
        raise BadDataError(
            "no arm has two finished cells that differ", str(source), "run the pilot with at least two seeds"
        )
    sd = math.sqrt(squares / df)
    at_most = math.sqrt(squares / stats.chi2.ppf(1 - UPPER, df))
    ratio = _pairing(samples, pairs or [(a, b) for a in known for b in known if a < b])
    images = _image_error(samples, pairs or [])
    rows = []
    for factor in _MARGINS:
        for analysis, paired, error in (("paired", True, 0.0), ("welch", False, 0.0), ("crossed", False, images)):
            if error is not None:
                share = math.sqrt(max(ratio, _LEAST_RATIO)) if paired and ratio is not None else 1.0
                seeds = [
                    seeds_needed(share * value, factor * margin, paired=paired, images=error, power=POWER)
                    for value in (sd, at_most)
                ]
                rows.append(Row(factor * margin, analysis, *seeds[0], *seeds[1]))
    arms = {name: float(values.std(ddof=1)) for name, values in known.items()}
    return SeedPlan(sd, at_most, df, arms, ratio, images, tuple(rows))


def format_plan(plan: SeedPlan) -> str:
    """Returns the plan as text for a terminal."""
    lines = [
        f"SD of a cell {100 * plan.sd:.2f} points, pooled over {len(plan.arms)} arms ({plan.df} degrees of freedom); "
        f"at most {100 * plan.sd_at_most:.2f} ({UPPER:.0%})",
    ]
    if plan.pairing is not None:
        lines.append(f"pairs leave {plan.pairing:.0%} of the variance of a difference")
    if plan.images is not None:
        lines.append(f"the test images add a standard error of {100 * plan.images:.2f} points, which no seed reduces")
    lines += [
        f"seeds of each arm for a power of {POWER:.0%}, and in brackets at the upper limit of the SD:",
        f"{'margin, points':>14}  {'analysis':8}  {'equivalence':>16}  {'difference':>16}",
    ]
    lines += [
        f"{100 * row.margin:14.2f}  {row.analysis:8}  {_seeds(row.equivalence, row.equivalence_at_most):>16}  "
        f"{_seeds(row.difference, row.difference_at_most):>16}"
        for row in plan.rows
    ]
    lines += [
        "equivalence: arms without a difference are found equivalent; difference: one as large as the margin is found.",
        "The analysis 'pooled' needs at most as many as 'welch'.",
        "Holm's correction for several comparisons needs more seeds for a difference, and none for equivalence.",
    ]
    return "\n".join(lines)


def _seeds(seeds: int | None, at_most: int | None) -> str:
    low, high = ("never" if value is None else str(value) for value in (seeds, at_most))
    return f"{low} ({high})"


def _from_study(root: Path) -> tuple[dict[str, Sample], list[tuple[str, str]], float]:
    from xception_jax.study.collect import read_samples
    from xception_jax.study.store import read_study

    stored = read_study(root)
    study = stored.study
    pairs = [(c.arm, c.baseline) for c in study.comparisons]
    terms = (term for claim in study.claims for part in claim.parts for term in part.terms)
    pairs += [(arm, baseline) for arm, baseline, _ in terms if baseline]
    return read_samples(stored), list(dict.fromkeys(pairs)), study.margin


def _from_csv(path: Path) -> dict[str, Sample]:
    with reading("table of cells", path, "name a cells.csv that `study report` wrote, or a study directory"):
        rows = list(csv.DictReader(read_text(path).splitlines()))
        seeds = sorted({int(row["seed"]) for row in rows})
        values: dict[str, np.ndarray] = {row["arm"]: np.full(len(seeds), np.nan) for row in rows}
        for row in rows:
            if row["exit_code"] and state_of(int(row["exit_code"])) == "done" and row["test_accuracy"]:
                accuracy, number = float(row["test_accuracy"]), seeds.index(int(row["seed"]))
                if not 0 <= accuracy <= 1:
                    raise ValueError(f"{row['arm']} seed {row['seed']} has an accuracy of {accuracy:g}")
                if np.isfinite(values[row["arm"]][number]):
                    raise ValueError(f"{row['arm']} seed {row['seed']} has two rows")
                values[row["arm"]][number] = accuracy
    return {arm: Sample(accuracy) for arm, accuracy in values.items()}


def _pairing(samples: Mapping[str, Sample], pairs: Sequence[tuple[str, str]]) -> float | None:
    """Returns the median ratio of the variance of a difference to the sum of the variances of both arms."""
    ratios = []
    for arm, baseline in pairs:
        both = np.stack([samples[arm].accuracy, samples[baseline].accuracy])
        both = both[:, np.isfinite(both).all(0)]
        apart = both.var(1, ddof=1).sum() if both.shape[1] > 2 else 0.0
        if apart > 0:
            ratios.append(float((both[0] - both[1]).var(ddof=1) / apart))
    return float(np.median(ratios)) if ratios else None


def _image_error(samples: Mapping[str, Sample], pairs: Sequence[tuple[str, str]]) -> float | None:
    """Returns the standard error of a difference over the test images, without what more seeds reduce."""
    variances = []
    for arm, baseline in pairs:
        a, b = samples[arm].right, samples[baseline].right
        if a is not None and b is not None and min(len(a), len(b)) > 1:
            variances.append(image_variance({arm: a, baseline: b}, {arm: 1.0, baseline: -1.0}))
    return math.sqrt(float(np.mean(variances))) if variances else None


def seeds_needed(
    sd: float, margin: float, *, paired: bool, images: float = 0.0, power: float = 0.8
) -> tuple[int | None, int | None]:
    """Returns the seeds of each arm that decide a margin with this power.

    Args:
      sd: standard deviation of a cell over seeds.
      margin: the margin.
      paired: whether the differences of pairs are analysed, with half of the degrees of freedom.
      images: standard error of a difference that comes from the test images, which no seed reduces.
      power: the power.

    Returns:
      (equivalence, difference): seeds with which two arms without any difference are found equivalent, and with which a
      difference as large as the margin is found. None for more than `MAX_SEEDS`.
    """

    def smallest(chance: Callable[[float, float, float], float]) -> int | None:
        def enough(n: int) -> bool:
            return chance(math.sqrt(2 / n) * sd, (n - 1) * (1 if paired else 2), images) >= power

        if not enough(MAX_SEEDS):
            return None
        low, high = 1, MAX_SEEDS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high

    return smallest(lambda *parts: _power(0.0, margin, *parts)[0]), smallest(
        lambda *parts: _power(margin, margin, *parts)[1]
    )


def _power(true: float, margin: float, error: float, df: float, images: float) -> tuple[float, float]:
    """Returns the probabilities of finding equivalence, and of finding a difference of the right sign."""
    # Averaged over the estimated variance, of which only the part of the seeds is uncertain.
    of_seeds = error**2 * stats.chi2.ppf(_QUANTILES, df) / df
    estimated = np.sqrt(of_seeds + images**2)
    # Satterthwaite's degrees of freedom, with infinitely many for the thousands of images.
    half = stats.t.ppf((1 + CONFIDENCE) / 2, df * (estimated**2 / of_seeds) ** 2) * estimated
    spread = math.hypot(error, images)
    inside = stats.norm.cdf((margin - half - true) / spread) - stats.norm.cdf((-margin + half - true) / spread)
    return float(np.maximum(inside, 0).mean()), float(stats.norm.sf((half - true) / spread).mean())
