"""Keeps compiled programs in a directory, so that a run that starts again does not compile them again.

JAX reads and writes the directory. Process 0 writes; all processes read.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from xception_jax.errors import WorkdirError
from xception_jax.files import expanded
from xception_jax.storage import is_url, open_store

_FIELD = "config.compilation_cache"
_CHECKED = ".checked"  # its time of modification is that of the last check


def use_compilation_cache(directory: str) -> None:
    """Makes JAX keep compiled programs in a directory.

    Args:
      directory: a path, or an address such as gs://BUCKET/DIRECTORY; '' leaves it to JAX, which reads
        JAX_COMPILATION_CACHE_DIR.

    Raises:
      ConfigError: the path or the address is not valid.
      WorkdirError: the directory cannot be created or read; credentials, bucket or package are missing.
      StorageError: the bucket does not answer.
    """
    if not directory:
        return
    remote = is_url(directory)
    if remote:
        open_store(directory, _FIELD)  # checks what JAX would only warn about
    path = directory if remote else str(expanded(directory, _FIELD).absolute())
    try:
        epath.Path(path).mkdir(parents=True, exist_ok=True)
        if not remote and jax.process_index() == 0:
            _remove_torn(Path(path))
    except Exception as error:  # each kind of storage has its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}".partition("\n")[0]
        fix = "name a directory on a file system or in gs:// that all hosts can read"
        raise WorkdirError(f"compiled programs cannot be kept: {reason}", f"{_FIELD}={directory}", fix) from error
    jax.config.update("jax_compilation_cache_dir", path)
    compilation_cache.reset_cache()  # in a notebook, JAX may have opened another one


def _remove_torn(directory: Path) -> None:
    """Deletes programs that a killed process has written in part. JAX would neither use nor replace them.

    Objects in a bucket are written as a whole.
    """
    try:
        from jax._src.compilation_cache import decompress_executable  # there is no public name for it
    except ImportError:  # another version of JAX; a torn program then only stays without use
        return
    marker = directory / _CHECKED
    checked = marker.stat().st_mtime if marker.exists() else 0.0
    if not os.access(directory, os.W_OK):  # others may write here, and this user only read
        return
    with contextlib.suppress(PermissionError):
        marker.touch()
        for entry in directory.glob("*-cache"):
            with contextlib.suppress(FileNotFoundError):  # deleted by another run
                if entry.stat().st_mtime < checked:
                    continue
                try:
                    decompress_executable(entry.read_bytes())
                except OSError:
                    raise
                except Exception:  # of zlib, zstandard or Python's own zstd
                    os.unlink(entry)
