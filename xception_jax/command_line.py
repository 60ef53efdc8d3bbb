"""Parses command lines and configs, and converts errors to three lines and an exit code, for all entry points."""

from __future__ import annotations

import argparse
import errno
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from xception_jax.config import FIELDS, unknown_field
from xception_jax.errors import INTERRUPTED_EXIT_CODE, ConfigError, InputMissingError, UsageError, UserError

_OVERRIDE = re.compile(r"--?config\.([\w.]+)(=.*)?")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UsageError` instead of printing its usage and exiting with code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog, f"see {self.prog} --help")


def run_main(main: Callable[[], int | None]) -> None:
    """Exits with the code that `main` returns, or with that of the `UserError` that it raises."""
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


def _end(error: UserError) -> NoReturn:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses absl flags including --config, for `app.run(flags_parser=...)`.

    Raises:
      UsageError: a flag is unknown or malformed.
      InputMissingError: the config file is missing.
      ConfigError: the config file does not run, or an override is not valid for its field.
    """
    sections = {name.rsplit(".", 1)[0] for name in FIELDS if "." in name}
    for argument in argv:
        override = _OVERRIDE.fullmatch(argument)
        if override and override[1] not in FIELDS and override[1] not in sections:
            raise unknown_field(override[1])
    path = Path(_config_path(argv))
    if path.name and not path.is_file():  # ml_collections would report this only when the config is read
        raise InputMissingError(f"there is no config {path}", str(path), f"choose one of {_configs()}")
    try:
        return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        raise _illegal_value(str(error), path) from None
    except flags.Error as error:
        raise UsageError(str(error).splitlines()[0], " ".join(argv), "see --help") from None
    except UserError:
        raise
    except Exception as error:  # a config is Python code and may raise any exception
        raise _broken_config(path, error) from None


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """Reads a config file and applies overrides such as --config.field=value. Call it only once per process.

    Raises:
      UserError: see `parse_flags`.
    """
    config = config_flags.DEFINE_config_file("config")
    parse_flags(["", f"--config={path}", *overrides])
    return config.value


def _config_path(argv: Sequence[str]) -> str:
    """Returns the file named by --config, or ''. If there are several, the last one, like the flag itself."""
    given = [re.fullmatch(r"--?config(?:=(.*))?", argument) for argument in argv]
    paths = [match[1] or following for match, following in zip(given, [*argv[1:], ""], strict=True) if match]
    return paths[-1].partition(":")[0] if paths else ""


def _configs() -> str:
    return ", ".join(sorted(str(path) for path in Path("configs").glob("*.py"))) or "the files of configs/"


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
        "correct the file; it must define get_config(), as the files of configs/ do",
    )


def failing_line(path: Path, error: Exception) -> int | None:
    """Returns the line of a Python file that raised an error or cannot be parsed. None if the error is elsewhere."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name]
    return getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)


def field_help() -> str:
    """Returns one line for each field of a config: default, what it accepts, source of the default, and its owners."""
    return "\n".join(
        f"config.{name}={field.default!r}: {field.expects}. {field.source}"
        + (f". Only for {', '.join(field.owners)}" if field.owners else "")
        for name, field in FIELDS.items()
    )
