"""Parses command lines and configs, and converts errors to three lines and an exit code, for all entry points."""

from __future__ import annotations

import argparse
import gc
import inspect
import io
import logging
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

from xception_jax.config import FIELDS, default_config, unknown_field
from xception_jax.config.fields import MAX_INTEGER
from xception_jax.config.shipped import find_config
from xception_jax.environment import SCRIPT, program
from xception_jax.errors import ConfigError, UsageError, UserError
from xception_jax.names import printable_lines
from xception_jax.process import exit_code

_USER_FILE = "file:"  # before the names of modules that `run_file` runs
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)(=.*)?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError` instead of printing its usage and exiting with code 2.

    Help texts and errors call the commands `xception-jax COMMAND`, which is shown as the program that is running.
    """

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog, f"see {self.prog} --help")

    def format_help(self) -> str:
        """Returns the help text."""
        return _with_program(super().format_help())


def at_least(low: int) -> Callable[[str], int]:
    """Returns the type of an argument that is a whole number of at least `low`."""

    def convert(text: str) -> int:
        value = int(text)
        if not low <= value <= MAX_INTEGER:
            least = f"at least {low:,}" if value < low else f"at most {MAX_INTEGER:,}"
            raise argparse.ArgumentTypeError(f"{text} must be {least}")
        return value

    convert.__name__ = "int"  # argparse names the type in its error
    return convert


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Exits with the code that `main` returns, or with that of the error that it raises: see `process.exit_code`."""
    # JAX and its libraries create millions of objects that stay. With Python's threshold of 700, searching them for
    # cycles again and again takes a tenth of the processor time of a short run.
    gc.set_threshold(50_000)
    _protect_output()
    sys.exit(exit_code(main))


class _Record(logging.LogRecord):
    """A log record whose message cannot move the cursor or begin a line, whatever names it holds."""

    def getMessage(self) -> str:
        return printable_lines(super().getMessage())


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{filename}:{lineno}: {category.__name__}: {printable_lines(message)}\n"


def _protect_output() -> None:
    """Escapes names in logs and warnings, and what a stream cannot encode: a name may hold bytes that are not UTF-8."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _with_program(text: str) -> str:
    return text.replace(f"{SCRIPT} ", f"{program()} ")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates overrides from other arguments. `--config.field value` becomes `--config.field=value`."""
    others, overrides = list[str](), list[str]()
    lacks_value = False
    for argument in arguments:
        override = _OVERRIDE.fullmatch(argument)
        if lacks_value and not argument.startswith("--"):
            overrides[-1] += f"={argument}"
        else:
            (overrides if override else others).append(argument)
        lacks_value = override is not None and override[2] is None
    return others, overrides


def with_home(arguments: Sequence[str]) -> list[str]:
    """Replaces ~ by the home directory where a shell does not: in `--out=~/maps`, and inside of quotes."""

    def expanded(argument: str) -> str:
        option, equals, value = argument.partition("=")
        if option.startswith("--") and value.startswith("~/"):
            return f"{option}{equals}{os.path.expanduser(value)}"
        return os.path.expanduser(argument) if argument.startswith("~/") else argument

    return list(map(expanded, arguments))


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raises UsageError if an argument is empty, as that of a variable that is not set: nothing would be read of it."""
    before = ["the command line", *arguments]
    for previous, argument in zip(before, arguments, strict=False):
        if argument == "":
            raise UsageError("an argument is empty", f"after {previous}", "give it a value, or leave it out")
        option, equals, value = argument.partition("=")
        if option.startswith("--") and equals and not value:
            raise UsageError(f"{option} is empty", option, "give it a value, or leave it out")


def read_config(spec: str, overrides: Sequence[str]) -> ConfigDict:
    """Reads a config and applies overrides.

    Args:
      spec: see `find_config`.
      overrides: such as --config.field=value.

    Raises:
      UsageError: an override is malformed.
      InputMissingError: there is no such config.
      ConfigError: the config does not run, or an override is not valid for its field.
    """
    for argument in overrides:
        override = _OVERRIDE.fullmatch(argument)
        if override and override[1] not in FIELDS:
            raise unknown_field(override[1])
    path, variant = find_config(spec)
    config = run_file(path, "get_config", [variant] if variant else [])
    if not isinstance(config, ConfigDict):
        fix = "end get_config() with `return config`, where config comes from default_config()"
        raise ConfigError(f"get_config() returns {type(config).__name__}, not a config", str(path), fix)
    overrides = _last_of_each(overrides)
    try:
        config = _prepare(config, overrides)
        return _with_overrides(config, [argument for argument in overrides if not _is_none(argument)])
    except UserError:
        raise
    except Exception as error:  # the value of a flag may make a parser raise any exception
        raise _illegal_override(config, overrides, error) from None


def _last_of_each(overrides: Sequence[str]) -> list[str]:
    """Returns the last override of each field."""
    by_name = {override[1]: argument for argument in overrides if (override := _OVERRIDE.fullmatch(argument))}
    return [argument for argument in overrides if argument in by_name.values() or not _OVERRIDE.fullmatch(argument)]


def _is_none(argument: str) -> bool:
    """Returns whether an override sets an optional field to None, which no parser of flags does."""
    override = _OVERRIDE.fullmatch(argument)
    return override is not None and override[2] == "=None" and override[1] in FIELDS and FIELDS[override[1]].optional


def _prepare(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Gives the fields that are overridden their usual types: a value is parsed by the type of the one before it. Those
    that become None get their usual value, which is None.

    A config may lack a field, or hold a value of another type that the field accepts, such as 4 for 'depthwise'.
    """
    if isinstance(config, FrozenConfigDict):
        config = ConfigDict(config)
    defaults = default_config()
    for argument in overrides:
        override = _OVERRIDE.fullmatch(argument)
        if override is None or override[1] not in FIELDS:
            continue
        *sections, leaf = override[1].split(".")
        section, usual = config, defaults
        for name in sections:
            if not isinstance(section.get(name), ConfigDict):
                with section.unlocked():
                    section[name] = ConfigDict()
            section, usual = section[name], usual[name]
        kind = usual.get_type(leaf)
        is_usual = leaf in section and section.get_type(leaf) is kind and isinstance(section[leaf], kind | None)
        if not is_usual or _is_none(argument):
            with section.unlocked():
                if leaf in section:
                    del section[leaf]
                section[leaf] = usual.get_ref(leaf)
    return config


def _with_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    argv, values = ["", *overrides], flags.FlagValues()
    flag = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    if unused := values(argv)[1:]:
        fix = "write overrides as --config.field=value; see --help"
        raise UsageError(f"unexpected argument {unused[0]!r}", " ".join(overrides), fix)
    return flag.value


def _illegal_override(config: ConfigDict, overrides: Sequence[str], error: Exception) -> UserError:
    for argument in overrides:
        override = _OVERRIDE.fullmatch(argument)
        try:
            _with_overrides(config, [argument])
        except Exception:
            name, value = (override[1], (override[2] or "=")[1:]) if override else ("", "")
            if name in FIELDS:
                field = FIELDS[name]
                return ConfigError(
                    f"config.{name} is {value!r}",
                    f"config.{name}",
                    f"set it to {field.expects} (default: {field.default!r})",
                )
            if override and isinstance(error, flags.IllegalFlagValueError):
                return unknown_field(name)
    what = (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(what, " ".join(overrides), "set one field at a time; see --help")


def run_file(path: Path, function: str, arguments: Sequence[str]) -> Any:
    """Runs a Python file of the user, and returns what one of its functions returns.

    Args:
      path: a config or a study.
      function: 'get_config' or 'get_study'.
      arguments: what the function is called with, from the command line.

    Raises:
      ConfigError: the file does not run, has no such function, or the function does not take these arguments. It names
        the line that is to blame.
      UserError: raised by the file itself.
    """
    try:
        module = ModuleType(f"{_USER_FILE}{path.stem}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # where dataclasses look for the names in their annotations
        exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
        found = getattr(module, function, None)
        if not callable(found):
            fix = f"define {function}(), and return what it builds"
            raise ConfigError(f"the file has no function {function}()", str(path), fix)
        try:
            inspect.signature(found).bind(*arguments)
        except TypeError as error:
            what = f"{function}() does not take {', '.join(map(repr, arguments)) or 'no argument'}: {error}"
            fix = "correct what follows the colon: it is passed to the function"
            if not arguments:
                fix = f"add what it takes after a colon: {path.name}:ARGUMENT"
            raise ConfigError(what, str(path), fix) from None
        return found(*arguments)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # it is Python code and may raise anything
        line = failing_line(path, error)
        message = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"the file does not run: {type(error).__name__}: {message}",
            f"{path}:{line}" if line else str(path),
            "correct the file, or what follows the colon: it is passed to the function",
        ) from None


def failing_line(path: Path, error: BaseException) -> int | None:
    """Returns the line of a Python file that raised an error or cannot be parsed. None if the error is elsewhere."""
    if isinstance(error, SyntaxError) and Path(error.filename or "").name == path.name:
        return error.lineno
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name]
    return frames[-1].lineno if frames else None


def field_help() -> str:
    """Returns the fields of a config by section: default, what a field accepts, source of the default, its owners."""
    sections: dict[str, list[str]] = {"run": []}
    for name, field in FIELDS.items():
        owners = f". Only for {', '.join(field.owners)}" if field.owners else ""
        text = textwrap.wrap(f"{field.expects}. {field.source}{owners}", 100)
        section = name.partition(".")[0] if "." in name else "run"
        sections.setdefault(section, []).extend(
            [f"  config.{name}={field.default!r}", *(f"      {line}" for line in text)]
        )
    lines = ["fields of a config, with their defaults; override them by --config.FIELD=VALUE"]
    for section, fields in sections.items():
        lines += ["", f"{section}:", *fields]
    return "\n".join(lines)
