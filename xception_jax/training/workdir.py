"""Opens the work directory of a run, locks it, and checks that it belongs to the same experiment."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xception_jax.config import FIELDS, ExperimentConfig, flatten, to_json
from xception_jax.errors import ConfigError, WorkdirError
from xception_jax.files import remove_leftovers, write_atomically
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.names import command_line, printable
from xception_jax.storage import join
from xception_jax.user_files import parse_json, read_text, reading

CONFIG = "config.json"
LOCK = "lock"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
CHECKPOINT = re.compile(r"\d+(\.corrupt-.*)?")
"""Names of checkpoints, intact or not."""

# Where a run or a study writes files. The work directory of each cell of a study is cleaned when it is opened.
_WRITTEN = ("figures", CHECKPOINTS, f"{CHECKPOINTS}/*")

# A run cannot resume with different values of these fields. Other fields may change, for example to extend `duration`
# or to lower the learning rate.
_IDENTITY = re.compile(r"model\..*|data\..*|init\..*|optimizer\.(frozen|name)|evaluation\.map_at|batch_size|seed")
# These add arrays to the state, or a step to the optimizer, unless they are zero.
_ADDS_STATE = ("optimizer.clip_norm", "optimizer.multipliers", "ema.decay")
_COUPLED = ("sgd", "rmsprop", "adam")  # where weight decay is a step before the optimizer
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
)


LOCK_OF_LOST_HOST = 100
"""Seconds for which a run waits for a lock of another host: NFS 4 keeps the locks of a lost host for 90 by default."""


@contextlib.contextmanager
def open_workdir(
    path: str | os.PathLike,
    config: ExperimentConfig,
    *,
    primary: bool | None = None,
    report: Callable[[str], None] = print,
) -> Iterator[Path]:
    """Creates or opens a work directory, and locks it while the context is active.

    Writes `lock`, which names the process that holds the lock. A lock file left behind by a killed run does not lock
    anything, because the kernel releases a `flock` when its process ends. `config.json` is compared with the config,
    and left to `write_config`.

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
    if primary is None:
        import jax  # not needed by `check_workdir`

        # process_index() initializes the devices, which takes seconds.
        primary = not jax.distributed.is_initialized() or jax.process_index() == 0
    if not primary:
        yield path
        return
    with hold_directory(path):
        for name in (CONFIG, METRICS):
            _require(path / name, stat.S_ISREG, "a regular file")
        _require(path / CHECKPOINTS, stat.S_ISDIR, "a directory", links=True)
        # Must come after the lock: config.json may belong to another run that is still active.
        check_config(path, config, has_checkpoints(path), report)
        yield path


def check_workdir(path: Path, *, alone: bool) -> None:
    """Refuses a work directory that `open_workdir` would refuse, before JAX is imported.

    Args:
      path: the absolute path. Nothing is created.
      alone: whether the run has no other processes, which would hold the lock.

    Raises:
      WorkdirError: it cannot be created or written, or another run holds the lock.
    """
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    try:
        if not existing.is_dir():
            raise NotADirectoryError
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        if alone and not _try_lock(lock, path) and not _of_another_host(lock):
            raise _held(path, lock)
    finally:
        os.close(lock)


def _try_lock(lock: int, path: Path) -> bool:
    """Returns whether this process now holds the lock; False if another one does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise _unusable(path, error) from None
        raise WorkdirError(
            "the file system has no locks; without them, two runs could write to this work directory",
            f"{path}: flock: {error.strerror}",
            "mount it with locks (Lustre: -o flock), or choose a directory on another file system or in gs://",
        ) from None
    return True


def _held(path: Path, lock: int) -> WorkdirError:
    return WorkdirError(
        "another run holds the work directory",
        f"{path}: {_describe(_holder(lock))}",
        "wait for that run, stop it, or choose another work directory",
    )


@contextlib.contextmanager
def hold_directory(path: Path) -> Iterator[None]:
    """Creates or opens a directory, locks it while the context is active, and deletes what killed writers left.

    The directory may be a link, or be reached through links. The lock may not: its target would be overwritten.

    Raises:
      WorkdirError: the directory cannot be created or written, or another process holds the lock.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        _require(path / LOCK, stat.S_ISREG, "a regular file")
        # Not truncated: it may describe the process that holds it.
        lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        _hold(lock, path)
        remove_leftovers([path, *(directory for pattern in _WRITTEN for directory in path.glob(pattern))])
        yield
    finally:
        os.close(lock)


def _require(path: Path, is_kind: Callable[[int], bool], kind: str, *, links: bool = False) -> None:
    """Raises WorkdirError if there is something else than `kind` at a path, or a link to it unless `links`."""
    try:
        mode = os.stat(path, follow_symlinks=links).st_mode
    except FileNotFoundError:
        if not path.is_symlink():
            return
        mode = stat.S_IFLNK
    except OSError as error:
        raise _unusable(path.parent, error) from None
    if not is_kind(mode):
        what = "a link" if stat.S_ISLNK(mode) else "something else"
        raise WorkdirError(
            f"the work directory cannot be used: {path.name} must be {kind}, but there is {what}",
            str(path),
            "move it away, or choose another work directory",
        )


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
    _lock(lock, path)
    try:
        if os.fstat(lock).st_nlink == 1:  # otherwise the file has another name, and may be somebody's data
            os.ftruncate(lock, 0)
            os.write(lock, json.dumps(holder).encode() + b"\n")
    except OSError as error:
        raise _unusable(path, error) from None


def _lock(lock: int, path: Path) -> None:
    """Takes the lock. Waits for one of another host, which its file server may keep for a while after the host is lost.

    Raises:
      WorkdirError: another run holds the lock, or the file system has none.
    """
    deadline = 0.0
    while not _try_lock(lock, path):
        now = time.monotonic()
        if deadline == 0 and _of_another_host(lock):
            deadline = now + LOCK_OF_LOST_HOST
            where = _describe(_holder(lock))
            print(f"waiting {LOCK_OF_LOST_HOST} s for the lock of {printable(where)} ...", file=sys.stderr)
        if now >= deadline:
            raise _held(path, lock)
        time.sleep(min(2.0, LOCK_OF_LOST_HOST / 10))


def _holder(lock: int) -> dict[str, Any]:
    """Returns what the process that holds the lock wrote into it; {} if it has not yet described itself."""
    try:
        found = json.loads(os.pread(lock, 1 << 16, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _of_another_host(lock: int) -> bool:
    return _holder(lock).get("host", socket.gethostname()) != socket.gethostname()


def _describe(holder: dict[str, Any]) -> str:
    try:
        return "process {pid} on {host} since {since}: {command}".format(**holder)
    except (KeyError, IndexError):
        return "it has just started"


def check_config(
    path: Path, config: ExperimentConfig, protect: bool, report: Callable[[str], None], shown: str = ""
) -> None:
    """Compares config.json with the config of this run.

    Args:
      path: the directory of config.json.
      config: the resolved config.
      protect: whether there are checkpoints, which another experiment must not continue.
      report: called with one line for each field that has changed.
      shown: name of the directory in messages, by default its path.

    Raises:
      ConfigError: another experiment would continue the checkpoints, or config.json is damaged.
      WorkdirError: config.json is not that of a run.
    """
    text, shown = to_json(config), shown or str(path)
    changes: dict[str, tuple[Any, Any]] = {}
    if os.path.lexists(path / CONFIG):
        fix = "delete it if the work directory was created with this config"
        with reading("config of the run", join(shown, CONFIG), fix, damaged=ConfigError):
            stored = read_text(path / CONFIG)
            if stored == text:
                return
            found = parse_json(stored, dict)
            if not {"model", "data", "optimizer"} & set(found):
                what = f"there is another {CONFIG}, which is not that of a run"
                raise WorkdirError(what, join(shown, CONFIG), "choose another work directory")
            changes = _changes(found, json.loads(text))
    lines = {name: f"{name}: {before!r} -> {after!r}" for name, (before, after) in changes.items()}
    refused = [lines[name] for name, values in changes.items() if _is_refused(name, *values, config.optimizer.name)]
    # Without a checkpoint there is nothing to protect, so a mistake in the config can be corrected in place.
    if refused and protect:
        raise ConfigError(
            f"the work directory has checkpoints of another experiment: {len(refused)} of its fields differ",
            f"{shown} (stored -> now)",
            "restore these fields, or choose another work directory",
            refused,
        )
    if protect and "data.test_split" in changes and config.data.test_split and _has_test_result(path):
        raise ConfigError(
            "the metrics of the run have a test result, which may be of another test split",
            f"{shown}: config.{lines['data.test_split']} (stored -> now)",
            "leave config.data.test_split empty, and evaluate with `xception-jax evaluate RUN --split SPLIT`",
        )
    for line in lines.values():
        report(f"changed since the last run in this directory: config.{line}")


def write_config(path: Path, config: ExperimentConfig) -> None:
    """Writes config.json. Must be called after everything that may refuse the run.

    Raises:
      WorkdirError: it cannot be written.
    """
    try:
        write_atomically(path / CONFIG, to_json(config))
    except OSError as error:
        raise _unusable(path, error) from None


def _has_test_result(path: Path) -> bool:
    return any(entry["split"] == "test" for entry in read_metrics(path / METRICS))


def _is_refused(name: str, before: Any, after: Any, optimizer: str) -> bool:
    """Returns whether a run with checkpoints cannot resume with another value of a field."""
    if name == "data.test_split":  # its metrics are in metrics.jsonl, under the name 'test'
        return bool(before and after)
    if name in _ADDS_STATE or (name == "optimizer.weight_decay" and optimizer in _COUPLED):
        return bool(before) != bool(after)
    return name not in _NOT_IDENTITY and _IDENTITY.fullmatch(name) is not None


def _changes(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the values before and after of each field that differs, by its name."""
    stored, now = flatten(stored), flatten(now)
    changes = {}
    for name, field in FIELDS.items():
        # A field may be missing in either config: it was added later, or only other networks or optimizers have it. Its
        # default then applies.
        default = json.loads(json.dumps(field.default))
        before, after = stored.get(name, default), now.get(name, default)
        if before != after:
            changes[name] = before, after
    return changes


def has_checkpoints(path: Path) -> bool:
    """Returns whether a work directory has checkpoints, intact or not."""
    return any(CHECKPOINT.fullmatch(entry.name) for entry in (path / CHECKPOINTS).glob("*"))
