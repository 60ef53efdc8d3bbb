"""Opens the work directory of a run, locks it, and checks that it belongs to the same experiment."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from xception_jax.config import FIELDS, ExperimentConfig, flatten, to_json
from xception_jax.errors import ConfigError, WorkdirError
from xception_jax.files import write_atomically
from xception_jax.names import command_line

CONFIG = "config.json"
LOCK = "lock"
CHECKPOINTS = "checkpoints"

# A run cannot resume with different values of these fields. Other fields may change, for example to extend `duration`
# or to lower the learning rate.
_IDENTITY = re.compile(r"model\..*|data\..*|init\..*|optimizer\.frozen|batch_size|seed")
# Where the images are and how they are read. Raising a limit allows a run to resume after exit code 65.
_NOT_IDENTITY = (
    "data.data_dir",
    "data.threads",
    "data.workers",
    "data.cache",
    "data.decoding_memory",
    "data.max_bad_fraction",
    "data.max_pixels",
    "data.max_scans",
    "data.test_split",
)


@contextlib.contextmanager
def open_workdir(
    path: str | os.PathLike,
    config: ExperimentConfig,
    *,
    primary: bool | None = None,
    report: Callable[[str], None] = print,
) -> Iterator[Path]:
    """Creates or opens a work directory, and locks it while the context is active.

    Writes `config.json`, and `lock`, which names the process that holds the lock. A lock file left behind by a killed
    run does not lock anything, because the kernel releases a `flock` when its process ends.

    Args:
      path: the directory.
      config: the resolved config.
      primary: whether this process locks and writes. The other processes of a distributed run only get the path. By
        default, process 0 is primary.
      report: called with one line for each field that has changed since the last run in this directory.

    Yields:
      The absolute path.

    Raises:
      WorkdirError: the directory cannot be created or written, or another run holds the lock.
      ConfigError: the directory has checkpoints of a different model, dataset, batch size or seed.
    """
    path = Path(path).absolute()
    if primary is None:  # process_index() initializes the devices, which takes seconds
        primary = not jax.distributed.is_initialized() or jax.process_index() == 0
    if not primary:
        yield path
        return
    with hold_directory(path):
        # Must come after the lock: config.json may belong to another run that is still active.
        _write_config(path, config, report)
        yield path


@contextlib.contextmanager
def hold_directory(path: Path) -> Iterator[None]:
    """Creates or opens a directory, and locks it while the context is active.

    Raises:
      WorkdirError: the directory cannot be created or written, or another process holds the lock.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        _hold(lock, path)
        yield
    finally:
        os.close(lock)


def _unusable(path: Path, error: OSError) -> WorkdirError:
    reason = error.strerror or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        reason = "there is a file in its place"
    return WorkdirError(
        f"the work directory cannot be used: {reason}", str(path), "choose a directory that you can write to"
    )


def _hold(lock: int, path: Path) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": command_line(sys.orig_argv),
        "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps(holder).encode() + b"\n")
    except BlockingIOError:
        raise WorkdirError(
            "another run holds the work directory",
            f"{path}: {_describe(os.pread(lock, 1 << 16, 0))}",
            "wait for that run, stop it, or choose another work directory",
        ) from None
    except OSError as error:
        raise _unusable(path, error) from None


def _describe(holder: bytes) -> str:
    try:
        return "process {pid} on {host} since {since}: {command}".format(**json.loads(holder))
    except (ValueError, KeyError, TypeError):  # the process has the lock but has not yet described itself
        return "it has just started"


def _write_config(path: Path, config: ExperimentConfig, report: Callable[[str], None]) -> None:
    """Compares config.json with the config of this run, and replaces it."""
    text = to_json(config)
    try:
        stored = (path / CONFIG).read_text()
        if stored == text:
            return
        changes = _changes(json.loads(stored), json.loads(text))
    except FileNotFoundError:
        changes = {}
    except ValueError:
        raise ConfigError(
            f"{CONFIG} is not readable as JSON",
            str(path / CONFIG),
            "delete it if the work directory was created with this config",
        ) from None
    except OSError as error:
        raise _unusable(path, error) from None
    refused = [line for name, line in changes.items() if _IDENTITY.fullmatch(name) and name not in _NOT_IDENTITY]
    # Without a checkpoint there is nothing to protect, so a mistake in the config can be corrected in place.
    if refused and has_checkpoints(path):
        raise ConfigError(
            f"the work directory has checkpoints of another experiment: {len(refused)} of its fields differ",
            f"{path} (stored -> now)",
            "restore these fields, or choose another work directory",
            refused,
        )
    for line in changes.values():
        report(f"changed since the last run in this directory: config.{line}")
    try:
        write_atomically(path / CONFIG, text)
    except OSError as error:
        raise _unusable(path, error) from None


def _changes(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Returns a line 'field: stored -> now' for each field that differs, by field name."""
    stored, now = flatten(stored), flatten(now)
    changes = {}
    for name, field in FIELDS.items():
        # A field may be missing in either config: it was added later, or only other networks or optimizers have it. Its
        # default then applies.
        default = json.loads(json.dumps(field.default))
        before, after = stored.get(name, default), now.get(name, default)
        if before != after:
            changes[name] = f"{name}: {before!r} -> {after!r}"
    return changes


def has_checkpoints(path: Path) -> bool:
    """Returns whether a work directory has checkpoints, intact or not."""
    return any(re.fullmatch(r"\d+(\.corrupt-.*)?", entry.name) for entry in (path / CHECKPOINTS).glob("*"))
