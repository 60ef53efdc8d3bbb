"""Parses command lines and configs, and converts errors to three lines and an exit code, for all entry points."""

from __future__ import annotations

import argparse
import errno
import gc
import io
import logging
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from xception_jax.config import FIELDS, unknown_field
from xception_jax.config.shipped import find_config
from xception_jax.environment import SCRIPT, program
from xception_jax.errors import INTERRUPTED_EXIT_CODE, ConfigError, InputMissingError, UsageError, UserError
from xception_jax.names import printable_lines

_OVERRIDE = re.compile(r"--?(?:no)?config\.([\w.]+)(=.*)?", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError` instead of printing its usage and exiting with code 2.

    Help texts and errors call the commands `xception-jax COMMAND`, which is shown as the program that is running.
    """

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog, f"see {self.prog} --help")

    def format_help(self) -> str:
        """Returns the help text."""
        return _with_program(super().format_help())


def run_main(main: Callable[[], int | None]) -> None:
    """Exits with the code that `main` returns, or with that of the `UserError` that it raises."""
    # JAX and its libraries create millions of objects that stay. With Python's threshold of 700, searching them for
    # cycles again and again takes a tenth of the processor time of a short run.
    gc.set_threshold(50_000)
    _protect_output()
    try:
        sys.exit(main())
    except UserError as error:
        _end(error)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        sys.exit(74)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        # Any path may be too long, and fails where it is first used.
        where = f"{str(error.filename)[:60]}..."
        _end(InputMissingError("a path is longer than the system allows", where, "correct or shorten the path"))


class _Record(logging.LogRecord):
    """A log record whose message cannot move the cursor or begin a line, whatever names it holds."""

    def getMessage(self) -> str:
        return printable_lines(super().getMessage())


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{filename}:{lineno}: {category.__name__}: {printable_lines(message)}\n"


def _protect_output() -> None:
    """Escapes names in logs and warnings, and what a stream cannot encode: a name may hold bytes that are no UTF-8."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(error: UserError) -> NoReturn:
    print(_with_program(str(error)), file=sys.stderr)
    sys.exit(error.exit_code)


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
    sections = {name.rsplit(".", 1)[0] for name in FIELDS if "." in name}
    for argument in overrides:
        override = _OVERRIDE.fullmatch(argument)
        if override and override[1] not in FIELDS and override[1] not in sections:
            raise unknown_field(override[1])
    path, variant = find_config(spec)
    argv = ["", f"--config={path}{':' * bool(variant)}{variant}", *overrides]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the way in which ml_collections runs a file
            unused = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        raise _illegal_value(str(error), path) from None
    except flags.Error as error:
        raise UsageError(str(error).splitlines()[0], " ".join(overrides), "see --help") from None
    except UserError:
        raise
    except Exception as error:  # a config is Python code and may raise any exception
        raise _broken_config(path, error) from None
    if unused:
        fix = "write overrides as --config.field=value; see --help"
        raise UsageError(f"unexpected argument {unused[0]!r}", " ".join(overrides), fix)
    return config.value


def _illegal_value(message: str, path: Path) -> ConfigError:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if not message.startswith("flag --config."):
        fix = "correct the file, or the variant after the colon: get_config() takes it as an argument"
        return ConfigError(f"the config does not run: {lines[-1]}", str(path), fix)
    name = re.search(r"config\.([\w.]+)=(.*?):", message)
    if name is None or name[1] not in FIELDS:
        return ConfigError(lines[0], "the command line", "set one field at a time; see --help")
    field = FIELDS[name[1]]
    return ConfigError(
        f"config.{name[1]} is {name[2]!r}",
        f"config.{name[1]}",
        f"set it to {field.expects} (default: {field.default!r})",
    )


def _broken_config(path: Path, error: Exception) -> ConfigError:
    line = failing_line(path, error) or 1
    message = str(error).splitlines()[0] if str(error) else ""
    return ConfigError(
        f"the config does not run: {type(error).__name__}: {message}",
        f"{path}:{line}",
        "correct the file; it must define get_config(), which returns a config",
    )


def failing_line(path: Path, error: Exception) -> int | None:
    """Returns the line of a Python file that raised an error or cannot be parsed. None if the error is elsewhere."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name]
    return getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)


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
