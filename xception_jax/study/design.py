"""Defines a study: its question, the expectations stated beforehand, its arms, controls and seeds.

A file in configs/studies/ defines `get_study(size='cpu', control=...)`, which returns a `Study`. Like a config, it is
Python code that is run. A study directory stores the study as data in study.json, and a report reads only that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from xception_jax.command_line import run_file
from xception_jax.config import FIELDS, ExperimentConfig, from_json, override, resolve, to_json
from xception_jax.config.shipped import find_config
from xception_jax.errors import ConfigError
from xception_jax.study.claims import Claim, claim_problems, claims_from_json
from xception_jax.study.gates import Gate, gate_problems

# The costs of a network, as attributes of `models.cost.Cost`, and their names in reports.
COSTS = {
    "parameters": "parameters",
    "live_parameters": "live parameters",
    "multiply_adds": "multiply-adds",
    "live_multiply_adds": "live multiply-adds",
}
CONTROLS = (*COSTS, "width")
ANALYSES = ("paired", "welch", "pooled", "crossed")
EXPECTATIONS = ("better", "worse", "equivalent", "unknown")
COURSES = ("rises through zero", "falls through zero", "no", "unknown")
CHANNELS_PER_SEGMENT = "channels_per_segment"
CHANNEL_AXES = (CHANNELS_PER_SEGMENT, "model.group_width")  # the same; 'all' and depthwise have a place on it, too
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SET_BY_THE_STUDY = ("seed", "name")


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
      name: of the effect, such as 'relu - none'.
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
      seed: of all trials; it must not be one of the study's seeds.
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
      analysis: one of `ANALYSES`, see analysis.py.
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
        deciding = {name for arm in self.arms for name in arm.tuned_as or (arm.name,)}
        return tuple(arm for arm in self.arms if arm.name in deciding)

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


def load_study(spec: str) -> Study:
    """Loads a study from its file.

    Args:
      spec: a shipped study or a file, see `find_config`; ':size' or ':size,control' may follow.

    Raises:
      InputMissingError: there is no such file.
      ConfigError: the file does not run, or the study is not valid.
    """
    return as_study(*run_study_file(spec))


def run_study_file(spec: str) -> tuple[Any, str]:
    """Returns what the `get_study` of a file returns, of any kind of study, and the file.

    Args:
      spec: as for `load_study`.

    Raises:
      InputMissingError: there is no such file.
      ConfigError: the file does not run.
    """
    path, arguments = find_config(spec, "study")
    return run_file(path, "get_study", arguments.split(",") if arguments else []), str(path)


def as_study(study: Any, where: str) -> Study:
    """Returns what a file describes, with its config resolved.

    Args:
      study: what `get_study` returned.
      where: the file, for messages.

    Raises:
      ConfigError: it is not a study, or not a valid one.
    """
    if not isinstance(study, Study):
        raise ConfigError(f"get_study() returns {type(study).__name__}, not a Study", where, "return a Study")
    study = dataclasses.replace(study, config=resolve(study.config), seeds=tuple(study.seeds))
    if study.search is not None:  # a stored study keeps its trials, whatever later releases try by default
        study = dataclasses.replace(study, search=dataclasses.replace(study.search, trials=study.trials))
    check_study(study, where)
    try:
        return study_from_json(study_to_json(study))  # as it will be read back, so that lists are equal to tuples
    except TypeError as error:
        raise ConfigError(f"the study cannot be stored as JSON: {error}", where, "use plain values") from None


def check_study(study: Study, where: str) -> Study:
    """Returns the study if it is consistent.

    Args:
      study: the study.
      where: the file that describes it, for messages.

    Raises:
      ConfigError: two arms have the same name, a name refers to no arm, an arm sets a field that the study sets itself,
        or another part of the study is not valid.
    """
    for what, fix in _problems(study):
        raise ConfigError(what, where, fix)
    # A mistake in the last arm or trial must not show only after the first ninety cells.
    configs = {arm.name: study.arm_config(arm) for arm in study.arms}
    for trial in study.trials:
        override(study.config, trial)
    for what, fix in _config_problems(study, configs):
        raise ConfigError(what, where, fix)
    return study


def _problems(study: Study) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, how to fix it)."""
    names = [arm.name for arm in study.arms]
    for name in names:
        if not NAME.fullmatch(name):
            yield f"an arm is called {name!r}", "name arms with letters, digits, _ . and -"
        if names.count(name) > 1:
            yield f"two arms are called {name!r}", "give each arm its own name"
    used = [study.reference, *(name for c in study.comparisons for name in (c.arm, c.baseline))]
    used += [name for arm in study.arms if not isinstance(arm.tuned_as, str) for name in arm.tuned_as]
    used += [name for interaction in study.interactions for pair in interaction.pairs for name in pair]
    for name in used:
        if name not in names:
            yield f"there is no arm {name!r}", f"choose one of {', '.join(names)}"
    for comparison in study.comparisons:
        if comparison.expected not in EXPECTATIONS:
            what = f"{comparison.name} is expected to be {comparison.expected!r}"
            yield what, f"set it to one of {', '.join(EXPECTATIONS)}"
    for interaction in study.interactions:
        if len(interaction.pairs) < 2:
            yield f"the interaction {interaction.name} has {len(interaction.pairs)} pairs", "list two or more"
        if interaction.expected not in COURSES:
            what = f"the course of {interaction.name} is expected to be {interaction.expected!r}"
            yield what, f"set it to one of {', '.join(COURSES)}"
    own = [*_SET_BY_THE_STUDY, *study.seeded, *(["model.width_multiplier"] if study.control != "width" else [])]
    tried = {name for trial in study.trials for name in trial}
    for name in set(own) & tried:
        yield f"trials of the search set {name}, which the study sets", f"remove {name} from the trials"
    for arm in study.arms:
        for name in set(own) & set(arm.overrides):
            yield f"arm {arm.name} sets {name}, which the study sets", f"remove {name} from its overrides"
        for name in tried & set(arm.overrides):
            fix = f"remove {name} from its overrides, or list trials without it: search=Search(trials=...)"
            yield f"arm {arm.name} sets {name}, which the search tries", fix
        if isinstance(arm.tuned_as, str):
            yield f"arm {arm.name} has tuned_as={arm.tuned_as!r}", f"write tuned_as=({arm.tuned_as!r},)"
    if study.control not in CONTROLS:
        yield f"the control is {study.control!r}", f"set it to one of {', '.join(CONTROLS)}"
    for cost in study.unequal:
        if cost not in COSTS or cost == study.control:
            yield f"unequal names {cost!r}", f"name costs that the study does not control: {', '.join(COSTS)}"
    if not study.seeds:
        yield "there are no seeds", "list at least two"
    if len(set(study.seeds)) < len(study.seeds):
        yield "seeds repeat", "list each seed once"
    if not study.margin > 0:
        yield f"the margin is {study.margin}", "set it to the smallest difference that matters"
    if study.interactions and not study.axis:
        yield "there is an interaction, but no axis", "set axis to 'channels_per_segment' or to a config field"
    if study.axis not in ("", CHANNELS_PER_SEGMENT, *FIELDS):
        yield f"the axis is {study.axis!r}", f"set it to {CHANNELS_PER_SEGMENT!r} or to a config field"
    if study.search is not None and study.search.seed in study.seeds:
        yield "the search shares a seed with the study", "give it its own seed"
    if study.analysis not in ANALYSES:
        yield f"the analysis is {study.analysis!r}", f"set it to one of {', '.join(ANALYSES)}"
    for name in study.seeded:
        if name not in FIELDS or FIELDS[name].kind is not int:
            yield f"seeded names {name!r}", "name config fields that are seeds, such as 'data.turn_seed'"
    yield from gate_problems(study.gates, names)
    if study.gate is not None and not 0 < study.gate <= 1:
        yield f"the gate is {study.gate}", "set it to a training accuracy between 0 and 1, or to None"
    yield from claim_problems(study.claims, names, study.axis, study.activations)


def _config_problems(study: Study, configs: Mapping[str, ExperimentConfig]) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, how to fix it) in what the study needs of the configs of its arms."""
    from xception_jax.metrics import metrics_of  # imports JAX, for which `study --help` does not wait

    for arm, config in configs.items():
        known = [f"{prefix}{metric.name}" for metric in metrics_of(config) for prefix in ("", "ema_")]
        if study.metric not in (known if config.ema.decay else known[::2]):
            fix = "average the weights by config.ema.decay, or set metric to one without ema_"
            yield f"cells of {arm} do not measure {study.metric!r}", fix
        if not config.data.test_split or (study.search and not config.data.eval_split):
            yield f"arm {arm} lacks a test split, or a development split for the search", "set both in config.data"
        if study.axis not in ("", *CHANNEL_AXES) and not isinstance(_field(config, study.axis), int | float):
            what = f"{study.axis} is {_field(config, study.axis)!r} in arm {arm}, which has no place on an axis"
            yield what, "choose an axis of numbers"
    turns = {(config.data.turn, config.data.turn_angle != 0) for config in configs.values()}
    for kind in {gate.kind for gate in study.gates} & {"kronecker", "free"}:
        if (kind, True) not in turns or not {(other, False) for other, _ in turns if other != "none"} & turns:
            what = f"the gate {kind} needs arms with data.turn={kind!r}, and one with data.turn_angle=0 and a turn"
            yield what, "add them, or remove the gate"


def _field(config: ExperimentConfig, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def study_to_json(study: Study) -> dict[str, Any]:
    """Returns a study as plain data."""
    return json.loads(json.dumps(dataclasses.asdict(study)))


def study_from_json(data: dict[str, Any]) -> Study:
    """Returns the study that `study_to_json` converted.

    Raises:
      ConfigError: the data do not describe a valid study.
    """
    try:
        search = data["search"]
        study = Study(
            **data
            | {
                "config": from_json(json.dumps(data["config"])),
                "arms": tuple(Arm(**arm | {"tuned_as": tuple(arm.get("tuned_as", ()))}) for arm in data["arms"]),
                "seeds": tuple(data["seeds"]),
                "unequal": tuple(data.get("unequal", ())),
                "comparisons": tuple(PlannedComparison(**comparison) for comparison in data["comparisons"]),
                "interactions": tuple(
                    Interaction(**entry | {"pairs": tuple(map(tuple, entry["pairs"]))})
                    for entry in data["interactions"]
                ),
                "gates": tuple(Gate(**gate | {"arms": tuple(gate["arms"])}) for gate in data.get("gates", ())),
                "seeded": tuple(data.get("seeded", ())),
                "claims": claims_from_json(data.get("claims", ())),
                "search": Search(**search | {"trials": tuple(search["trials"])}) if search else None,
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the stored study: {error}", "study.json", "restore it from a copy") from None
    return check_study(study, "study.json")


def changes(stored: Study, now: Study) -> tuple[list[str], list[str]]:
    """Compares a study with its stored version.

    Returns:
      (additions, refused): one line for each added seed or arm, which are always allowed, and one line for every other
      difference. A comparison may be added together with one of its arms.
    """
    additions: list[str] = []
    refused: list[str] = []
    old_arms = {arm.name: arm for arm in stored.arms}
    new_names = [arm.name for arm in now.arms if arm.name not in old_arms]
    additions += [f"arm {name}" for name in new_names]
    additions += [f"seed {seed}" for seed in now.seeds if seed not in stored.seeds]
    refused += [f"seed {seed} was removed" for seed in stored.seeds if seed not in now.seeds]
    now_arms = {arm.name: arm for arm in now.arms}
    for name, arm in old_arms.items():
        if name not in now_arms:
            refused.append(f"arm {name} was removed")
        elif arm != now_arms[name]:
            before, after = dataclasses.asdict(arm), dataclasses.asdict(now_arms[name])
            changed = [
                f"{field} {before[field]} -> {after[field]}" for field in before if before[field] != after[field]
            ]
            refused.append(f"arm {name}: {', '.join(changed)}")
    for comparison in now.comparisons:
        if comparison not in stored.comparisons and not {comparison.arm, comparison.baseline} & set(new_names):
            refused.append(f"comparison {comparison.name} ({comparison.expected}) is new, but its arms are not")
    refused += [f"comparison {c.name} was removed" for c in stored.comparisons if c not in now.comparisons]
    if to_json(stored.config) != to_json(now.config):
        refused.append("the base config")
    for field in dataclasses.fields(Study):
        if field.name in ("arms", "seeds", "comparisons", "interactions", "config", "budget"):
            continue
        before, after = getattr(stored, field.name), getattr(now, field.name)
        if before != after:
            refused.append(f"{field.name}: {before!r} -> {after!r}")
    refused += _changed_interactions(stored, now, set(new_names))
    return additions, refused


def _changed_interactions(stored: Study, now: Study, new_names: set[str]) -> list[str]:
    """Returns one line for each interaction that was changed in another way than by adding new arms."""
    before = {entry.name: entry for entry in stored.interactions}
    after = {entry.name: entry for entry in now.interactions}
    lines = [f"interaction {name} was removed" for name in before if name not in after]
    for name, entry in after.items():
        old = before.get(name)
        if old and (old.expected != entry.expected or not set(old.pairs) <= set(entry.pairs)):
            lines.append(f"interaction {name} was changed")
        added = set(entry.pairs) - set(old.pairs if old else ())
        if any(not new_names & set(pair) for pair in added) or (not old and not added):
            lines.append(f"interaction {name} has new pairs, but their arms are not new")
    return lines
