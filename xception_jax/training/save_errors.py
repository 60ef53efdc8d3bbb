"""Describes why checkpoints cannot be opened, written or read, on a disk or in a bucket."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from xception_jax.errors import BadDataError, StorageError, UserError
from xception_jax.files import free_space
from xception_jax.storage import is_url, translate
from xception_jax.training.manifest import DamagedError

IN_BUCKET_SECONDS, IN_BUCKET_BYTES_PER_SECOND = 300.0, 2e6
"""The time that a save into a bucket may take, and the speed at which its bytes add to it."""


def seconds_to_save(directory: Path, num_bytes: int) -> float:
    """Returns how long a save may take before it fails.

    On a disk there is no limit. If a store refuses only the writes of TensorStore, Orbax waits for 20 minutes.
    """
    return IN_BUCKET_SECONDS + num_bytes / IN_BUCKET_BYTES_PER_SECOND if is_url(directory) else math.inf


def cannot_open(directory: Path, error: Exception, unusable: type[UserError]) -> UserError:
    """Returns the error to raise for a directory that cannot be used. In a bucket, it is of the class `unusable`."""
    if is_url(directory):
        return translate(_original(error), str(directory), "opening", unusable)
    return StorageError(
        f"the checkpoint directory cannot be used: {getattr(error, 'strerror', None) or error}",
        str(directory),
        "make it a directory that you can write to",
    )


def all_damaged(directory: Path, damaged: Mapping[str, str]) -> BadDataError:
    """Returns the error to raise if no checkpoint is intact, given the reasons by name."""
    return BadDataError(
        "every checkpoint is damaged",
        f"{directory}: " + "; ".join(f"{name}: {reason}" for name, reason in damaged.items()),
        "restore one from a backup, or delete these directories to start again from step 0",
    )


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
