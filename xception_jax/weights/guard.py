"""Reads files of unknown origin and refuses everything but plain numbers in a plain container.

HDF5 can refer to other files (external links, external storage, virtual datasets) and declare arrays of any size in a
few bytes. A zip archive can contain paths outside of it. A pickle runs code. Weight files need none of this. All
functions raise `BadDataError` if the content is damaged or refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import h5py
import numpy as np
import safetensors

from xception_jax.errors import BadDataError, InputMissingError, StorageError
from xception_jax.names import in_shell

COPY_AGAIN = "copy or download the file again"

MAX_OBJECTS = 20_000  # groups and datasets; Inception V3 has 1,100
MAX_DEPTH = 32
MAX_TENSOR_BYTES = 2 << 30
MAX_TEXT_BYTES = 64 << 20  # of one attribute or JSON file; the config of Inception V3 takes 150 kB
# Compressed data may grow by this factor. Below the second number, even a file of zeros is harmless.
MAX_COMPRESSION, SMALL = 200, 1 << 20
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
# How h5py stores bfloat16. HDF5 has its own type for every other two-byte number that Keras computes with.
TWO_BYTES = np.dtype("V2")
_READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, *_READ_ERRORS)


def require_file(path: Path) -> None:
    """Raises InputMissingError if there is no such file."""
    if not path.is_file():
        what = "a directory is not a weight file" if path.is_dir() else "there is no such weight file"
        raise InputMissingError(what, str(path), "give the path of a .safetensors, .keras or .h5 file")


def hashes(path: Path) -> tuple[str, str]:
    """Returns SHA-256 and MD5 of a file. MD5 only identifies published files; it does not protect from forgery.

    Raises:
      InputMissingError: there is no such file.
      StorageError: it cannot be read.
    """
    require_file(path)
    digests = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                for digest in digests:
                    digest.update(block)
    except OSError as error:
        raise StorageError(f"the weight file cannot be read: {error}", str(path), "check its permissions") from None
    return digests[0].hexdigest(), digests[1].hexdigest()


_CONVERT_PICKLE = in_shell(
    "import sys, torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in "
    'torch.load(sys.argv[1], weights_only=True).items()}, "weights.safetensors")'
)


def container_format(path: Path) -> str:
    """Returns 'hdf5', 'zip' or 'safetensors', from the first bytes of the file. Pickles are refused by name."""
    with path.open("rb") as file:
        start = file.read(16)
    if h5py.is_hdf5(path):
        return "hdf5"
    # Tested before pickle: the length of a safetensors header can begin with the first byte of a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return "safetensors"
    is_zip = start[:4] == b"PK\x03\x04"
    if start[:1] == b"\x80" or (is_zip and _holds_pickle(path)):
        raise BadDataError(
            "the file is a pickle; loading it may run any code",
            str(path),
            f"if you trust it: python -c {_CONVERT_PICKLE} {in_shell(path)}",
        )
    if is_zip:
        return "zip"
    what = "the file is neither safetensors nor a Keras file (HDF5, .keras), or its first bytes are damaged"
    fix = "load a SavedModel or checkpoint in Keras, then model.save_weights('x.weights.h5')"
    raise BadDataError(what, str(path), fix)


def _holds_pickle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith((".pkl", ".pickle")) for name in archive.namelist())
    except _ZIP_ERRORS:
        return False


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and the metadata. The library checks the header: size, shapes, overlaps."""
    try:
        with safetensors.safe_open(path, framework="numpy", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, *_READ_ERRORS) as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: BaseException) -> BadDataError:
    """Returns the error for a file of the right format that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return BadDataError(f"the weight file is damaged: {reason}", str(path), COPY_AGAIN)


def _refused(path: Path | str | None, what: str) -> BadDataError:
    fix = "if you trust the file: load it in Keras and save it again with model.save_weights('x.weights.h5')"
    return BadDataError(f"the weight file is refused: {what}", str(path), fix)


class Hdf5Guard:
    """Follows only hard links in an HDF5 file and returns only plain numeric datasets of plausible size."""

    def __init__(self, file: h5py.File, shown: Path, file_bytes: int):
        self.file, self._shown, self._file_bytes = file, shown, file_bytes
        self._objects = self._declared_bytes = 0

    def child(self, group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
        """Returns an object by its path below a group."""
        found = group
        for part in filter(None, name.split("/")):
            link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
            if link is None:
                raise BadDataError(f"{group.name}/{name} is missing", str(self._shown), COPY_AGAIN)
            if not isinstance(link, h5py.HardLink):
                raise self._refused(f"{found.name}/{part} is a link to another place ({type(link).__name__})")
            found = found[part]
            self._objects += 1
            if self._objects > MAX_OBJECTS:
                raise self._refused(f"it holds more than {MAX_OBJECTS:,} objects")
        if isinstance(found, h5py.Dataset):
            self._check(found)
        elif not isinstance(found, h5py.Group):
            raise self._refused(f"{group.name}/{name} is neither a group nor an array")
        return found

    def walk(
        self, group: h5py.Group, skip: Callable[[str], bool], path: str = "", depth: int = 0
    ) -> Iterator[tuple[str, h5py.Group, dict[str, h5py.Dataset]]]:
        """Yields the path, the group and its arrays by name, for a group and for all below it but those to skip."""
        if depth > MAX_DEPTH:  # hard links can form a circle
            raise self._refused(f"its groups are more than {MAX_DEPTH} deep")
        children = {name: self.child(group, name) for name in group}
        yield path, group, {name: child for name, child in children.items() if isinstance(child, h5py.Dataset)}
        for name, child in children.items():
            inner = f"{path}/{name}".replace("\\", "/").strip("/")  # TensorFlow on Windows wrote backslashes
            if isinstance(child, h5py.Group) and not skip(inner):
                yield from self.walk(child, skip, inner, depth + 1)

    def texts(self, group: h5py.Group, name: str) -> list[str] | None:
        """Returns an attribute that holds strings, or None. Keras splits long ones into name0, name1, ..."""
        pieces = itertools.takewhile(group.attrs.__contains__, (f"{name}{i}" for i in range(MAX_OBJECTS)))
        names = [name] if name in group.attrs else list(pieces)
        return [text for each in names for text in self._texts(group, each)] if names else None

    def _texts(self, group: h5py.Group, name: str) -> list[str]:
        attribute = group.attrs.get_id(name)
        count = math.prod(attribute.shape)
        if count > MAX_OBJECTS or count * attribute.dtype.itemsize > MAX_TEXT_BYTES:
            raise self._refused(f"the attribute {name} is too long")
        if attribute.dtype.kind not in "SUO" and count:  # Keras writes an empty list as an array of floats
            raise self._refused(f"the attribute {name} does not hold text")
        values = np.atleast_1d(group.attrs[name]).ravel().tolist()
        texts = [value.decode() if isinstance(value, bytes) else value for value in values]
        if not all(isinstance(text, str) for text in texts):
            raise self._refused(f"the attribute {name} does not hold text")
        return texts

    def _check(self, dataset: h5py.Dataset) -> None:
        if (dataset.dtype.kind not in "fiub" and dataset.dtype != TWO_BYTES) or dataset.dtype.hasobject:
            raise self._refused(f"{dataset.name} holds no numbers: its type is {dataset.dtype}")
        if dataset.is_virtual or dataset.external:
            raise self._refused(f"the values of {dataset.name} are in another file")
        creation = dataset.id.get_create_plist()
        if {creation.get_filter(i)[0] for i in range(creation.get_nfilters())} - _FILTERS:
            raise self._refused(f"{dataset.name} uses a compression that Keras does not use")
        if dataset.shape is None:
            raise self._refused(f"{dataset.name} has no shape")
        stored, declared = dataset.id.get_storage_size(), int(dataset.nbytes)
        self._declared_bytes += declared
        limit = min(max(SMALL, MAX_COMPRESSION * stored), MAX_TENSOR_BYTES) if stored else 0
        if declared > limit or self._declared_bytes > max(SMALL, MAX_COMPRESSION * self._file_bytes):
            raise self._refused(f"{dataset.name} declares {declared:,} bytes and stores {stored:,}")

    def _refused(self, what: str) -> BadDataError:
        return _refused(self._shown, what)


@contextlib.contextmanager
def open_hdf5(path: Path, shown: Path | None = None) -> Iterator[Hdf5Guard]:
    """Opens an HDF5 file; messages call it `shown`. Errors of h5py inside of the context become `BadDataError`."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield Hdf5Guard(file, shown or path, path.stat().st_size)
    except _READ_ERRORS as error:
        raise damaged(shown or path, error) from None


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive if no member is a link, is repeated, or has a name that is absolute or contains '..'."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                parts = PurePosixPath(member.filename.replace("\\", "/")).parts
                outside = ".." in parts or "/" in parts or bool(PureWindowsPath(member.filename).drive)
                if outside or stat.S_ISLNK(member.external_attr >> 16):
                    raise _refused(path, f"its member {member.filename!r} points outside of the archive")
            names = archive.namelist()
            if len(names) != len(set(names)) or len(names) > MAX_OBJECTS:
                raise _refused(path, "it holds too many members, or one twice")
            yield archive
    except _ZIP_ERRORS as error:
        raise damaged(path, error) from None


def _open_member(archive: zipfile.ZipFile, name: str, limit: int) -> IO[bytes]:
    if name not in archive.namelist():
        what = f"the archive has no {name}: it is not a .keras file"
        raise BadDataError(what, str(archive.filename), "give an archive that model.save('x.keras') wrote")
    member = archive.getinfo(name)
    allowed = min(limit, max(SMALL, MAX_COMPRESSION * member.compress_size))
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.file_size > allowed:
        what = f"{name} declares {member.file_size:,} bytes and stores {member.compress_size:,}"
        raise _refused(archive.filename, what)
    return archive.open(member)


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns a small member of an archive; zipfile verifies its checksum."""
    with _open_member(archive, name, MAX_TEXT_BYTES) as file:
        return file.read()


@contextlib.contextmanager
def extracted(archive: zipfile.ZipFile, name: str) -> Iterator[Path]:
    """Copies a large member to a temporary file; zipfile verifies its checksum at the end."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.weights.h5"
        with _open_member(archive, name, 2 * MAX_TENSOR_BYTES) as source, path.open("wb") as target:
            try:
                shutil.copyfileobj(source, target, 1 << 20)
            except OSError as error:
                fix = "free some space, or set TMPDIR to a directory that has room"
                raise StorageError(f"{name} cannot be unpacked: {error}", directory, fix) from None
        yield path
