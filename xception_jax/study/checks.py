"""Checks that a study is consistent, before anything is trained."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from xception_jax.config import FIELDS, ExperimentConfig, override, resolve
from xception_jax.errors import ConfigError
from xception_jax.study.analysis import ANALYSES
from xception_jax.study.claims import claim_problems
from xception_jax.study.design import (
    CHANNEL_AXES,
    CHANNELS_PER_SEGMENT,
    CONTROLS,
    COSTS,
    COURSES,
    EXPECTATIONS,
    NAME,
    Study,
)
from xception_jax.study.gates import gate_problems

_SET_BY_THE_STUDY = ("seed", "name")


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
        if comparison.arm == comparison.baseline:
            yield f"{comparison.arm} is compared with itself", "name two arms"
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
    if not study.seeds or not all(isinstance(seed, int) for seed in study.seeds):
        what = f"the seeds are {', '.join(map(repr, study.seeds)) or 'missing'}"
        yield what, "list whole numbers; a difference needs at least two"
    if len(set(study.seeds)) < len(study.seeds):
        yield "seeds repeat", "list each seed once"
    if not 0 < study.margin < 1:
        yield f"the margin is {study.margin}", "set it to the smallest difference that matters, such as 0.005"
    if not 0 <= study.tolerance < 1:
        yield f"the tolerance is {study.tolerance}", "set it to a share, such as 0.01"
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
    yield from claim_problems(study.claims, names, study.axis)


def _config_problems(study: Study, configs: Mapping[str, ExperimentConfig]) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, how to fix it) in what the study needs of the configs of its arms."""
    from xception_jax.metrics import metrics_of  # imports JAX, for which `study --help` does not wait

    tested = {(config.data.name, config.data.test_split) for config in configs.values()}
    if len(tested) > 1:
        shown = " and ".join(f"{split!r} of {name}" for name, split in sorted(tested))
        yield f"arms have different test splits: {shown}", "give all arms the same data.name and data.test_split"
    for arm, config in configs.items():
        shares = [metric.name for metric in metrics_of(config) if metric.higher_is_better and metric.is_share]
        known = shares + [f"ema_{name}" for name in shares if config.ema.decay]
        if study.metric not in known:
            yield f"cells of {arm} do not measure {study.metric!r} as a share of 1", f"choose {', '.join(known)}"
        if study.gate is not None and config.loss.multi_label:
            yield (
                f"arm {arm} has several labels for each image, of which no training accuracy is known",
                "set gate=None",
            )
        if not config.data.test_split or (study.search and not config.data.eval_split):
            yield f"arm {arm} lacks a test split, or a development split for the search", "set both in config.data"
        if study.axis not in ("", *CHANNEL_AXES) and not isinstance(field_value(config, study.axis), int | float):
            what = f"{study.axis} is {field_value(config, study.axis)!r} in arm {arm}, which has no place on an axis"
            yield what, "choose an axis of numbers"
    for claim in study.claims:
        for part in claim.parts:
            positions = (
                {field_value(configs[arm], study.axis) for arm, *_ in part.terms} if study.axis in FIELDS else ()
            )
            if part.measure == "slope" and len(positions) == 1:
                yield f"claim {claim.code}, {part.name!r}: its arms have one place on the axis", "name arms with others"
    if study.analysis == "crossed" and study.metric != study.metric_of_answers:
        what = f"the analysis 'crossed' is of the images that are classified correctly, not of {study.metric}"
        yield what, f"set metric to {study.metric_of_answers!r}, or choose another analysis"
    data = [resolve(study.config).data, *(config.data for config in configs.values())]
    turns = {(each.turn, each.turn_angle != 0) for each in data}
    for kind in {gate.kind for gate in study.gates} & {"kronecker", "free"}:
        if (kind, True) not in turns or not {(other, False) for other, _ in turns if other != "none"} & turns:
            what = f"the gate {kind} needs arms with data.turn={kind!r}, and data.turn_angle=0 in an arm or the config"
            yield what, "add them, or remove the gate"


def field_value(config: ExperimentConfig, name: str) -> Any:
    """Returns the value of a field, such as 'model.segments'."""
    return functools.reduce(getattr, name.split("."), config)
