"""Defines the errors that a user can cause, and all exit codes.

An entry point prints a `UserError` on standard error in three lines (what is wrong, where, what to do) and ends with
the exit code of its class, a code of sysexits.h. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

SUCCESS_EXIT_CODE = 0
INTERRUPTED_EXIT_CODE = 130  # a second signal, or Ctrl-C before training began: 128 + SIGINT, as in shells


class UserError(Exception):
    """A problem that the user can fix.

    Args:
      what: what is wrong, in one line.
      where: the field, file, path or step concerned.
      fix: what to do about it.
    """

    exit_code = 64

    def __init__(self, what: str, where: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        """Supports pickling, which passes errors from data workers to the trainer."""
        return type(self), (self.what, self.where, self.fix)

    def __str__(self) -> str:
        return f"error: {self.what}\n  where: {self.where}\n  fix:   {self.fix}"


class UsageError(UserError):
    """The command line makes no sense."""

    exit_code = 64


class BadDataError(UserError):
    """Data, a label, a weight file or every checkpoint is damaged."""

    exit_code = 65


class InputMissingError(UserError):
    """A dataset, a file or a config is not there."""

    exit_code = 66


class DivergedError(UserError):
    """The loss stayed non-finite, also after one return to the last good checkpoint."""

    exit_code = 70


class DeviceMemoryError(UserError):
    """The step does not fit into the memory of the device."""

    exit_code = 71


class WorkdirError(UserError):
    """The work directory cannot be used, or another run holds it."""

    exit_code = 73


class StorageError(UserError):
    """Reading or writing failed: disk full, a data worker that died."""

    exit_code = 74


class PreemptedError(UserError):
    """The run was told to stop, saved its state and can be resumed by the same command."""

    exit_code = 75


class ConfigError(UserError):
    """A config field is unknown, of the wrong type, out of range, or contradicts another."""

    exit_code = 78


RESUMABLE_EXIT_CODES = (PreemptedError.exit_code, INTERRUPTED_EXIT_CODE)
"""The same command continues a run that ended with one of these."""
