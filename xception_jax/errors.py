"""Defines the errors that users can cause, and all exit codes.

Entry points print a `UserError` to standard error in three lines (what is wrong, where, and how to fix it) and exit
with the code of its class, from sysexits.h. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

SUCCESS_EXIT_CODE = 0
BUG_EXIT_CODE = 1  # with a traceback
INTERRUPTED_EXIT_CODE = 130  # a second signal, or Ctrl-C before training began: 128 + SIGINT, as in shells
READER_LEFT_EXIT_CODE = 141  # the reader of the output has ended, as `head` does: 128 + SIGPIPE, as in shells


class UserError(Exception):
    """A problem that the user can fix.

    Args:
      what: what is wrong, in one line.
      where: the affected field, file, path or step.
      fix: what the user can do.
    """

    exit_code = 64

    def __init__(self, what: str, where: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Makes the error picklable, because data workers send it to the trainer."""
        return type(self), (self.what, self.where, self.fix)

    def __str__(self) -> str:
        return f"error: {self.what}\n  where: {self.where}\n  fix:   {self.fix}"


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
    """The loss is not finite, even after going back to a checkpoint once."""

    exit_code = 70


class DeviceMemoryError(UserError):
    """The step does not fit into the memory of a device."""

    exit_code = 71


class WorkdirError(UserError):
    """The work directory cannot be used, or another run holds it."""

    exit_code = 73


class StorageError(UserError):
    """Reading or writing failed, for example because the disk is full or a data worker died."""

    exit_code = 74


class PreemptedError(UserError):
    """The run was asked to stop. It has saved its state, and the same command resumes it. This is not an error."""

    exit_code = 75

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  next:  {self.fix}"


class ConfigError(UserError):
    """A config field is unknown, has the wrong type, is out of range, or contradicts another field."""

    exit_code = 78


RESUMABLE_EXIT_CODES = (PreemptedError.exit_code, INTERRUPTED_EXIT_CODE)
"""Exit codes after which the same command resumes the run."""
