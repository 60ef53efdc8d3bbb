"""Describes why a checkpoint could not be written to a disk or a bucket, or read from a bucket."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from xception_jax.errors import StorageError, UserError
from xception_jax.files import free_space
from xception_jax.storage import is_url, translate
from xception_jax.training.manifest import DamagedError


@contextlib.contextmanager
def store_errors(directory: Path, action: str) -> Iterator[None]:
    """Translates what Orbax raises if a bucket cannot be reached. On a disk, it leaves errors as they are."""
    try:
        yield
    except (UserError, DamagedError):
        raise
    except Exception as error:
        if not is_url(directory):
            raise
        raise translate(_original(error), str(directory), action, StorageError) from error


def save_failed(directory: Path, step: int, num_bytes: int, last: int, error: Exception) -> UserError:
    """Returns the error to raise for a checkpoint that could not be written.

    Args:
      directory: parent of the checkpoint directories.
      step: the step.
      num_bytes: its size.
      last: the newest step that is there, or 0.
      error: what Orbax raised.
    """
    if is_url(directory):
        if isinstance(error, TimeoutError):
            error = TimeoutError("the store does not accept what is written")
        return translate(_original(error), str(directory / str(step)), "saving the checkpoint", StorageError)
    # The message of tensorstore has several lines, and the cause is at its end.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    cause = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or str(error).split("\n")[0]
    return StorageError(
        f"checkpoint {step} could not be written: {cause}",
        f"{directory} (needs {num_bytes:,} bytes, {free_space(directory)})",
        f"free some space and run the same command to resume from step {last}",
    )


def _original(error: Exception) -> Exception:
    """Returns the error of this package that Orbax has wrapped in one of its own, or the error itself."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return cause or error
