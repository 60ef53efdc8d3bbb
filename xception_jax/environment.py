"""Queries the environment of this process (peak memory, versions, command), and sets up its memory allocator."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from xception_jax.names import command_line

SCRIPT = "xception-jax"
APPLICATION = "xception_jax"
_MODULE = "python -m xception_jax"

# Settings of glibc's allocator for training on a CPU. It enables huge pages, and keeps up to 1 GiB of freed memory for
# the next step; page faults would otherwise take up to a third of a step. glibc reads them only when a process starts.
# `mallopt` could set the last two in a running process, but not the huge pages, which have most of the effect.
TUNABLES = "GLIBC_TUNABLES"
ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=0x40000000:glibc.malloc.trim_threshold=0x40000000"
_RESTARTED = "XCEPTION_JAX_RESTARTED"


def program() -> str:
    """Returns what to type before a command such as `train`: the program that is running."""
    return SCRIPT if Path(sys.argv[0]).name == SCRIPT else _MODULE


def command() -> str:
    """Returns the command that started this process, as it would be typed in a shell."""
    if Path(sys.argv[0]).name == SCRIPT:
        return command_line([SCRIPT, *sys.argv[1:]])
    return command_line([Path(sys.executable).name, *sys.orig_argv[1:]])


def usable_cores() -> list[int]:
    """Returns the numbers of the CPU cores that this process may use; macOS does not restrict processes."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def use_cores(cores: Iterable[int]) -> None:
    """Restricts this process to some CPU cores, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def restart_with_allocator() -> None:
    """Replaces this program by itself with the settings of `ALLOCATOR`, at most once.

    The process keeps its number, arguments, standard streams and ignored signals. Call this before any thread is
    started. Nothing happens without glibc (macOS, musl), or if the user has set GLIBC_TUNABLES for the allocator; an
    empty value turns the settings off.
    """
    restarted = os.environ.pop(_RESTARTED, None)  # a setuid program loses GLIBC_TUNABLES, and would restart forever
    if restarted is not None or not sys.executable or not _has_glibc():
        return
    environment = with_allocator(os.environ)
    if environment[TUNABLES] == os.environ.get(TUNABLES):
        return
    # A signal waits until the new program handles it: `process.run_program` lets it through.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    with contextlib.suppress(OSError):  # then the program runs without the settings
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment | {_RESTARTED: "1"})


def with_allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment with `ALLOCATOR`, unless it has settings for the allocator already, or an empty value."""
    own = environment.get(TUNABLES)
    if own is not None and (not own or "glibc.malloc." in own):
        return dict(environment)
    return {**environment, TUNABLES: ":".join(filter(None, (own, ALLOCATOR)))}


def lacks_allocator() -> bool:
    """Returns whether this process could have had settings for the allocator, and was started without any."""
    try:  # `os.environ` would also have a variable that was set too late
        started_with = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return _has_glibc() and not any(variable.startswith(TUNABLES.encode() + b"=") for variable in started_with)


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False


def cache_directory() -> Path | None:
    """Returns the directory of this user for files that can be made again: `$XDG_CACHE_HOME/xception_jax`, or similar.

    Returns:
      An absolute path, or None if there is none: XDG_CACHE_HOME is relative, or this user has no home directory, such
      as a user of a container who is not in its list of users.
    """
    import platformdirs

    try:
        path = platformdirs.user_cache_path(APPLICATION)
    except RuntimeError:  # newer versions; older ones return a path that begins with ~
        return None
    return path if path.is_absolute() else None


def peak_memory() -> int:
    """Returns the peak resident memory of this process, in bytes.

    On Linux, ru_maxrss survives exec and includes the memory of the parent process, so this reads VmHWM from /proc,
    which does not.
    """
    try:
        mark = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        mark = None
    if mark:
        return int(mark[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the given packages. Packages that are not installed are omitted."""
    import importlib.metadata  # takes as long as all else that a restart needs

    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
