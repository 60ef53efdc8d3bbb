"""Reading files of unknown origin: what is not plain numbers in a plain container is refused before it is read.

HDF5 can name other files (external links, external storage, virtual datasets) and declare arrays of any size in a few
bytes; a zip archive can name paths outside; a pickle runs code. None of it occurs in weight files.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

import h5py
import numpy as np
import safetensors

from xception_jax.errors import BadDataError, InputMissingError, StorageError

COPY_AGAIN = "copy or download the file again"
_NOT_MADE_BY_KERAS = "if you trust the file: load it in Keras and write it anew with model.save_weights('x.weights.h5')"

MAX_OBJECTS = 20_000  # groups and datasets; Inception V3 has 1,100
MAX_DEPTH = 32
MAX_TENSOR_BYTES = 2 << 30
MAX_TEXT_BYTES = 64 << 20  # of one attribute or JSON file; the config of Inception V3 takes 150 kB
# Compressed data may grow by this factor, beyond a small size at which even zeros are harmless.
MAX_COMPRESSION, SMALL = 200, 1 << 20
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
# How h5py stores bfloat16. No other number of two bytes that Keras computes with lacks a type of its own in HDF5.
TWO_BYTES = np.dtype("V2")
_READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError)


def require_file(path: Path) -> None:
    """Raises InputMissingError if there is no such file."""
    if not path.is_file():
        what = "a directory is not a weight file" if path.is_dir() else "there is no such weight file"
        raise InputMissingError(what, str(path), "give the path of a .safetensors, .keras or .h5 file")


def hashes(path: Path) -> tuple[str, str]:
    """Returns SHA-256 and MD5 of a file. MD5 is no protection: it names files that are published with it.

    Raises:
      InputMissingError: there is no such file.
      StorageError: it cannot be read.
    """
    require_file(path)
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha256.update(block)
                md5.update(block)
    except OSError as error:
        raise StorageError(f"the weight file cannot be read: {error}", str(path), "see its permissions") from None
    return sha256.hexdigest(), md5.hexdigest()


def container_format(path: Path) -> str:
    """Returns 'hdf5', 'zip' or 'safetensors', by what the file begins with.

    Raises:
      BadDataError: it is something else. A pickle is named as such.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if h5py.is_hdf5(path):
        return "hdf5"
    # Before the pickle, whose first byte may be that of a length too.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if start[:1] == b"\x80" or (start[:4] == b"PK\x03\x04" and _holds_pickle(path)):
        raise BadDataError(
            "the file is a pickle, which may run any code when it is read",
            str(path),
            'where you trust it: python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for '
            f"k, v in torch.load('{path.name}', weights_only=True).items()}}, 'weights.safetensors')\"",
        )
    if start[:4] == b"PK\x03\x04":
        return "zip"
    what = "the file is neither safetensors nor a Keras file (HDF5, .keras), or its beginning is damaged"
    raise BadDataError(
        what, str(path), "a SavedModel or checkpoint: load it in Keras, model.save_weights('x.weights.h5')"
    )


def _holds_pickle(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith((".pkl", ".pickle")) for name in archive.namelist())
    except (zipfile.BadZipFile, *_READ_ERRORS):
        return False


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and the metadata. The library checks the header: its size, the shapes, that none overlap.

    Raises:
      BadDataError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="numpy", backend="pread") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, *_READ_ERRORS) as error:
        raise damaged(path, error) from None


def damaged(path: Path | str, error: BaseException) -> BadDataError:
    """Returns the error for a file of the right kind that cannot be read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return BadDataError(f"the weight file is damaged: {reason}", str(path), COPY_AGAIN)


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Opens an HDF5 file; whatever h5py raises inside on damaged content becomes a `BadDataError`."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except _READ_ERRORS as error:
        raise damaged(path, error) from None


class Hdf5Guard:
    """Walks an HDF5 file by hard links only, and hands out only plain numeric datasets of plausible size.

    Args:
      path: of the file.
      shown: what messages call it.
    """

    def __init__(self, path: Path, shown: Path):
        self.path = shown
        self._objects = 0
        self._declared = 0
        self._file_bytes = path.stat().st_size

    def child(self, group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
        """Returns one object by its path below a group.

        Raises:
          BadDataError: it is missing, reached by a soft or external link, or no plain numbers.
        """
        found = group
        for part in filter(None, name.split("/")):
            link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
            if link is None:
                raise BadDataError(f"{group.name}/{name} is missing", str(self.path), COPY_AGAIN)
            if not isinstance(link, h5py.HardLink):
                self._refuse(f"{found.name}/{part} is a link to another place ({type(link).__name__})")
            found = found[part]
            self._objects += 1
            if self._objects > MAX_OBJECTS:
                self._refuse(f"there are more than {MAX_OBJECTS:,} objects in it")
        if isinstance(found, h5py.Dataset):
            self._check(found)
        elif not isinstance(found, h5py.Group):
            self._refuse(f"{group.name}/{name} is neither a group nor an array")
        return found

    def children(self, group: h5py.Group, depth: int) -> dict[str, h5py.Group | h5py.Dataset]:
        """Returns the objects directly in a group by name; `depth` is how many groups it stands in.

        Raises:
          BadDataError: as `child`; or groups stand in each other too deep, as in a circle of hard links.
        """
        if depth > MAX_DEPTH:
            self._refuse(f"its groups are more than {MAX_DEPTH} deep")
        return {name: self.child(group, name) for name in group}

    def texts(self, group: h5py.Group, name: str) -> list[str] | None:
        """Returns an attribute that holds strings; Keras cuts long ones into name0, name1, ...; None if not there."""
        if name in group.attrs:
            return self._texts(group, name)
        if f"{name}0" not in group.attrs:
            return None
        parts: list[str] = []
        for i in range(MAX_OBJECTS):
            if f"{name}{i}" not in group.attrs:
                break
            parts += self._texts(group, f"{name}{i}")
        return parts

    def _texts(self, group: h5py.Group, name: str) -> list[str]:
        attribute = group.attrs.get_id(name)
        count = math.prod(attribute.shape)
        if count > MAX_OBJECTS or count * attribute.dtype.itemsize > MAX_TEXT_BYTES:
            self._refuse(f"the attribute {name} is too long")
        if attribute.dtype.kind not in "SUO" and count:  # Keras writes an empty list as an array of floats
            self._refuse(f"the attribute {name} does not hold text")
        values = np.atleast_1d(group.attrs[name]).ravel()
        texts = [value.decode() if isinstance(value, bytes) else value for value in values.tolist()]
        if not all(isinstance(text, str) for text in texts):
            self._refuse(f"the attribute {name} does not hold text")
        return texts

    def _check(self, dataset: h5py.Dataset) -> None:
        if (dataset.dtype.kind not in "fiub" and dataset.dtype != TWO_BYTES) or dataset.dtype.hasobject:
            self._refuse(f"{dataset.name} holds no numbers but {dataset.dtype}")
        if dataset.is_virtual or dataset.external:
            self._refuse(f"the values of {dataset.name} are in another file")
        creation = dataset.id.get_create_plist()
        if {creation.get_filter(i)[0] for i in range(creation.get_nfilters())} - _FILTERS:
            self._refuse(f"{dataset.name} is compressed in a way that Keras does not use")
        if dataset.shape is None:
            self._refuse(f"{dataset.name} has no shape")
        stored, declared = dataset.id.get_storage_size(), int(dataset.nbytes)
        self._declared += declared
        limit = max(SMALL, MAX_COMPRESSION * stored)
        if declared > min(limit, MAX_TENSOR_BYTES) or self._declared > max(SMALL, MAX_COMPRESSION * self._file_bytes):
            self._refuse(f"{dataset.name} declares {declared:,} bytes, and {stored:,} are stored")
        if declared and not stored:
            self._refuse(f"{dataset.name} declares {declared:,} bytes, and none are stored")

    def _refuse(self, what: str) -> None:
        raise BadDataError(f"the weight file is refused: {what}", str(self.path), _NOT_MADE_BY_KERAS)


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive after looking at all its names; nothing of it is unpacked to where a name points.

    Raises:
      BadDataError: it is damaged, or a name is absolute, has '..' or is a link.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [member.filename for member in archive.infolist()]
            for member in archive.infolist():
                parts = PurePosixPath(member.filename.replace("\\", "/")).parts
                outside = ".." in parts or "/" in parts or bool(PureWindowsPath(member.filename).drive)
                if outside or stat.S_ISLNK(member.external_attr >> 16):
                    what = f"the archive is refused: its member {member.filename!r} points outside of it"
                    raise BadDataError(what, str(path), _NOT_MADE_BY_KERAS)
            if len(names) != len(set(names)) or len(names) > MAX_OBJECTS:
                raise BadDataError("the archive is refused: it holds a name twice", str(path), _NOT_MADE_BY_KERAS)
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, *_READ_ERRORS) as error:
        raise damaged(path, error) from None


def _open_member(archive: zipfile.ZipFile, name: str, limit: int) -> IO[bytes]:
    try:
        member = archive.getinfo(name)
    except KeyError:
        what = f"the archive has no {name}: it is no .keras file"
        raise BadDataError(what, str(archive.filename), "give an archive that model.save('x.keras') wrote") from None
    allowed = min(limit, max(SMALL, MAX_COMPRESSION * member.compress_size))
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.file_size > allowed:
        what = f"the archive is refused: {name} declares {member.file_size:,} bytes in {member.compress_size:,}"
        raise BadDataError(what, str(archive.filename), _NOT_MADE_BY_KERAS)
    return archive.open(member)


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns a small member of an archive; its checksum is verified.

    Raises:
      BadDataError: it is missing, damaged or too large.
    """
    with _open_member(archive, name, MAX_TEXT_BYTES) as file:
        return file.read()


@contextlib.contextmanager
def extracted(archive: zipfile.ZipFile, name: str) -> Iterator[Path]:
    """Copies a large member to a temporary file, block by block; its checksum is verified at the end.

    Raises:
      BadDataError: it is missing, damaged or too large.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.weights.h5"
        with _open_member(archive, name, 2 * MAX_TENSOR_BYTES) as source, path.open("wb") as target:
            while block := source.read(1 << 20):
                try:
                    target.write(block)
                except OSError as error:
                    fix = "free some space, or set TMPDIR to a directory that has room"
                    raise StorageError(f"{name} cannot be unpacked: {error}", directory, fix) from None
        yield path
