"""Loads a study from its file, and converts it to data and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from xception_jax.command_line import run_file
from xception_jax.config import from_json, resolve
from xception_jax.config.shipped import find_config
from xception_jax.errors import ConfigError
from xception_jax.study.checks import check_study
from xception_jax.study.claims import Claim, Part
from xception_jax.study.design import Arm, Interaction, PlannedComparison, Search, Study
from xception_jax.study.gates import Gate


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
    with wrong_types(where):
        study = dataclasses.replace(study, config=resolve(study.config), seeds=tuple(study.seeds))
        if study.search is not None:  # a stored study keeps its trials, whatever later releases try by default
            study = dataclasses.replace(study, search=dataclasses.replace(study.search, trials=study.trials))
        check_study(study, where)
        return study_from_json(study_to_json(study))  # as it will be read back, so that lists are equal to tuples


@contextlib.contextmanager
def wrong_types(where: str) -> Iterator[None]:
    """Translates what Python raises if a field of a study, from the file `where`, has a value of the wrong type."""
    try:
        yield
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        what = f"a field of the study has a value of the wrong type: {type(error).__name__}: {error}"
        fix = "compare it with a study in configs/studies; a list of one element needs a comma: (value,)"
        raise ConfigError(what, where, fix) from None


def study_to_json(study: Study) -> dict[str, Any]:
    """Returns a study as plain data."""
    return json.loads(json.dumps(dataclasses.asdict(study)))


def study_from_json(data: dict[str, Any]) -> Study:
    """Returns the study that `study_to_json` converted.

    Raises:
      ConfigError: the data do not describe a valid study.
    """
    try:
        kept = _with_tuples({name: value for name, value in data.items() if name != "config"})
        arms = [Arm(**arm | {"tuned_as": arm.get("tuned_as") or ()}) for arm in kept["arms"]]
        claims = [
            Claim(**claim | {"parts": tuple(Part(**part) for part in claim["parts"])})
            for claim in kept.get("claims", ())
        ]
        study = Study(
            **kept
            | {
                "config": from_json(json.dumps(data["config"])),
                "arms": tuple(arms),
                "comparisons": tuple(PlannedComparison(**comparison) for comparison in kept["comparisons"]),
                "interactions": tuple(Interaction(**interaction) for interaction in kept["interactions"]),
                "gates": tuple(Gate(**gate) for gate in kept.get("gates", ())),
                "claims": tuple(claims),
                "search": Search(**kept["search"]) if kept["search"] else None,
            }
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the stored study: {error}", "study.json", "restore it from a copy") from None
    return check_study(study, "study.json")


def _with_tuples(value: Any) -> Any:
    """Returns JSON data with tuples in place of lists."""
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    return {name: _with_tuples(each) for name, each in value.items()} if isinstance(value, dict) else value
