"""Configs: the defaults to start from, and the checks that a config passes before anything is compiled.

A file in `configs/` starts from `default_config()` and changes what its experiment needs. The fields themselves, with
their defaults and sources, are in fields.py.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from ml_collections import ConfigDict, config_dict

from xception_jax.errors import ConfigError
from xception_jax.fields import FIELDS

# model.* fields that only Xception reads, and those that module='inception' replaces: any other value than the
# default would be accepted and ignored, so it is refused.
_SEPARABLE_ONLY = ("segments", "group_width", "order", "intermediate_activation", "depth_multiplier")
XCEPTION_ONLY = (*_SEPARABLE_ONLY, "middle_blocks", "module", "residual", "kernel_size", "stem")


def default_config() -> ConfigDict:
    """Returns all fields at their defaults: the paper's Xception on ImageNet."""
    config = ConfigDict(type_safe=False)
    for name, field in FIELDS.items():
        *parents, leaf = name.split(".")
        node = config
        for parent in parents:
            if parent not in node:
                node[parent] = ConfigDict(type_safe=False)
            node = node[parent]
        node[leaf] = config_dict.placeholder(field.kind) if field.default is None else field.default
    return config


def _flatten(config: ConfigDict, prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _resolve(config: ConfigDict, prefix: str) -> ConfigDict:
    given = _flatten(config, prefix)
    known = {name: field for name, field in FIELDS.items() if name.startswith(prefix)}
    for name in given:
        if name not in known:
            raise unknown_field(name)
    resolved = default_config()
    for name, field in known.items():
        value = given.get(name, field.default)
        if value is None and field.default is None:
            continue
        try:
            value = field.check(value)
        except (ValueError, TypeError, re.error, OverflowError):
            raise ConfigError(
                f"config.{name} is {value!r}",
                f"config.{name}",
                f"set it to {field.expects} (default: {field.default!r})",
            ) from None
        *parents, leaf = name.split(".")
        node = resolved
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return resolved


def unknown_field(name: str) -> ConfigError:
    """Returns the error for a field that no config has, with the field that was probably meant."""
    leaf = name.rsplit(".", 1)[-1]
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in FIELDS}
    close = difflib.get_close_matches(name, FIELDS, 1, 0.75)
    close = close or [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)]
    fix = f"did you mean config.{close[0]}?" if close else "the fields are listed in xception_jax/fields.py"
    return ConfigError(f"there is no field config.{name}", f"config.{name}", fix)


def _refuse(condition: bool, what: str, where: str, fix: str) -> None:
    if condition:
        raise ConfigError(what, where, fix)


def resolve_model(model: ConfigDict) -> ConfigDict:
    """Fills in and checks a `config.model`.

    Raises:
      ConfigError: a field is unknown, of the wrong type or range, or would be ignored beside another.
    """
    model = _resolve(model, "model.").model

    def refuse_ignored(names: tuple[str, ...], because: str) -> None:
        for name in names:
            default = FIELDS[f"model.{name}"].default
            _refuse(
                model[name] != default,
                f"config.model.{name}={model[name]!r} has no effect with {because}",
                f"config.model.{name}",
                f"leave it at {default!r}",
            )

    if model.name != "xception":
        refuse_ignored(XCEPTION_ONLY, f"model.name={model.name!r}")
    else:
        refuse_ignored(("aux_head",), "model.name='xception'")
    if model.batch_norm.scale is None:
        model.batch_norm.scale = model.name != "inception_v3"
    if model.module == "inception":
        refuse_ignored(_SEPARABLE_ONLY, "model.module='inception'")
    if model.fc_layers == 0:
        refuse_ignored(("fc_width",), "model.fc_layers=0")
    _refuse(
        model.group_width is not None and model.segments != "depthwise",
        f"config.model.segments={model.segments!r} and group_width={model.group_width!r} contradict each other",
        "config.model",
        "set one of them: segments counts the groups of channels, group_width the channels in each",
    )
    _refuse(
        model.kernel_size % 2 == 0,
        f"config.model.kernel_size is {model.kernel_size}",
        "config.model.kernel_size",
        "set it to an odd number: 3, 5 or 7",
    )
    return model


def resolve(config: ConfigDict) -> ConfigDict:
    """Fills in and checks a whole config; what it returns is complete and consistent.

    Raises:
      ConfigError: a field is unknown, of the wrong type or range, or contradicts another.
    """
    resolved = _resolve(config, "")
    resolved.model = resolve_model(resolved.model)
    _refuse(
        resolved.mesh.data == 0,
        "config.mesh.data is 0",
        "config.mesh.data",
        "set it to the number of devices along the batch, or -1 for all",
    )
    _refuse(
        resolved.batch_size % resolved.accumulation_steps != 0,
        f"config.batch_size={resolved.batch_size} is not divisible by accumulation_steps={resolved.accumulation_steps}",
        "config.batch_size",
        f"the nearest that is: {_nearest_multiple(resolved.batch_size, resolved.accumulation_steps)}",
    )
    group = resolved.model.batch_norm.statistics
    microbatch = resolved.batch_size // resolved.accumulation_steps
    _refuse(
        isinstance(group, int) and microbatch % group != 0,
        f"config.model.batch_norm.statistics={group} does not divide the {microbatch} images of a (micro)batch",
        "config.model.batch_norm.statistics",
        "set it to a divisor, to 'global' or to 'device'",
    )
    low, high = resolved.data.crop_area
    _refuse(
        not 0 < low <= high <= 1,
        f"config.data.crop_area is {resolved.data.crop_area}",
        "config.data.crop_area",
        "set it to two shares of the image, 0 < smallest <= largest <= 1",
    )
    return resolved


def _nearest_multiple(value: int, factor: int) -> int:
    return max(factor, round(value / factor) * factor)


def save_json(config: ConfigDict) -> str:
    """Returns a resolved config as JSON, keys in the order of `FIELDS`."""
    nested: dict[str, Any] = {}
    for name in FIELDS:
        *parents, leaf = name.split(".")
        source, target = config, nested
        for parent in parents:
            source, target = source[parent], target.setdefault(parent, {})
        target[leaf] = source[leaf]
    return json.dumps(nested, indent=2) + "\n"


def load_json(text: str) -> ConfigDict:
    """Returns the resolved config that `save_json` wrote. It is read as data: nothing of it runs.

    Raises:
      ConfigError: the text is not a JSON object, or what it holds is no valid config.
    """
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError
        config = ConfigDict(fields, type_safe=False)
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error) or "it is no JSON object"
        raise ConfigError(f"a saved config cannot be read: {reason}", "config", "restore it, or start anew") from None
    return resolve(config)
