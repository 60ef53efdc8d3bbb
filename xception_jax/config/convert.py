"""Conversions between the typed config and ml_collections, flat names and JSON.

Configs are ml_collections outside, where files and the command line change them, and frozen dataclasses inside.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from xception_jax.config.experiment import ExperimentConfig
from xception_jax.config.fields import Field, choice
from xception_jax.config.model import NETWORKS, ModelConfig
from xception_jax.config.section import Section, check_variant, checked
from xception_jax.errors import ConfigError
from xception_jax.user_files import parse_json, read_text, reading

_USUAL_NAMES = {"lr": "learning_rate", "wd": "weight_decay", "bs": "batch_size", "epochs": "duration"}
"""What other packages call the fields that are also here."""

_WITH_VARIANTS = ("model", "optimizer", "schedule")


def _declared(section: Section, owner: str = "") -> Iterator[tuple[str, Field]]:
    """Yields every field below a section by its dotted name, once for each variant that has it."""
    for field in dataclasses.fields(section):
        name, default = section.path + field.name, getattr(section, field.name)
        if table := field.metadata.get("variants"):
            yield f"{name}.name", choice(default.name, tuple(table), field.metadata["source"]).metadata["field"]
            for variant, sub_section in table.items():
                yield from _declared(sub_section, variant)
        elif isinstance(default, Section):
            yield from _declared(default, owner)
        elif "field" in field.metadata:
            owners = (owner,) if owner else ()
            yield name, dataclasses.replace(field.metadata["field"], default=default, owners=owners)


def _all_fields() -> dict[str, Field]:
    """Returns every field of every variant. Where defaults differ, the field has the first and is optional."""
    fields: dict[str, Field] = {}
    for name, field in _declared(ExperimentConfig()):
        first = fields.setdefault(name, field)
        if first is not field:
            optional = first.optional or first.default != field.default
            fields[name] = dataclasses.replace(first, owners=(*first.owners, *field.owners), optional=optional)
    for name, field in fields.items():
        if field.owners:
            variants = list(_variants(name.partition(".")[0]))
            shared, by_default = len(field.owners) == len(variants), variants[0] in field.owners
            fields[name] = dataclasses.replace(
                field, owners=() if shared else field.owners, optional=field.optional or not by_default
            )
    return fields


def _variants(section: str) -> Mapping[str, Section]:
    """Returns the variants of 'model', 'optimizer' or 'schedule' by their names."""
    return ExperimentConfig.__dataclass_fields__[section].metadata["variants"]


FIELDS: dict[str, Field] = _all_fields()


def default_config() -> ConfigDict:
    """Returns all fields at their defaults: the paper's Xception on ImageNet.

    A field that only other networks, optimizers or schedules have, or whose default depends on them, is a placeholder.
    """
    flat = {name: config_dict.placeholder(f.kind) if f.optional else f.default for name, f in FIELDS.items()}
    return ConfigDict(_nested(flat), type_safe=False)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return nested


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        is_section = isinstance(value, Mapping | ConfigDict)
        flat |= _flat(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return flat


def unknown_field(name: str) -> ConfigError:
    """Returns the error for a field that no config has, with the field that was probably meant."""
    inside = [known for known in FIELDS if known.startswith(f"{name}.")]
    if inside:
        fix = f"set its fields, such as config.{inside[0]}"
        return ConfigError(f"config.{name} is a section, not a field", f"config.{name}", fix)
    section, dot, last = name.rpartition(".")
    leaf = _USUAL_NAMES.get(last, last)
    # Of fields with one last name, the one of the same section counts.
    by_section = sorted(FIELDS, key=lambda known: known.partition(".")[0] == name.partition(".")[0])
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in by_section}
    close = _in_meant_section(name) or difflib.get_close_matches(f"{section}{dot}{leaf}", FIELDS, 1, 0.75)
    close = close or [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    fix = f"did you mean config.{close[0]}?" if close else "xception-jax train --help lists the fields"
    return ConfigError(f"there is no field config.{name}", f"config.{name}", fix)


def _in_meant_section(name: str) -> list[str]:
    """Returns the section or field that is meant if only the name of the section is misspelt."""
    sections = {known.partition(".")[0] for known in FIELDS if "." in known}
    section, dot, field = name.partition(".")
    meant = [f"{match}{dot}{field}" for match in difflib.get_close_matches(section, sections - {section}, 1, 0.75)]
    return [each for each in meant if section not in sections and (not field or each in FIELDS)]


def _build(default: Section, given: dict[str, Any]) -> Any:
    """Returns a section with the given values, which it removes from `given`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        name, value = default.path + field.name, getattr(default, field.name)
        if table := field.metadata.get("variants"):
            variant = checked(FIELDS[f"{name}.name"], f"{name}.name", given.pop(f"{name}.name", value.name))
            values[field.name] = _build(table[variant], given)
        elif isinstance(value, Section):
            values[field.name] = _build(value, given)
        elif name in given:
            new, spec = given.pop(name), dataclasses.replace(FIELDS[name], default=value)  # the default of the variant
            values[field.name] = value if new is None and spec.optional else checked(spec, name, new)
    return dataclasses.replace(default, **values)


def _resolve(default: Section, tree: Mapping[str, Any], *, saved: bool = False) -> Any:
    if not isinstance(tree, Mapping | ConfigDict):
        fix = "pass the name or path of a config, a ConfigDict or a dict"
        raise ConfigError(f"the config is a {type(tree).__name__}", default.path.rstrip(".") or "config", fix)
    given = _flat(tree, default.path)
    for name in given:
        if name not in FIELDS:
            raise unknown_field(name)
    section = _build(default, given)
    # What is left belongs to other variants. In a saved config it is left out: releases without variants wrote it all.
    for name, value in given.items():
        field, kind = FIELDS[name], name.partition(".")[0]
        if not saved and value is not None and value != field.default:
            variant = section if section.path == f"{kind}." else getattr(section, kind)
            raise ConfigError(
                f"config.{name}={value!r} has no effect: {variant.name} has no such field",
                f"config.{name}",
                f"leave it at {field.default!r}; it is a field of {', '.join(field.owners)}",
            )
    return section


def resolve(config: ConfigDict | Mapping[str, Any] | ExperimentConfig) -> ExperimentConfig:
    """Fills in and checks a whole config: the only way from ml_collections to the typed config.

    Args:
      config: nested, or by dotted names; fields that it does not set have their defaults. A typed config comes back as
        it is.

    Raises:
      ConfigError: a field is unknown, of the wrong type or range, contradicts another, or belongs to another network,
        optimizer or schedule.
    """
    return config if isinstance(config, ExperimentConfig) else _resolve(ExperimentConfig(), config)


def resolve_model(model: ConfigDict | Mapping[str, Any] | ModelConfig) -> ModelConfig:
    """Fills in and checks a `config.model`; like `resolve`."""
    if isinstance(model, ModelConfig):
        check_variant(model, NETWORKS)
        return model
    name = FIELDS["model.name"]
    given = dict(model)
    variant = checked(name, "model.name", given.pop("name", name.default))
    return _resolve(NETWORKS[variant], given)


def override(config: ExperimentConfig, fields: Mapping[str, Any]) -> ExperimentConfig:
    """Returns a config with other values of some fields, by their dotted names: {'model.segments': 4}.

    With another network, optimizer or schedule, fields that were at the default of the old one take that of the new.

    Raises:
      ConfigError: as `resolve`.
    """
    given = flatten(config)
    for section in _WITH_VARIANTS:
        before = getattr(config, section)
        if fields.get(f"{section}.name", before.name) != before.name:
            defaults = _flat(to_dict(_variants(section)[before.name]), before.path)
            given = {name: value for name, value in given.items() if name not in defaults or value != defaults[name]}
    return resolve(_nested(given | dict(fields)))


def to_dict(section: Section) -> dict[str, Any]:
    """Returns a section as a nested dict of plain values."""
    return dataclasses.asdict(section)


def flatten(config: ExperimentConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the value of each field of a config, typed or as a nested dict, by its dotted name."""
    return _flat(to_dict(config) if isinstance(config, ExperimentConfig) else config)


def default_values(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the default of each field of a config by its dotted name, with its network, optimizer and schedule."""
    chosen = {f"{section}.name": getattr(config, section).name for section in _WITH_VARIANTS}
    return flatten(override(ExperimentConfig(), chosen)) | {name: FIELDS[name].default for name in chosen}


def to_json(config: ExperimentConfig) -> str:
    """Returns a config as JSON: the same text for equal configs."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> ExperimentConfig:
    """Returns the config that `to_json`, of this or an earlier release, wrote. The text is parsed, never executed.

    Raises:
      ConfigError: the text is not a JSON object, or what it holds is not a valid config.
    """
    try:
        fields = parse_json(text, dict)
    except ValueError as error:
        raise ConfigError(f"a saved config cannot be read: {error}", "config", "restore it, or start over") from None
    return _resolve(ExperimentConfig(), fields, saved=True)


def load_config(path: str | os.PathLike[str]) -> ExperimentConfig:
    """Returns the config in the `config.json` of a run.

    Raises:
      InputMissingError: there is no such file, or it may not be read.
      ConfigError: it does not hold a valid config.
    """
    with reading("config of the run", path, "restore it from a copy", damaged=ConfigError):
        try:
            return from_json(read_text(path))
        except ConfigError as error:
            raise ConfigError(error.what, f"{os.fspath(path)}, {error.where}", error.fix, error.details) from None
