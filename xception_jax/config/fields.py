"""Kinds of config fields: what a value may be, and how a wrong one is described.

A function such as `integer` returns the default of a dataclass field; the check, its description and the source of the
default travel in the metadata. Sources of defaults are labelled **paper** (stated in Chollet 2017), **reference** (read
from the public Keras implementation or its released weights), **inferred** (argued in docs/explanation/paper.md),
**modern** (a later practice) or **local** (a choice of this code base).
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

_DURATION = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s+(step|epoch|example)s?", re.IGNORECASE)


MAX_DURATION = 1e15
MAX_INTEGER = 2**31 - 1  # what an int32 of JAX holds


def duration_in_steps(duration: str, batch_size: int, num_examples: int) -> int:
    """Converts '10 epochs', '500 steps' or '3e6 examples' to a number of steps, rounded to the nearest.

    Args:
      duration: a number and one of the units steps, epochs, examples.
      batch_size: examples that one step takes from the dataset.
      num_examples: examples in one epoch.

    Raises:
      ValueError: the duration has another form, or is absurd.
    """
    number, unit = _parse_duration(duration)
    examples_per_unit = {"step": batch_size, "epoch": num_examples, "example": 1}[unit]
    return round(number * examples_per_unit / batch_size)


def _parse_duration(duration: str) -> tuple[float, str]:
    """Returns the number and the unit, in the singular."""
    match = _DURATION.fullmatch(duration.strip())
    if match is None:
        raise ValueError(f"{duration!r} is not a duration")
    number = float(match[1].replace("_", ""))
    if number > MAX_DURATION:
        raise ValueError(f"{duration!r} is longer than any run")
    return number, match[2].lower()


@dataclasses.dataclass(frozen=True)
class Field:
    """Describes one field of a config.

    Attributes:
      default: its value where a config does not set it.
      check: returns a value in its canonical type; raises ValueError, TypeError, re.error or OverflowError for others.
      expects: what the check accepts, in words.
      source: where the default comes from, starting with one of the labels above.
      kind: type of the value, for the command line.
      unless: values of other fields of the section, each of which leaves this field without effect, by field name.
      owners: names of the networks, optimizers or schedules that have this field; () if all have it.
      optional: a config may hold None, which stands for the default (of the chosen owner).
    """

    default: Any
    check: Callable[[Any], Any]
    expects: str
    source: str
    kind: type
    unless: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    owners: tuple[str, ...] = ()
    optional: bool = False


def _field(
    default: Any,
    check: Callable[[Any], Any],
    expects: str,
    source: str,
    kind: type,
    unless: Mapping[str, tuple] | None = None,
) -> Any:
    field = Field(default, check, expects, source, kind, unless or {}, optional=default is None)
    return dataclasses.field(default=default, metadata={"field": field})


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _compile(pattern: str) -> None:
    """Raises an exception if the pattern is not a valid regular expression."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about sets in sets
        re.compile(pattern)


def integer(
    default: int | None, low: int, source: str, *, high: int = MAX_INTEGER, unless: Mapping[str, tuple] | None = None
) -> Any:
    """Declares a whole number of at least `low` and at most `high`."""

    def check(value: Any) -> int:
        value = _integer(value)
        _require(low <= value <= high)
        return value

    expects = f"a whole number, at least {low}, at most {high:,}"
    return _field(default, check, expects, source, int, unless)


def number(
    default: float,
    low: float,
    high: float,
    source: str,
    *,
    above: bool = False,
    below: bool = False,
    unless: Mapping[str, tuple] | None = None,
) -> Any:
    """Declares a float in [low, high]; `above` excludes `low`, and `below` excludes `high`."""

    def check(value: Any) -> float:
        value = _number(value)
        _require((value > low if above else value >= low) and (value < high if below else value <= high))
        return value

    limit = "" if high == math.inf else f", {'below' if below else 'at most'} {high:g}"
    return _field(
        default, check, f"a number {'above' if above else 'of at least'} {low:g}{limit}", source, float, unless
    )


def choice(default: str, options: tuple[str, ...], source: str, *, unless: Mapping[str, tuple] | None = None) -> Any:
    """Declares one of a few words."""

    def check(value: Any) -> str:
        _require(value in options)
        return value

    return _field(default, check, "one of " + ", ".join(map(repr, options)), source, str, unless)


def choice_or_integer(
    default: str | int | None,
    words: tuple[str, ...],
    low: int,
    source: str,
    *,
    unless: Mapping[str, tuple] | None = None,
) -> Any:
    """Declares one of the words, or a whole number (which the command line passes as a string)."""

    def check(value: Any) -> str | int:
        if value in words:
            return value
        value = _integer(value)
        _require(low <= value <= MAX_INTEGER)
        return value

    expects = " or ".join(map(repr, words)) + f", or a whole number of at least {low}, at most {MAX_INTEGER:,}"
    return _field(default, check, expects, source, str, unless)


def flag(default: bool, source: str, *, unless: Mapping[str, tuple] | None = None) -> Any:
    """Declares True or False."""

    def check(value: Any) -> bool:
        _require(isinstance(value, bool))
        return value

    return _field(default, check, "True or False", source, bool, unless)


def text(default: str, source: str) -> Any:
    """Declares any string."""

    def check(value: Any) -> str:
        _require(isinstance(value, str))
        return value

    return _field(default, check, "a string", source, str)


_ADDRESS = re.compile(r"([^\s/:\[\]]+|\[[0-9a-fA-F:.]+\]):(\d{1,5})")


def is_address(value: str) -> bool:
    """Returns whether a string is HOST:PORT; the host is a name or an IP address, one of IPv6 in brackets."""
    match = _ADDRESS.fullmatch(value)
    return match is not None and 1 <= int(match[2]) < 1 << 16


def address(default: str, source: str) -> Any:
    """Declares the address of a server, HOST:PORT, or ''."""

    def check(value: Any) -> str:
        _require(isinstance(value, str) and (not value or is_address(value)))
        return value

    return _field(default, check, "HOST:PORT with a port of 1 to 65535, or ''", source, str)


def pattern(default: str, source: str) -> Any:
    """Declares a regular expression over names of parameters."""

    def check(value: Any) -> str:
        _require(isinstance(value, str))
        _compile(value)
        return value

    expects = "a regular expression over parameter names such as 'block2_sepconv1/spatial/kernel'"
    return _field(default, check, expects, source, str)


def span(default: str, source: str, *, zero: bool = False) -> Any:
    """Declares a span of training, a number and a unit, see `duration_in_steps`; above 0 unless `zero`."""

    def check(value: Any) -> str:
        _require(isinstance(value, str))
        number, _ = _parse_duration(value)
        _require(number > 0 or zero)
        return value.strip()

    above = "" if zero else ", above 0"
    expects = f"a number and a unit{above}: '500 steps', '10 epochs', '3e6 examples'"
    return _field(default, check, expects, source, str)


def numbers(default: tuple[float, ...], length: int, source: str) -> Any:
    """Declares a tuple of `length` numbers."""

    def check(value: Any) -> tuple[float, ...]:
        _require(not isinstance(value, str))
        value = tuple(_number(v) for v in value)
        _require(len(value) == length)
        return value

    return _field(default, check, f"{length} numbers", source, tuple)


def strides(default: tuple[int, ...], source: str) -> Any:
    """Declares a tuple of strides, each 1 or 2."""

    def check(value: Any) -> tuple[int, ...]:
        _require(not isinstance(value, str))
        value = tuple(_integer(v) for v in value)
        _require(len(value) == len(default) and set(value) <= {1, 2})
        return value

    return _field(default, check, f"{len(default)} strides, each 1 or 2", source, tuple)


def class_weights(source: str) -> Any:
    """Declares weights of classes: '' (none), 'balanced', or one number for each class; '1, 2.5' is (1.0, 2.5)."""

    def check(value: Any) -> str | tuple[float, ...]:
        if value in ("", "balanced"):
            return value
        # The command line passes a string.
        weights = tuple(_number(weight) for weight in (value.split(",") if isinstance(value, str) else value))
        _require(min(weights) >= 0 and max(weights) > 0)
        return weights

    return _field("", check, "'', 'balanced', or one number for each class, such as '1, 2.5'", source, str)


def factors(source: str) -> Any:
    """Declares pairs of a regular expression over names of parameters and a factor; none by default."""

    def check(value: Any) -> tuple[tuple[str, float], ...]:
        _require(not isinstance(value, str))
        pairs = tuple((pattern, _number(factor)) for pattern, factor in value)
        for pattern, factor in pairs:
            _compile(pattern)
            _require(factor > 0)
        return pairs

    expects = "pairs of a regular expression and a factor above 0, such as (('^head/', 10.0),)"
    return _field((), check, expects, source, tuple)
