"""The base of all config sections: a frozen dataclass that checks its own fields."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from xception_jax.config.fields import Field
from xception_jax.errors import ConfigError

_Section = TypeVar("_Section", bound="Section")


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of config sections. Constructing one checks every field and converts it to its canonical type.

    Raises:
      ConfigError: a value has the wrong type or range, contradicts another, or would have no effect.
    """

    path: ClassVar[str]  # of the section within a config, for messages: 'model.batch_norm.'

    def __post_init__(self) -> None:
        """Checks every field, then `check` looks at several together."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for field in dataclasses.fields(self):
            if "variants" in field.metadata:
                check_variant(getattr(self, field.name), field.metadata["variants"])
            spec: Field | None = field.metadata.get("field")
            value = getattr(self, field.name)
            if spec is not None and not (value is None and spec.default is None):
                object.__setattr__(self, field.name, checked(spec, self.path + field.name, value))
        for field in dataclasses.fields(self):
            for name, without_effect in field.metadata["field"].unless.items() if "field" in field.metadata else ():
                if getattr(self, name) in without_effect and getattr(self, field.name) != defaults[field.name]:
                    raise ConfigError(
                        f"config.{self.path}{field.name}={getattr(self, field.name)!r} has no effect with "
                        f"{self.path}{name}={getattr(self, name)!r}",
                        f"config.{self.path}{field.name}",
                        f"leave it at {defaults[field.name]!r}",
                    )
        self.check()

    def check(self) -> None:
        """Checks constraints between fields; a section overrides it."""

    def replace(self: _Section, **values: Any) -> _Section:
        """Returns a copy with other values, checked again."""
        return dataclasses.replace(self, **values)


def check_variant(section: Section, table: Mapping[str, Any]) -> None:
    """Checks that a section has the class that belongs to its name.

    Raises:
      ConfigError: the name is unknown, or belongs to another class.
    """
    name: str = getattr(section, "name", "")
    if name not in table or type(section) is not type(table[name]):
        raise ConfigError(
            f"config.{section.path}name={name!r} does not belong to {type(section).__name__}",
            f"config.{section.path}name",
            "; ".join(f"{key!r} belongs to {type(value).__name__}" for key, value in table.items()),
        )


def checked(field: Field, name: str, value: Any) -> Any:
    """Returns a value in the canonical type of its field.

    Raises:
      ConfigError: the field does not take this value.
    """
    try:
        return field.check(value)
    except (ValueError, TypeError, re.error, OverflowError, RecursionError):  # a pattern may be nested
        raise ConfigError(
            f"config.{name} is {value!r}",
            f"config.{name}",
            f"set it to {field.expects} (default: {field.default!r})",
        ) from None


def variants(table: Mapping[str, Section], source: str) -> Any:
    """Declares a section that is one of several, chosen by its field `name`; the first is the default.

    Args:
      table: from the name to the section with its defaults. Each section has only the fields that it reads.
      source: where the default comes from, see fields.py.
    """
    return dataclasses.field(default=next(iter(table.values())), metadata={"variants": table, "source": source})
