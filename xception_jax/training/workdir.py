"""The work directory of a run: usable, held by one run at a time, and always of the same experiment."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from xception_jax.config import FIELDS, ExperimentConfig, to_dict, to_json
from xception_jax.errors import ConfigError, WorkdirError
from xception_jax.files import write_atomically

CONFIG = "config.json"
LOCK = "lock"
CHECKPOINTS = "checkpoints"

# With other values of these, what was trained so far is not the beginning of the same run. Others may change on the
# way: a researcher extends `duration`, or lowers the learning rate.
_IDENTITY = re.compile(r"model\..*|data\..*|init\..*|optimizer\.frozen|batch_size|seed")
# Where the images are and how they are read. Raising `max_bad_fraction` is how a run goes on after exit code 65.
_NOT_IDENTITY = (
    "data.data_dir",
    "data.threads",
    "data.workers",
    "data.cache",
    "data.max_bad_fraction",
    "data.test_split",
)


def check_path(workdir: str) -> Path:
    """Returns the absolute path of a work directory.

    Raises:
      ConfigError: it is empty, or the address of an object store.
    """
    if not workdir or "://" in workdir:
        what = "is not supported: checkpoints and locks need a file system" if workdir else "is empty"
        raise ConfigError(f"the work directory {workdir!r} {what}", "--workdir", "name a local directory")
    return Path(workdir).absolute()


@contextlib.contextmanager
def open_workdir(
    path: str | os.PathLike,
    config: ExperimentConfig,
    *,
    primary: bool | None = None,
    report: Callable[[str], None] = print,
) -> Iterator[Path]:
    """Creates a work directory or opens an existing one, and holds it while the context lasts.

    It then has `config.json`, the config of this run, and `lock`, which says who holds it. A lock file that a killed
    run left behind holds nothing: the kernel drops a `flock` together with the process.

    Args:
      path: the directory.
      config: as `resolve` returned it.
      primary: whether this process is the one that locks and writes; the others of a distributed run only get the
        path. Left out, it is process 0.
      report: takes one line for each field that has changed since the last run here.

    Yields:
      The absolute path.

    Raises:
      WorkdirError: it cannot be created or written, or another run holds it.
      ConfigError: it has checkpoints of another model, dataset, batch size or seed.
    """
    path = Path(path).absolute()
    if primary is None:  # asking for the process index starts the devices, which takes seconds
        primary = not jax.distributed.is_initialized() or jax.process_index() == 0
    if not primary:
        yield path
        return
    with hold_directory(path):
        # Only now: until the lock is held, config.json is another run's.
        _write_config(path, config, report)
        yield path


@contextlib.contextmanager
def hold_directory(path: Path) -> Iterator[None]:
    """Creates a directory or takes an existing one, and keeps other processes out while the context lasts.

    Raises:
      WorkdirError: it cannot be created or written, or another process holds it.
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
        f"the work directory cannot be used: {reason}", str(path), "choose a directory that this user can write"
    )


def _hold(lock: int, path: Path) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": shlex.join(sys.orig_argv),
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
            "wait for it, stop it, or choose another work directory",
        ) from None
    except OSError as error:
        raise _unusable(path, error) from None


def _describe(holder: bytes) -> str:
    try:
        return "process {pid} on {host} since {since}: {command}".format(**json.loads(holder))
    except (ValueError, KeyError, TypeError):  # it has the lock, and has not yet written who it is
        return "it has just started"


def _write_config(path: Path, config: ExperimentConfig, report: Callable[[str], None]) -> None:
    """Compares config.json with this run's config, and replaces it."""
    text = to_json(config)
    try:
        stored = (path / CONFIG).read_text()
        if stored == text:
            return
        changes = _changes(json.loads(stored), to_dict(config))
    except FileNotFoundError:
        changes = {}
    except ValueError:
        raise ConfigError(
            f"{CONFIG} is not readable as JSON", str(path / CONFIG), "delete it if you know that this config is its own"
        ) from None
    except OSError as error:
        raise _unusable(path, error) from None
    refused = [line for name, line in changes.items() if _IDENTITY.fullmatch(name) and name not in _NOT_IDENTITY]
    # Before the first checkpoint there is nothing to protect: a mistyped model is corrected in place.
    if refused and _has_checkpoints(path):
        raise ConfigError(
            f"the work directory has checkpoints of another experiment: {len(refused)} of its fields differ",
            "\n    ".join([f"{path} (stored -> now)", *refused]),
            "set these fields back, or choose another work directory",
        )
    for line in changes.values():
        report(f"changed since the last run here: config.{line}")
    try:
        write_atomically(path / CONFIG, text)
    except OSError as error:
        raise _unusable(path, error) from None


def _changes(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Returns a line 'field: stored -> now' for each field that differs, by its name."""
    stored, now = _flatten(stored), _flatten(json.loads(json.dumps(now)))
    changes = {}
    for name, field in FIELDS.items():
        # A field that is newer than the stored config had the effect of its default, and one that only other networks
        # or optimizers have has none.
        default = json.loads(json.dumps(field.default))
        before, after = stored.get(name, default), now.get(name, default)
        if before != after:
            changes[name] = f"{name}: {before!r} -> {after!r}"
    return changes


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _has_checkpoints(path: Path) -> bool:
    return any(re.fullmatch(r"\d+(\.corrupt-.*)?", entry.name) for entry in (path / CHECKPOINTS).glob("*"))
