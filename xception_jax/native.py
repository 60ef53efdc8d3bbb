"""Compiles native libraries, and loads them from a cache that only this user can write.

A library runs as this user before any of its functions is called, so the cache is treated like the keys of `ssh`. Each
directory on the way belongs to this user or root, and nobody else can write to it; a directory such as /tmp needs its
sticky bit. Neither the library nor a directory that this module creates is a link. The SHA-256 of the library is
beside it, and the bytes that were compared with it are the bytes that are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import grp
import hashlib
import logging
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from xception_jax.environment import APPLICATION, cache_directory
from xception_jax.files import sync_directory
from xception_jax.names import printable_path

if TYPE_CHECKING:
    from filelock import AcquireReturnProxy

KERNELS = "kernels"  # directory of the libraries in the cache
PATIENCE = 600.0  # seconds for one compilation, or to wait for that of another process
_MAX_BYTES = 64 << 20  # of a library; ours have about 1 MB
_SCRATCH = "build-"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

# Runs `sys.argv[2:]`, and ends with all processes of its group when the process `sys.argv[1]` has ended. A compiler
# starts programs of its own, which a signal to the compiler would not reach.
_SUPERVISOR = """
import os, signal, subprocess, sys
try:
    compiler = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
except (OSError, ValueError) as error:
    sys.exit(f"{sys.argv[2]}: {error}")
while True:
    try:
        sys.exit(compiler.wait(0.2) and 1)
    except subprocess.TimeoutExpired:
        if os.getppid() != int(sys.argv[1]):
            os.killpg(0, signal.SIGKILL)
"""


class UntrustedError(OSError):
    """Another user could have written a file or directory, or could replace it."""


def load(name: str, command: Callable[[Path], list[str]], description: str) -> ctypes.CDLL:
    """Loads a library from the cache. It is compiled first if the cache has none, or a damaged one.

    Args:
      name: name of the library, without a suffix; it changes with everything that the library depends on.
      command: returns the command that compiles the library into a file.
      description: description of the library, for messages.

    Raises:
      OSError: there is no place that can be trusted and written to.
      subprocess.CalledProcessError: the compiler fails.
    """
    reasons = []
    for directory in _candidates():
        try:
            library = _from_cache(_private_directory(directory) / f"{name}.so", command, description)
        except OSError as error:  # read-only, full, untrusted: the next directory may do
            reasons.append(_reason(error, directory))
            continue
        if reasons:
            logging.warning("The %s are kept in %s. Not used: %s", description, directory, "; ".join(reasons))
        return library
    raise OSError("; ".join(reasons) or "there is no directory for the library")


def _candidates() -> Iterator[Path]:
    """Yields the user's cache directory, if there is one, and a private directory among the temporary files."""
    if (cache := cache_directory()) is not None:
        yield cache / KERNELS
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir()) / f"{APPLICATION}-{os.geteuid()}" / KERNELS


def _from_cache(library: Path, command: Callable[[Path], list[str]], description: str) -> ctypes.CDLL:
    """Opens a library in a private directory, and builds it first unless it is there and its digest is right."""
    if (opened := _opened(library)) is not None:
        if _leftovers(library.parent):
            with contextlib.suppress(OSError), _locked(library.parent, 0):
                _remove_leftovers(library.parent)
        return opened
    with _locked(library.parent, PATIENCE):
        _remove_leftovers(library.parent)
        if (opened := _opened(library)) is not None:  # another process has built it meanwhile
            return opened
        damaged = f"the {description} in the cache are damaged; building them again"
        start = damaged if os.path.lexists(library) else f"building the {description}, once"
        tqdm.write(f"{start}: 10 to 20 s ...", file=sys.stderr)
        return _build(library, command)


def _locked(directory: Path, patience: float) -> AcquireReturnProxy:
    """Locks a directory for one builder at a time."""
    import filelock  # takes 40 ms, and most starts build nothing

    lock = filelock.FileLock(directory / "lock", mode=0o600)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        if patience:
            tqdm.write("waiting for another process that builds a library ...", file=sys.stderr)
        return lock.acquire(timeout=patience)


def _leftovers(directory: Path) -> list[Path]:
    return list(directory.glob(f"{_SCRATCH}*"))


def _remove_leftovers(directory: Path) -> None:
    """Removes what killed builders have left. The caller holds the lock, so no builder of this directory runs."""
    for scratch in _leftovers(directory):
        shutil.rmtree(scratch, ignore_errors=True)


def _build(library: Path, command: Callable[[Path], list[str]]) -> ctypes.CDLL:
    """Compiles and opens a library. If it can be opened, it is put into its place, with its digest."""
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=library.parent, ignore_cleanup_errors=True) as name:
        built = Path(name) / library.name
        _run(command(built), built.parent)
        try:
            content = built.read_bytes()
            opened = _open(content, built)
        except OSError as error:
            reason = f"the compiler has written no library: {error}"
            raise subprocess.CalledProcessError(0, command(library), stderr=reason) from None
        digest = f"{_digest(content)}  {library.name}\n".encode()
        for path, data in ((_digest_path(library), digest), (library, content)):
            new = built.with_name(f"{path.name}.new")
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # before the rename, so that the name never refers to missing bytes
            new.replace(path)
    sync_directory(library.parent)
    return opened


def _run(command: list[str], scratch: Path) -> None:
    """Runs a compiler. It ends with this process, and its temporary files are in `scratch`."""
    with subprocess.Popen(
        [sys.executable or "python3", "-I", "-S", "-c", _SUPERVISOR, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"TMPDIR": str(scratch)},
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                reason = f"the compiler did not finish in {PATIENCE:.0f} s"
                raise subprocess.CalledProcessError(1, command, stderr=reason) from None
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=output.decode(errors="replace"))


def _opened(library: Path) -> ctypes.CDLL | None:
    """Opens a library, or returns None if it is not there, not ours, or not what its digest says."""
    try:
        digest, content = _read(_digest_path(library)), _read(library)
        return _open(content, library) if digest.split()[:1] == [_digest(content).encode()] else None
    except OSError:
        return None


def _read(path: Path) -> bytes:
    """Reads a regular file of this user."""
    # A pipe must not block, and a link must not lead elsewhere.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise UntrustedError(f"{printable_path(path)} is not a library")
        if status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_BY_OTHERS:
            raise UntrustedError(f"another user can write to {printable_path(path)}")
        return file.read(_MAX_BYTES)


def _open(content: bytes, path: Path) -> ctypes.CDLL:
    """Opens a library from memory, where nobody can change or truncate it. Without memfd (macOS), from its file."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):
            # Stays open: glibc takes two libraries for one if they have the same name, and so the same descriptor.
            memory = os.memfd_create(path.name)
            with open(memory, "wb", closefd=False) as file:
                file.write(content)
            return ctypes.CDLL(f"/proc/self/fd/{memory}")
    return ctypes.CDLL(str(path))


def _private_directory(directory: Path) -> Path:
    """Creates a directory and those above it that are missing, for this user only, and returns its real path.

    Links are followed above the last two directories, which are ours, and there the real path counts.

    Raises:
      UntrustedError: another user could write to it, or replace it.
      OSError: it cannot be created.
    """
    base = Path(os.path.realpath(directory.parent.parent))
    real = base / directory.parent.name / directory.name
    for place in (*reversed(real.parents), real):
        if not os.path.lexists(place):
            with contextlib.suppress(FileExistsError):  # another process was faster
                place.mkdir(mode=0o700)
        _require_trusted(place, may_be_sticky=place not in (real, real.parent))
    return real


def _require_trusted(directory: Path, may_be_sticky: bool) -> None:
    status, shown = directory.lstat(), printable_path(directory)
    if not stat.S_ISDIR(status.st_mode):
        raise UntrustedError(f"{shown} is a link or a file")
    if status.st_uid not in (0, os.geteuid()):
        raise UntrustedError(f"{shown} belongs to another user")
    writable = status.st_mode & _WRITABLE_BY_OTHERS
    if not writable or (may_be_sticky and status.st_mode & stat.S_ISVTX):
        return
    if writable != stat.S_IWGRP or not _is_private_group(status.st_gid):
        raise UntrustedError(f"other users can write to {shown} (chmod go-w)")


def _reason(error: OSError, directory: Path) -> str:
    """Says in one line why a directory is not used."""
    if isinstance(error, UntrustedError):
        return str(error)
    return f"{printable_path(error.filename or directory)}: {error.strerror or error}"


@functools.cache
def _is_private_group(group: int) -> bool:
    """Returns whether this user is the only member of a group, as on systems where each user has a group."""
    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return entry.gr_name == user.pw_name and user.pw_gid == group and set(entry.gr_mem) <= {user.pw_name}


def _digest_path(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
