"""Reads files that users name, and writes files that they ask for. Every failure is raised as a `UserError`.

A file may come from anyone: empty, huge, deeply nested, binary, of other types than expected. Readers take its content
through `read_json`, `read_text` or `read_arrays`, and do what could fail on its content inside `reading`. Outputs
are written inside `writing`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xception_jax.errors import BadDataError, InputMissingError, StorageError, UsageError, UserError
from xception_jax.files import expanded, open_regular, write_atomically
from xception_jax.names import one_line

if TYPE_CHECKING:
    import numpy as np

MAX_BYTES = 256 * 2**20
"""The largest text file. The metrics of a run of months take a tenth of it."""

MAX_ARRAY_BYTES = 32 * 2**30
"""The most that the arrays of one .npz file may take, uncompressed."""

MAX_DEPTH = 64
"""The most that objects and lists of a JSON file may be nested. Code that walks them may be recursive."""

# What the user has to look at, and not the disk: the path is wrong, or its permissions.
_NO_INPUT = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ENXIO,
)


@contextlib.contextmanager
def reading(
    what: str,
    path: str | os.PathLike[str],
    fix: str,
    *,
    where: str = "",
    damaged: type[UserError] = BadDataError,
) -> Iterator[None]:
    """Context that reads and converts one file. Keep other work out of it: every exception is blamed on the file.

    Args:
      what: what the file is, such as 'table of groups'.
      path: the file.
      fix: what the user can do.
      where: the flag that names the file, by default its path.
      damaged: class of the error for wrong content.

    Raises:
      InputMissingError: there is no such file, or it may not be read.
      StorageError: reading failed.
      UserError: of the class `damaged`, the content is not what it should be.
    """
    place, shown = where or os.fspath(path), f" {os.fspath(path)}" if where else ""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise InputMissingError(f"there is no {what}{shown}", place, fix) from None
    except OSError as error:
        kind = InputMissingError if error.errno in _NO_INPUT else StorageError
        raise kind(f"the {what}{shown} cannot be read: {error.strerror or error}", place, fix) from None
    except Exception as error:  # any exception: the content is of a stranger
        raise damaged(f"the {what}{shown} cannot be read: {describe(error)}", place, fix) from error


@contextlib.contextmanager
def writing(
    what: str, path: str | os.PathLike[str], fix: str = "free some space, or choose another path"
) -> Iterator[None]:
    """Context that writes one file or directory.

    Args:
      what: what is written, such as 'report'.
      path: the file or directory.
      fix: what the user can do.

    Raises:
      StorageError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"the {what} cannot be written: {error.strerror or error}", os.fspath(path), fix) from None


def describe(error: BaseException) -> str:
    """Returns an exception in one line that a user understands without its traceback."""
    message = one_line(error)[:200]
    if isinstance(error, RecursionError):
        return f"it is nested more than {MAX_DEPTH} levels deep"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    if isinstance(error, MemoryError):
        return "there is not enough memory to read it"
    if isinstance(error, KeyError):
        return f"there is no {message}"
    if isinstance(error, TypeError | AttributeError | IndexError | ArithmeticError):
        return f"a value is not of the expected type ({message})"
    return message or type(error).__name__


def read_bytes(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> bytes:
    """Returns the content of a file.

    Raises:
      OSError: it cannot be read.
      ValueError: it is larger than `limit`.
    """
    with open_regular(path) as file:
        # Reading up to the limit would reserve as much memory. A file that grows meanwhile ends where it did.
        content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content


def read_text(path: str | os.PathLike[str], limit: int = MAX_BYTES) -> str:
    """Returns a text file in UTF-8, without a byte order mark.

    Raises:
      OSError: it cannot be read.
      ValueError: it is larger than `limit`, or not UTF-8.
    """
    return read_bytes(path, limit).decode("utf-8-sig")


def read_json(path: str | os.PathLike[str], kind: type | None = None, limit: int = MAX_BYTES) -> Any:
    """Returns the content of a JSON file.

    Args:
      path: the file.
      kind: what its outermost value must be: dict or list; by default anything.
      limit: most bytes.

    Raises:
      OSError: it cannot be read.
      ValueError: it is too large, not UTF-8, or what `parse_json` refuses.
    """
    return parse_json(read_bytes(path, limit), kind)


def parse_json(text: str | bytes, kind: type | None = None) -> Any:
    """Returns the value of a JSON text.

    Stricter than `json.loads`: integers have 64 bits, there are no NaN and no infinities, no name is twice in an
    object, and there are at most `MAX_DEPTH` levels.

    Raises:
      ValueError: the text is not such JSON, not UTF-8, or its outermost value is not of the given kind.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    if not text.strip():
        raise ValueError("it is empty")
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite, parse_int=_integer
        )
    except RecursionError as error:
        raise ValueError(describe(error)) from None
    _check_depth(value)
    if kind is not None and not isinstance(value, kind):
        raise ValueError(f"it is not {'an object' if kind is dict else 'a list'}, but {_name(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"an object has the name {twice[:100]!r} twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**63:
        raise ValueError(f"the number {text[:40]} is too large")
    return int(text)


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(describe(RecursionError()))
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def read_arrays(
    path: str | os.PathLike[str], names: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, np.ndarray]:
    """Returns arrays of an .npz file. Nothing in it is run, and no array is larger than the file says and holds.

    Args:
      path: the file.
      names: names of the arrays to read.
      optional: names of arrays that may be missing.

    Raises:
      OSError: it cannot be read.
      Exception: of many kinds: it is damaged. Call this inside `reading`.
    """
    import zipfile

    import numpy as np

    optional = set(optional)
    # Open the file here, because NumPy does not close a damaged one.
    with open_regular(path) as file:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            names = [name for name in (*names, *optional) if name in members or name not in optional]
            needed = sum(members[name].file_size for name in names)
            if needed > MAX_ARRAY_BYTES:
                raise ValueError(f"its arrays take {needed:,} bytes, more than {MAX_ARRAY_BYTES:,}")
            for name in names:
                with archive.open(members[name]) as member:
                    _check_size(member, members[name].file_size, name)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}


def _check_size(member: Any, size: int, name: str) -> None:
    """Raises ValueError if an array claims to be larger than its bytes, because NumPy would first allocate it."""
    import numpy as np

    version = np.lib.format.read_magic(member)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = header(member)
    if math.prod(shape) * max(1, dtype.itemsize) > size:  # empty strings have no bytes
        raise ValueError(f"the array {name} of shape {shape} is longer than the file")


def require_outputs(
    outputs: Iterable[str | os.PathLike[str] | None], inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Checks that outputs can be written and replace neither each other nor what is read, to fail before the work.

    Args:
      outputs: paths of files; None for what is not written.
      inputs: files that are read; names of other sources are allowed.

    Raises:
      UsageError: an output is named twice, or is one of the inputs.
      UserError: see `require_directory`.
    """
    read = {_identity(path) for path in inputs}
    named: set[Any] = set()
    for path in outputs:
        if path is None:
            continue
        require_directory(path)
        if (identity := _identity(path)) in named:
            raise UsageError("two outputs have the same name", os.fspath(path), "give each a name of its own")
        named.add(identity)
        if identity in read:
            raise UsageError("the output would overwrite an input", os.fspath(path), "choose another name")


def _identity(path: str | os.PathLike[str]) -> Any:
    """Returns what paths of the same file have in common."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # there is no such file, or no such name
        return os.path.abspath(path)
    return status.st_dev, status.st_ino


def write_output(what: str, path: str | os.PathLike[str], content: str | bytes) -> None:
    """Replaces a file that the user named, atomically. If it is a link, the file that it points to is replaced.

    Args:
      what: what is written, such as 'report'.
      path: the file.
      content: bytes, or text to encode as UTF-8.

    Raises:
      StorageError: the file could not be written. It is unchanged.
    """
    with writing(what, path):
        write_atomically(os.path.realpath(path), content)


def require_directory(path: str | os.PathLike[str]) -> None:
    """Checks that an output can be written, to fail before the work.

    Raises:
      InputMissingError: the directory of the file is missing.
      ConfigError: the path begins with ~, and there is no such home.
      StorageError: there is a directory, a device or a pipe in the place of the file, or it may not be written.
    """
    target = Path(os.path.realpath(expanded(os.fspath(path), "the path of an output")))
    fix = "create the directory, or choose another path"
    with writing("file", target, "choose another path"):
        if not target.parent.is_dir():
            raise InputMissingError(f"there is no directory {target.parent}", os.fspath(path), fix)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "there is a directory in its place")
        if target.exists() and not target.is_file():  # it would be replaced by a file
            raise OSError(errno.EINVAL, "there is a device or a pipe in its place")
        if not os.access(target.parent, os.W_OK):
            raise PermissionError(errno.EACCES, "its directory is not writable")
