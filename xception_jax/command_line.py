"""What every entry point shares: flags that make a config, and errors that become three lines and an exit code."""

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
from xception_jax.errors import ConfigError, InputMissingError, UsageError, UserError

_OVERRIDE = re.compile(r"--?config\.([\w.]+)(=.*)?")


class Parser(argparse.ArgumentParser):
    """Parses arguments; what is wrong with them is a `UsageError`, and not argparse's usage and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog, f"see {self.prog} --help")


def run_main(main: Callable[[], int | None]) -> None:
    """Ends the process with what `main` returns, or with the exit code of the `UserError` that it raises."""
    try:
        sys.exit(main())
    except UserError as error:
        _end(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(74)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        # Whatever argument is a path may be so, and it is found where the path is first used.
        where = f"{str(error.filename)[:60]}..."
        _end(InputMissingError("a path is longer than the system allows", where, "correct or shorten it"))


def _end(error: UserError) -> NoReturn:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses absl flags with --config among them, for `app.run(flags_parser=...)`.

    Raises:
      UsageError: an unknown flag, or no --config.
      InputMissingError: the file of the config is not there.
      ConfigError: the file does not run, or an override does not fit its field.
    """
    sections = {name.rsplit(".", 1)[0] for name in FIELDS if "." in name}
    for argument in argv:
        override = _OVERRIDE.fullmatch(argument)
        if override and override[1] not in FIELDS and override[1] not in sections:
            raise unknown_field(override[1])
    path = Path(_config_path(argv))
    if path.name and not path.is_file():  # ml_collections would only say so when the config is read
        raise InputMissingError(f"there is no config {path}", str(path), f"choose among {_configs()}")
    try:
        return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
        raise _illegal_value(str(error), path) from None
    except flags.Error as error:
        raise UsageError(str(error).splitlines()[0], " ".join(argv), "see --help") from None
    except UserError:
        raise
    except Exception as error:  # a config is Python and may raise anything
        raise _broken_config(path, error) from None


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config of a file with its overrides (--config.field=value); once in a process.

    Raises:
      UserError: as `parse_flags`.
    """
    config = config_flags.DEFINE_config_file("config")
    parse_flags(["", f"--config={path}", *overrides])
    return config.value


def _config_path(argv: Sequence[str]) -> str:
    """Returns the file that --config names; of several the last, as the flag itself does; '' without."""
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
    """Returns the line of a Python file that raised an error, or that cannot be parsed; None if it was elsewhere."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name]
    return getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)


def field_help() -> str:
    """Returns one line for each field of a config: default, what it may be, and where the default comes from."""
    return "\n".join(
        f"config.{name}={field.default!r}: {field.expects}. {field.source}" for name, field in FIELDS.items()
    )
