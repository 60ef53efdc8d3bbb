"""Defines a study: its question, the expectations stated beforehand, its arms, controls and seeds.

A file in configs/studies/ defines `get_study(size='cpu', control=...)`, which returns a `Study`. Like a config, it is
Python code that is run. A study directory stores the study as data in study.json, and a report reads only that.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from xception_jax.config import ExperimentConfig, override
from xception_jax.study.claims import Claim
from xception_jax.study.gates import Gate

# The costs of a network, as attributes of `models.cost.Cost`, and their names in reports.
COSTS = {
    "parameters": "parameters",
    "live_parameters": "live parameters",
    "multiply_adds": "multiply-adds",
    "live_multiply_adds": "live multiply-adds",
}
CONTROLS = (*COSTS, "width")
EXPECTATIONS = ("better", "worse", "equivalent", "unknown")
COURSES = ("rises through zero", "falls through zero", "no", "unknown")
CHANNELS_PER_SEGMENT = "channels_per_segment"
CHANNEL_AXES = (CHANNELS_PER_SEGMENT, "model.group_width")  # the same; 'all' and depthwise have a place on it, too
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant of the network or its training.

    Attributes:
      name: also the name of its directory.
      overrides: the config fields that define it, such as {'model.segments': 4}.
      line: arms with the same value form one line in the figures over the axis.
      tuned_as: names of the arms whose trials of the search, on average, decide for this one; () for its own.
    """

    name: str
    overrides: Mapping[str, Any]
    line: str = ""
    tuned_as: tuple[str, ...] = ()

    @property
    def deciding(self) -> tuple[str, ...]:
        """Returns the names of the arms whose trials decide for this one."""
        return self.tuned_as or (self.name,)


@dataclasses.dataclass(frozen=True)
class PlannedComparison:
    """A difference, accuracy of `arm` minus that of `baseline`, with the expectation stated beforehand.

    Attributes:
      arm, baseline: names of arms.
      expected: one of `EXPECTATIONS`.
      claim: the claim that it supports. Comparisons of one claim are one family: their p-values are corrected together.
        By default all comparisons of the study are one family.
    """

    arm: str
    baseline: str
    expected: str = "unknown"
    claim: str = ""

    @property
    def name(self) -> str:
        """Returns its name in reports."""
        return f"{self.arm} \N{MINUS SIGN} {self.baseline}"


@dataclasses.dataclass(frozen=True)
class Interaction:
    """The effect of one change at several points of the axis, with the expectation stated beforehand.

    Attributes:
      name: name of the effect, such as 'relu - none'.
      pairs: (arm, baseline) at each point.
      expected: one of `COURSES`; 'no' stands for no change of sign.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    expected: str = "no"


RATES = (0.125, 0.25, 0.5, 1.0, 2.0)
DECAYS = (1.0, 5.0)


@dataclasses.dataclass(frozen=True)
class Search:
    """Tuning on the development split, with the same trials for all arms. `Arm.tuned_as` lets arms share the choice.

    Attributes:
      trials: the overrides that each arm is trained with. The default is a grid of `RATES` times the learning rate of
        the config and `DECAYS` times its weight decay. Of equally good trials the first one is chosen.
      seed: seed of all trials; it must not be one of the study's seeds.
    """

    trials: tuple[Mapping[str, Any], ...] = ()
    seed: int = 1_000_000


@dataclasses.dataclass(frozen=True)
class Study:
    """A question and the experiment that answers it.

    Attributes:
      name: names the study.
      question: in one sentence.
      hypothesis: what is expected and why, stated before anything is measured on the test split.
      config: the base config, to which each arm adds its overrides.
      arms, comparisons, interactions: see their classes.
      seeds: every arm is trained once with each.
      margin: the smallest difference in accuracy that matters, as a share (0.005 is half a percentage point).
      reference: the arm that has the width of `config`.
      control: one of `COSTS` chooses the width of every other arm such that it costs as much as the reference; 'width'
        keeps the width.
      tolerance: the largest relative deviation from the cost of the reference.
      unequal: the other costs by which arms may differ by more than 10 %. The headline of the report names them; it
        does not call arms equal that differ in another cost.
      axis: 'channels_per_segment', or a field such as 'model.kernel_size', for figures and interactions.
      metric: the metric on the test split, as named in metrics.jsonl.
      search: tuning of each arm; None trains all arms with the learning rate of the config, for which some may be worse
        than at their own.
      analysis: one of `analysis.ANALYSES`.
      gate: the training accuracy that every arm must reach. Otherwise the study compares how fast arms learn, and not
        what they can represent: the report says so and interprets no comparison.
      gates: conditions without which no claim is interpreted, see gates.py.
      seeded: fields that take the seed of a cell, as `seed` does, such as 'data.turn_seed'.
      claims: what is predicted about several arms together; see claims.py.
      activations: whether each cell measures what enters the activation between two convolutions, see activations.py.
      budget: the cost of the study in words.
    """

    name: str
    question: str
    hypothesis: str
    config: ExperimentConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    margin: float
    reference: str
    comparisons: tuple[PlannedComparison, ...] = ()
    interactions: tuple[Interaction, ...] = ()
    control: str = "parameters"
    tolerance: float = 0.01
    unequal: tuple[str, ...] = ()
    axis: str = ""
    metric: str = "ema_top1"
    search: Search | None = Search()
    analysis: str = "paired"
    gate: float | None = None
    gates: tuple[Gate, ...] = ()
    seeded: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    activations: bool = False
    budget: str = ""

    @property
    def trials(self) -> tuple[Mapping[str, Any], ...]:
        """Returns the trials of the search; () without one."""
        if self.search is None or self.search.trials:
            return self.search.trials if self.search else ()
        rate, decay = self.config.schedule.learning_rate, self.config.optimizer.weight_decay
        return tuple(
            {"schedule.learning_rate": float(f"{factor * rate:.6g}"), "optimizer.weight_decay": times * decay}
            for factor, times in itertools.product(RATES, DECAYS)
        )

    @property
    def tried(self) -> tuple[Arm, ...]:
        """Returns the arms that are trained with each trial: those on which the choice for any arm rests."""
        deciding = {name for arm in self.arms for name in arm.deciding}
        return tuple(arm for arm in self.arms if arm.name in deciding)

    @property
    def metric_of_answers(self) -> str:
        """Returns the metric that counts the right answers in the predictions of a cell."""
        return "ema_top1" if self.config.ema.decay else "top1"

    @property
    def logarithmic(self) -> bool:
        """Returns whether the axis is logarithmic."""
        return self.axis in CHANNEL_AXES

    @property
    def per_unit(self) -> str:
        """Returns the unit of slopes along the axis, such as 'per doubling'."""
        return "per doubling" if self.logarithmic else f"per unit of {self.axis}"

    def arm(self, name: str) -> Arm:
        """Returns the arm with this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def seeded_fields(self, seed: int) -> dict[str, int]:
        """Returns the fields that take the seed of a cell, with this seed."""
        return dict.fromkeys(("seed", *self.seeded), seed)

    def arm_config(self, arm: Arm, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
        """Returns the config of an arm, with additional overrides.

        Raises:
          ConfigError: the config of the arm is not valid.
        """
        return override(self.config, {**arm.overrides, **(overrides or {})})
