"""Holds the results of a study: rows of cells, and estimates for arms, comparisons, interactions and claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from xception_jax.logs.metrics_log import json_ready
from xception_jax.study.controls import ArmCost
from xception_jax.study.design import Interaction, PlannedComparison
from xception_jax.study.gates import CheckedGate
from xception_jax.study.inference import Estimate, Trend
from xception_jax.study.predictions import Answers
from xception_jax.study.store import StoredStudy
from xception_jax.study.verdicts import TestedClaim

Curve = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """The results of an arm over its seeds.

    Attributes:
      name, line: those of the arm.
      x: its position on the study's axis; NaN if there is no axis.
      accuracy: on the test split.
      train_accuracy: top-1 on the augmented training images, at the end.
      passes: whether its training accuracy reaches the study's gate, and is known of all finished cells; None if there
        is no gate, or no finished cell.
      images_per_second: training speed.
      cost: width and costs of its network.
      tuned: the values that the search chose, by field.
      tuned_at_edge: the fields for which the search chose the smallest or the largest value that it tried.
      failed: exit codes of the failed cells, by seed.
      curve, train_curve: (steps, mean, half width of the 95 % interval) of the development accuracy and of the training
        accuracy during training.
    """

    name: str
    line: str
    x: float
    accuracy: Estimate
    train_accuracy: Estimate
    passes: bool | None
    images_per_second: Estimate
    cost: ArmCost
    tuned: Mapping[str, Any]
    tuned_at_edge: tuple[str, ...]
    failed: Mapping[int, int]
    curve: Curve
    train_curve: Curve


@dataclasses.dataclass(frozen=True)
class ComparisonResult:
    """A difference in test accuracy.

    Attributes:
      comparison: the comparison as planned.
      difference: by the analysis of the study.
      over_images: over other seeds and other test images, whatever the analysis of the study.
      p_holm: its p-value, corrected for all comparisons of its claim.
      p_equivalent: the p-value of the two one-sided tests against the margin.
      verdict: see `inference.verdict`.
      outcome: 'as expected', 'against it' or 'undecided'; '' if nothing was expected; `NOT_INTERPRETED` if an arm does
        not pass the gate.
      detectable: the true difference that this number of seeds detects with a power of 80 %.
    """

    comparison: PlannedComparison
    difference: Estimate
    over_images: Estimate
    p_holm: float
    p_equivalent: float
    verdict: str
    outcome: str
    detectable: float


@dataclasses.dataclass(frozen=True)
class InteractionResult:
    """An effect along the axis.

    Attributes:
      interaction: the interaction as planned.
      x: the positions of its points on the axis.
      effects: the difference at each point.
      trend: slope (per doubling of x if the axis is logarithmic), ends and their contrast; None if there are fewer than
        two points or two seeds.
      seeds: number of seeds for which all arms are done.
      outcome: 'as expected', 'against it' or 'undecided'; '' if nothing was expected.
    """

    interaction: Interaction
    x: tuple[float, ...]
    effects: tuple[Estimate, ...]
    trend: Trend | None
    seeds: int
    outcome: str


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a report shows.

    Attributes:
      hidden: whether accuracies are left out, because the study states claims and some of its cells have not ended.
    """

    stored: StoredStudy
    hidden: bool
    rows: tuple[dict[str, Any], ...]
    arms: tuple[ArmResult, ...]
    comparisons: tuple[ComparisonResult, ...]
    interactions: tuple[InteractionResult, ...]
    claims: tuple[TestedClaim, ...]
    gates: tuple[CheckedGate, ...]
    answers: Mapping[tuple[str, int], Answers]

    @property
    def below_gate(self) -> list[str]:
        """Returns the arms whose training accuracy is below the gate."""
        return [arm.name for arm in self.arms if arm.passes is False]

    def to_json(self) -> dict[str, Any]:
        """Returns the results as plain data, with null for unknown values."""
        study = self.stored.study
        return json_ready(
            {
                "study": study.name,
                "question": study.question,
                "hypothesis": study.hypothesis,
                "margin": study.margin,
                "control": study.control,
                "metric": study.metric,
                "analysis": study.analysis,
                "gate": study.gate,
                "below_gate": self.below_gate,
                "accuracies_hidden": self.hidden,
                "history": list(self.stored.history),
                "arms": [
                    dataclasses.asdict(arm) | dataclasses.asdict(arm.cost) | {"curve": None, "train_curve": None}
                    for arm in self.arms
                ],
                "comparisons": [dataclasses.asdict(comparison) for comparison in self.comparisons],
                "interactions": [dataclasses.asdict(interaction) for interaction in self.interactions],
                "claims": [claim.to_json() for claim in self.claims],
                "gates": [gate.to_json() for gate in self.gates],
                "cells": list(self.rows),
            }
        )
