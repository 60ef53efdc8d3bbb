"""Defines the errors that users can cause, and all exit codes.

Entry points print a `UserError` to standard error in three lines (what is wrong, where, and how to fix it) and exit
with the code of its class, from sysexits.h. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Self

from xception_jax.names import LINE_LENGTH, printable

SUCCESS_EXIT_CODE = 0
BUG_EXIT_CODE = 1  # with a traceback
INTERRUPTED_EXIT_CODE = 130  # a second signal, or Ctrl-C in most commands: 128 + SIGINT, as in shells
OUT_OF_DEVICE_MEMORY = "RESOURCE_EXHAUSTED"  # in messages of XLA
READER_LEFT_EXIT_CODE = 141  # the reader of the output has ended, as `head` does: 128 + SIGPIPE, as in shells


class UserError(Exception):
    """A problem that the user can fix.

    Names from files may be part of every text: `str` shows them escaped, and cuts each text at `names.LINE_LENGTH`.

    Args:
      what: what is wrong, in one line.
      where: the affected field, file, path or step, in one line.
      fix: what the user can do, in one line.
      details: further lines below `where`, such as the rows of a table.
    """

    exit_code = 64

    def __init__(self, what: str, where: str, fix: str, details: Sequence[str] = ()) -> None:
        super().__init__(what)
        self.what, self.where, self.fix, self.details = what, where, fix, tuple(details)
        self.is_printed_here = True

    def printed_by(self, this_process: bool) -> Self:
        """Sets whether this process prints the message, and returns itself."""
        self.is_printed_here = this_process
        return self

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str, tuple[str, ...]]]:
        """Makes the error picklable, because data workers send it to the trainer."""
        return type(self), (self.what, self.where, self.fix, self.details)

    def __str__(self) -> str:
        return self._lines("error: ", "fix:   ")

    def _lines(self, before_what: str, before_fix: str) -> str:
        what, where, fix = (printable(text, LINE_LENGTH) for text in (self.what, self.where, self.fix))
        details = "".join(f"\n    {printable(line, LINE_LENGTH)}" for line in self.details)
        return f"{before_what}{what}\n  where: {where}{details}\n  {before_fix}{fix}"


class UsageError(UserError):
    """The command line is not valid."""

    exit_code = 64


class BadDataError(UserError):
    """Data, labels, a weight file or all checkpoints are damaged or do not fit."""

    exit_code = 65


class InputMissingError(UserError):
    """A dataset, a file or a config is missing."""

    exit_code = 66


class DivergedError(UserError):
    """The loss is not finite, and there is no checkpoint to go back to, or going back to one did not help."""

    exit_code = 70


class DeviceMemoryError(UserError):
    """A step does not fit into the memory of a device, or the program into that of the machine."""

    exit_code = 71


class WorkdirError(UserError):
    """The work directory cannot be used, or another run holds it."""

    exit_code = 73


class StorageError(UserError):
    """Reading or writing failed, for example because the disk is full or a data worker died."""

    exit_code = 74


class PreemptedError(UserError):
    """The run was asked to stop, lost a process, or hung. The same command resumes it. This is not an error."""

    exit_code = 75

    def __str__(self) -> str:
        return self._lines("", "next:  ")


class ConfigError(UserError):
    """A config field is unknown, has the wrong type, is out of range, or contradicts another field."""

    exit_code = 78


RESUMABLE_EXIT_CODES = (PreemptedError.exit_code, INTERRUPTED_EXIT_CODE)
"""Exit codes after which the same command resumes the run."""


def exit_code_meanings() -> dict[int, str]:
    """Returns what each exit code means, in the order of the codes."""
    meanings = {
        SUCCESS_EXIT_CODE: "The command has finished.",
        BUG_EXIT_CODE: "A bug of this package, with a traceback. Please report it.",
        INTERRUPTED_EXIT_CODE: "A second signal, or Ctrl-C in a command other than train and study run.",
        READER_LEFT_EXIT_CODE: "The program that reads the output has ended, as head does.",
    }
    for error in UserError.__subclasses__():
        meanings[error.exit_code] = str(inspect.getdoc(error)).split("\n\n")[0].replace("\n", " ")
    return dict(sorted(meanings.items()))
