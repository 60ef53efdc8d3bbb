"""What a study is: its question, what was expected beforehand, its arms, controls and seeds.

A file of configs/studies/ defines `get_study(size='cpu', control=...)` and returns a `Study`; like a config it is
Python, and it runs. A study directory keeps the study as data in study.json, which is all that a report reads.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xception_jax.command_line import failing_line
from xception_jax.config import FIELDS, ExperimentConfig, from_json, override, resolve, to_json
from xception_jax.errors import ConfigError, InputMissingError, UserError

CONTROLS = ("parameters", "multiply_adds", "width")
EXPECTATIONS = ("better", "worse", "equivalent", "unknown")
CHANNELS_PER_SEGMENT = "channels_per_segment"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SET_BY_THE_STUDY = ("seed", "name")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant of the network or its training.

    Attributes:
      name: names a directory.
      overrides: fields of the config that make the difference, such as {'model.segments': 4}.
      line: arms with the same are one line in the figures over the axis.
    """

    name: str
    overrides: Mapping[str, Any]
    line: str = ""


@dataclasses.dataclass(frozen=True)
class PlannedComparison:
    """A paired difference, accuracy of `arm` minus that of `baseline`, and what was expected of it beforehand."""

    arm: str
    baseline: str
    expected: str = "unknown"

    @property
    def name(self) -> str:
        """How it is called in reports."""
        return f"{self.arm} \N{MINUS SIGN} {self.baseline}"


@dataclasses.dataclass(frozen=True)
class Interaction:
    """The effect of one change at several points of the axis, and how it was expected to go along it.

    Attributes:
      name: of the effect, such as 'relu - none'.
      pairs: (arm, baseline) at each point.
      expected: 'rises through zero', 'falls through zero' or 'no' change of sign.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    expected: str = "no"


@dataclasses.dataclass(frozen=True)
class Search:
    """Tuning of each arm by itself, on the development split, with the same trials for all.

    Attributes:
      trials: overrides that each arm is trained with in turn; of equals the first is chosen.
      seed: of all trials; not one of the study's.
    """

    trials: tuple[Mapping[str, Any], ...]
    seed: int = 1_000_000


@dataclasses.dataclass(frozen=True)
class Study:
    """A question and the experiment that answers it.

    Attributes:
      name: names the study.
      question: in one sentence.
      hypothesis: what is expected and why, stated before anything was measured on the test split.
      config: of every cell, before its arm changes it; resolved.
      arms, comparisons, interactions, seeds: see there.
      margin: the difference in accuracy that matters, as a share (0.005 is half a percentage point).
      reference: the arm whose width is that of `config`.
      control: 'parameters' or 'multiply_adds' chooses the width of every other arm so that it costs as much as the
        reference; 'width' leaves it.
      tolerance: how far, as a share, such a cost may be from the reference's.
      axis: 'channels_per_segment', or a field such as 'model.kernel_size', for figures and interactions.
      metric: of the test split, a name of metrics.jsonl.
      search: tuning of each arm, if any.
      budget: what it costs, in words.
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
    axis: str = ""
    metric: str = "ema_top1"
    search: Search | None = None
    budget: str = ""

    def arm(self, name: str) -> Arm:
        """Returns the arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def arm_config(self, arm: Arm, overrides: Mapping[str, Any] | None = None) -> ExperimentConfig:
        """Returns the resolved config of an arm, with further overrides.

        Raises:
          ConfigError: the arm's config is not valid.
        """
        return override(self.config, {**arm.overrides, **(overrides or {})})


def load_study(spec: str) -> Study:
    """Returns the study of a file, 'FILE.py' or 'FILE.py:size' or 'FILE.py:size,control'.

    Raises:
      InputMissingError: there is no such file.
      ConfigError: it does not run, or what it describes is no valid study.
    """
    path, _, arguments = spec.partition(":")
    if not Path(path).is_file():
        choices = ", ".join(sorted(map(str, Path("configs/studies").glob("*.py")))) or "a file of configs/studies/"
        raise InputMissingError(f"there is no study {path}", path, f"choose {choices}")
    try:
        module_spec = importlib.util.spec_from_file_location("study_file", path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        get_study = module.get_study
        given = arguments.split(",") if arguments else []
        inspect.signature(get_study).bind(*given)
        study = get_study(*given)
    except UserError:
        raise
    except Exception as error:  # a study is Python and may raise anything
        line = failing_line(Path(path), error)
        where = f"{path}:{line}" if line else path
        raise ConfigError(
            f"the study does not run: {type(error).__name__}: {error}",
            where,
            "correct the file, or the size and control after the colon: see its docstring",
        ) from None
    return check_study(dataclasses.replace(study, config=resolve(study.config)), path)


def check_study(study: Study, where: str) -> Study:
    """Returns the study if it is consistent.

    Raises:
      ConfigError: names that repeat or that no arm has, a field that the study sets itself, no margin.
    """

    def refuse(condition: bool, what: str, fix: str) -> None:
        if condition:
            raise ConfigError(what, where, fix)

    names = [arm.name for arm in study.arms]
    for name in names:
        refuse(not _NAME.fullmatch(name), f"an arm is called {name!r}", "name arms by letters, digits, _ . and -")
        refuse(names.count(name) > 1, f"two arms are called {name!r}", "give each arm a name of its own")
    used = [study.reference, *(name for c in study.comparisons for name in (c.arm, c.baseline))]
    used += [name for interaction in study.interactions for pair in interaction.pairs for name in pair]
    for name in used:
        refuse(name not in names, f"there is no arm {name!r}", f"choose among {', '.join(names)}")
    for comparison in study.comparisons:
        refuse(
            comparison.expected not in EXPECTATIONS,
            f"{comparison.name} is expected to be {comparison.expected!r}",
            f"set it to one of {', '.join(EXPECTATIONS)}",
        )
    own = [*_SET_BY_THE_STUDY, *(["model.width_multiplier"] if study.control != "width" else [])]
    for arm in study.arms:
        for name in set(own) & set(arm.overrides):
            refuse(True, f"arm {arm.name} sets {name}, which the study sets", f"remove {name} from its overrides")
    refuse(study.control not in CONTROLS, f"the control is {study.control!r}", f"set it to one of {CONTROLS}")
    refuse(not study.seeds or len(set(study.seeds)) < len(study.seeds), "seeds repeat, or are none", "list each once")
    refuse(not study.margin > 0, f"the margin is {study.margin}", "set it to the smallest difference that matters")
    refuse(
        bool(study.interactions) and not study.axis,
        "there is an interaction, but no axis",
        "set axis to 'channels_per_segment' or to a field",
    )
    refuse(
        study.axis not in ("", CHANNELS_PER_SEGMENT, *FIELDS),
        f"the axis is {study.axis!r}",
        f"set it to {CHANNELS_PER_SEGMENT!r} or to a field of the config",
    )
    if study.search is not None:
        refuse(study.search.seed in study.seeds, "the search shares a seed with the study", "give it one of its own")
        refuse(not study.search.trials, "the search has no trials", "list some, or leave it out")
    for arm in study.arms:  # a mistake in the last arm must not wait for the first ninety cells
        study.arm_config(arm)
    return study


def study_to_json(study: Study) -> dict[str, Any]:
    """Returns a study as plain data."""
    return json.loads(json.dumps(dataclasses.asdict(study)))


def study_from_json(data: dict[str, Any]) -> Study:
    """Returns the study that `study_to_json` described.

    Raises:
      ConfigError: it is no study.
    """
    try:
        search = data["search"]
        study = Study(
            **data
            | {
                "config": from_json(json.dumps(data["config"])),
                "arms": tuple(Arm(**arm) for arm in data["arms"]),
                "seeds": tuple(data["seeds"]),
                "comparisons": tuple(PlannedComparison(**comparison) for comparison in data["comparisons"]),
                "interactions": tuple(
                    Interaction(**entry | {"pairs": tuple(map(tuple, entry["pairs"]))})
                    for entry in data["interactions"]
                ),
                "search": Search(**search | {"trials": tuple(search["trials"])}) if search else None,
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the stored study cannot be read: {error}", "study.json", "restore it") from None
    return check_study(study, "study.json")


def changes(stored: Study, now: Study) -> tuple[list[str], list[str]]:
    """Compares a study with what is stored of it.

    Returns:
      (additions, refused): a line for each seed or arm that was added, which is allowed at any time; and a line for
      everything else that differs. A comparison may be added if one of its arms was.
    """
    additions: list[str] = []
    refused: list[str] = []
    old_arms = {arm.name: arm for arm in stored.arms}
    new_names = [arm.name for arm in now.arms if arm.name not in old_arms]
    additions += [f"arm {name}" for name in new_names]
    additions += [f"seed {seed}" for seed in now.seeds if seed not in stored.seeds]
    refused += [f"seed {seed} is gone" for seed in stored.seeds if seed not in now.seeds]
    now_arms = {arm.name: arm for arm in now.arms}
    for name, arm in old_arms.items():
        if name not in now_arms:
            refused.append(f"arm {name} is gone")
        elif arm != now_arms[name]:
            refused.append(f"arm {name}: {dict(arm.overrides)} -> {dict(now_arms[name].overrides)}")
    for comparison in now.comparisons:
        if comparison not in stored.comparisons and not {comparison.arm, comparison.baseline} & set(new_names):
            refused.append(f"comparison {comparison.name} ({comparison.expected}) is new between old arms")
    refused += [f"comparison {c.name} is gone" for c in stored.comparisons if c not in now.comparisons]
    if to_json(stored.config) != to_json(now.config):
        refused.append("the config of all cells")
    for field in dataclasses.fields(Study):
        if field.name in ("arms", "seeds", "comparisons", "interactions", "config", "budget"):
            continue
        before, after = getattr(stored, field.name), getattr(now, field.name)
        if before != after:
            refused.append(f"{field.name}: {before!r} -> {after!r}")
    refused += _changed_interactions(stored, now, set(new_names))
    return additions, refused


def _changed_interactions(stored: Study, now: Study, new_names: set[str]) -> list[str]:
    before = {entry.name: entry for entry in stored.interactions}
    after = {entry.name: entry for entry in now.interactions}
    lines = [f"interaction {name} is gone" for name in before if name not in after]
    for name, entry in after.items():
        old = before.get(name)
        if old and (old.expected != entry.expected or not set(old.pairs) <= set(entry.pairs)):
            lines.append(f"interaction {name} is another")
        added = set(entry.pairs) - set(old.pairs if old else ())
        if any(not new_names & set(pair) for pair in added) or (not old and not added):
            lines.append(f"interaction {name} has new pairs of old arms")
    return lines
