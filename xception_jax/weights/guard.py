"""Reads files of unknown origin and refuses everything but plain numbers in a plain container.

HDF5 can refer to other files (external links, external storage, virtual datasets) and declare arrays of any size in a
few bytes. A zip archive can contain paths outside of it. A pickle runs code. Weight files need none of this. All
functions raise `BadDataError` if the content is damaged or refused.

These checks run in a process of their own (see `isolation`), because a damaged HDF5 file can also make libhdf5 hang,
crash, or take any amount of memory.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import IO, Any, BinaryIO

import h5py
import numpy as np

from xception_jax.errors import BadDataError, StorageError
from xception_jax.files import compression_of
from xception_jax.names import in_shell, one_line
from xception_jax.weights.limits import COPY_AGAIN, RAISE, Limits, elements, memory_limit

MAX_DEPTH = 32
MAX_NAME_BYTES = 1024
_STRING_COPIES = 4  # of strings, while HDF5 and h5py read them
# Compressed data may grow by this factor. Below the second number, even a file of zeros is harmless.
MAX_COMPRESSION, SMALL = 200, 1 << 20
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}
# How h5py stores bfloat16. HDF5 has its own type for every other two-byte number that Keras computes with.
TWO_BYTES = np.dtype("V2")
READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, OverflowError, IndexError)
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, *READ_ERRORS)
# Where PyTorch projects keep the weights in a checkpoint that holds more.
_CONVERT = (
    "import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "d = next((d[k] for k in ('state_dict', 'model_state_dict', 'model', 'net') if k in d), d); "
    "s.save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, 'weights.safetensors')"
)

_SAVE_IN_KERAS = "if you trust the file: load it in Keras and save it again with model.save_weights('x.weights.h5')"
_PART = re.compile(r"-\d+-of-(\d+)\.safetensors$")
_MERGE = (
    "import glob, sys, safetensors.torch as s; "
    "parts = map(s.load_file, glob.glob(sys.argv[1] + '/*-of-*.safetensors')); "
    "s.save_file({k: v for part in parts for k, v in part.items()}, 'weights.safetensors')"
)


def _merge(where: str) -> str:
    return f"join them: python -c {in_shell(_MERGE)} {in_shell(os.path.dirname(where) or '.')}"


def container_format(file: BinaryIO, where: str) -> str:
    """Returns 'hdf5', 'zip' or 'safetensors', from the first bytes of the file. Pickles are refused by name."""
    file.seek(0)
    start, size = file.read(16), os.fstat(file.fileno()).st_size
    if _starts_hdf5(file, size):
        return "hdf5"
    # Tested before pickle: the length of a safetensors header can begin with the first byte of a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size:
        if (part := _PART.search(where)) and int(part[1]) > 1:
            raise BadDataError(f"the file is one of {int(part[1])} parts of the weights", where, _merge(where))
        return "safetensors"
    if where.endswith(".safetensors.index.json"):
        raise BadDataError("the file is the list of the parts of the weights", where, _merge(where))
    is_zip = start[:4] == b"PK\x03\x04"
    if start[:1] == b"\x80" or (is_zip and _holds_pickle(file)):
        fix = f"if you trust it: python -c {in_shell(_CONVERT)} {in_shell(where)}"
        raise BadDataError("the file is a pickle; loading it may run any code", where, fix)
    if is_zip:
        return "zip"
    if compression := compression_of(start):
        raise BadDataError(f"the file is compressed by {compression}", where, "unpack it first")
    if start.startswith(b"version https://"):
        what = "the file is a Git LFS pointer, not the weights themselves"
        raise BadDataError(what, where, "run `git lfs pull` where it comes from, or download the file itself")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise BadDataError("the file is a web page", where, "download the file itself, not the page that shows it")
    if not size:
        raise BadDataError("the file is empty", where, COPY_AGAIN)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= 100 << 20:
        raise BadDataError("the file ends within the header of safetensors", where, COPY_AGAIN)
    what = "the file is neither safetensors nor a Keras file (HDF5, .keras), or its first bytes are damaged"
    fix = "load a SavedModel or checkpoint in Keras, then model.save_weights('x.weights.h5')"
    raise BadDataError(what, where, fix)


def _starts_hdf5(file: BinaryIO, size: int) -> bool:
    """Returns whether the signature of HDF5 is at 0, or at 512, 1024, 2048, ..., as the format allows."""
    places = itertools.takewhile(lambda place: place < size, (0, *(512 << i for i in range(54))))
    return any(file.seek(place) == place and file.read(8) == b"\x89HDF\r\n\x1a\n" for place in places)


def path_of(file: IO[bytes], where: str) -> str | None:
    """Returns a path of an open file, or None if it has none; `where` may be the name of another file by now."""
    for path in (f"/dev/fd/{file.fileno()}", where):
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return path
    return None


def _holds_pickle(file: BinaryIO) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith((".pkl", ".pickle")) for name in archive.namelist())
    except _ZIP_ERRORS:
        return False


def damaged(where: str, error: BaseException) -> BadDataError:
    """Returns the error for a file of the right format that cannot be read."""
    reason = one_line(error)[:500] or type(error).__name__
    return BadDataError(f"the weight file is damaged: {reason}", where, COPY_AGAIN)


def is_memory_error(message: str) -> bool:
    """Returns whether libhdf5 had too little memory. It has no error of its own for this."""
    return re.search("memory allocation|allocate memory", message) is not None


def refused(where: str, what: str, fix: str = _SAVE_IN_KERAS) -> BadDataError:
    """Returns the error for content that weight files never need, such as links or pickles."""
    return BadDataError(f"the weight file is refused: {what}", where, fix)


def over_limit(where: str, what: str) -> BadDataError:
    """Returns the error for a file that exceeds one of `Limits`."""
    return BadDataError(f"the weight file is refused: {what}", where, RAISE)


class Hdf5Guard:
    """Follows only hard links in an HDF5 file and returns only plain numeric datasets of plausible size."""

    def __init__(self, file: h5py.File, where: str, file_bytes: int, limits: Limits):
        self.file, self.where, self._file_bytes, self._limits = file, where, file_bytes, limits
        self._objects = self._declared_bytes = self._text_bytes = 0

    def child(self, group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
        """Returns an object by its path below a group."""
        found = group
        for part in filter(None, name.split("/")):
            self._count_text(len(part.encode()), MAX_NAME_BYTES, "a name")
            link = found.get(part, getlink=True) if isinstance(found, h5py.Group) else None
            if link is None:
                raise BadDataError(f"{group.name}/{name} is missing", self.where, COPY_AGAIN)
            if not isinstance(link, h5py.HardLink):
                raise self._refused(f"{found.name}/{part} is a link to another place ({type(link).__name__})")
            found = found[part]
            self._objects += 1
            self._require_objects(self._objects)
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
        self._require_objects(len(group))
        children = {name: self.child(group, name) for name in group}
        yield path, group, {name: child for name, child in children.items() if isinstance(child, h5py.Dataset)}
        for name, child in children.items():
            inner = f"{path}/{name}".replace("\\", "/").strip("/")  # TensorFlow on Windows wrote backslashes
            if isinstance(child, h5py.Group) and not skip(inner):
                yield from self.walk(child, skip, inner, depth + 1)

    def texts(self, group: h5py.Group, name: str) -> list[str] | None:
        """Returns an attribute that holds strings, or None. Keras splits long ones into name0, name1, ..."""
        pieces = itertools.takewhile(group.attrs.__contains__, (f"{name}{i}" for i in range(self._limits.objects)))
        names = [name] if name in group.attrs else list(pieces)
        return [text for each in names for text in self._texts(group, each)] if names else None

    def label(self, found: h5py.Group | h5py.Dataset, name: str) -> str:
        """Returns an attribute that is a single short string, or '' if there is none."""
        if name not in found.attrs or found.attrs.get_id(name).shape != ():
            return ""
        if found.attrs.get_id(name).dtype.kind not in "SO":
            return ""
        [text] = self._texts(found, name, MAX_NAME_BYTES)
        return text

    def _texts(self, found: h5py.Group | h5py.Dataset, name: str, longest: int | None = None) -> list[str]:
        """Reads an attribute of strings, and counts what they expand to.

        Strings of fixed length state it. Those of variable length refer to places in the file, and all can refer to the
        same long one. HDF5 tells their length only by reading them, so they are read under a limit of memory.
        """
        attribute = found.attrs.get_id(name)
        if attribute.shape is None:
            return []
        count = math.prod(attribute.shape)
        self._require_objects(count)
        string = h5py.check_string_dtype(attribute.dtype)
        if string is None and count:  # Keras writes an empty list as an array of floats
            raise self._refused(f"the attribute {name} does not hold text")
        if not count or string is None:
            return []
        longest = longest or self._limits.text
        if string.length is not None:
            self._count_text(count * string.length, count * longest, f"the attribute {name}")
        try:
            with memory_limit(_STRING_COPIES * self._limits.text):
                values = np.atleast_1d(found.attrs[name]).ravel().tolist()
        except (MemoryError, *READ_ERRORS) as error:
            if isinstance(error, MemoryError) or is_memory_error(str(error)):
                limit = self._limits.text
                raise self._over(f"the strings in the attribute {name} take more than {limit:,} bytes") from None
            raise
        texts = [value.decode() if isinstance(value, bytes) else value for value in values]
        if not all(isinstance(text, str) for text in texts):
            raise self._refused(f"the attribute {name} does not hold text")
        if string.length is None:
            self._count_text(sum(len(text.encode()) for text in texts), count * longest, f"the attribute {name}")
        return texts

    def _count_text(self, size: int, longest: int, what: str) -> None:
        self._text_bytes += size
        if size > longest:
            raise self._over(f"{what} takes {size:,} bytes")
        if self._text_bytes > self._limits.text:
            raise self._over(f"its names and texts take more than {self._limits.text:,} bytes")

    def _require_objects(self, count: int) -> None:
        if count > self._limits.objects:
            raise self._over(f"it holds more than {self._limits.objects:,} objects")

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
        stored, declared = dataset.id.get_storage_size(), elements(dataset.shape) * dataset.dtype.itemsize
        self._declared_bytes += declared
        limit = min(max(SMALL, MAX_COMPRESSION * stored), self._limits.tensor) if stored else 0
        if dataset.size == 0:
            limit = SMALL
        total = min(max(SMALL, MAX_COMPRESSION * self._file_bytes), self._limits.tensors)
        if declared > limit or self._declared_bytes > total:
            raise self._refused(f"{dataset.name} declares {declared:,} bytes and stores {stored:,}")

    def _refused(self, what: str) -> BadDataError:
        return refused(self.where, what)

    def _over(self, what: str) -> BadDataError:
        return over_limit(self.where, what)


class _WholeReads(io.BufferedReader):
    """An open file for h5py, which ignores how many bytes were read.

    libhdf5 can open a file by name only, and the file may have no name any more.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(io.FileIO(file.fileno(), closefd=False))

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer.

        Raises:
          OSError: the file ends before.
        """
        size = super().readinto(buffer)
        if size < memoryview(buffer).nbytes:
            raise OSError("the file is truncated")
        return size


@contextlib.contextmanager
def open_hdf5(file: IO[bytes], where: str, limits: Limits) -> Iterator[Hdf5Guard]:
    """Opens an HDF5 file. Errors of h5py inside the context become `BadDataError`."""
    try:
        with h5py.File(_WholeReads(file), "r") as hdf5:
            yield Hdf5Guard(hdf5, where, os.fstat(file.fileno()).st_size, limits)
    except READ_ERRORS as error:
        raise damaged(where, error) from None


@contextlib.contextmanager
def open_archive(file: BinaryIO, where: str, limits: Limits) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive if no member is a link, is repeated, or has a name that is absolute or contains '..'."""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                parts = PurePosixPath(member.filename.replace("\\", "/")).parts
                outside = ".." in parts or "/" in parts or bool(PureWindowsPath(member.filename).drive)
                if outside or stat.S_ISLNK(member.external_attr >> 16):
                    raise refused(where, f"its member {member.filename!r} points outside of the archive")
            names = archive.namelist()
            if len(names) != len(set(names)) or len(names) > limits.objects:
                raise refused(where, "it holds too many members, or one twice")
            yield archive
    except _ZIP_ERRORS as error:
        raise damaged(where, error) from None


def _open_member(archive: zipfile.ZipFile, name: str, limit: int, where: str) -> IO[bytes]:
    if name not in archive.namelist():
        what = f"the archive has no {name}: it is not a .keras file"
        raise BadDataError(what, where, "give an archive that model.save('x.keras') wrote")
    member = archive.getinfo(name)
    allowed = min(limit, max(SMALL, MAX_COMPRESSION * member.compress_size))
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.file_size > allowed:
        raise refused(where, f"{name} declares {member.file_size:,} bytes and stores {member.compress_size:,}")
    return archive.open(member)


def read_member(archive: zipfile.ZipFile, name: str, where: str, limits: Limits) -> bytes:
    """Returns a small member of an archive; zipfile verifies its checksum."""
    with _open_member(archive, name, limits.text, where) as file:
        return file.read()


@contextlib.contextmanager
def extracted(archive: zipfile.ZipFile, name: str, where: str, limits: Limits) -> Iterator[IO[bytes]]:
    """Copies a large member to a temporary file without a name; zipfile verifies its checksum at the end."""
    with tempfile.TemporaryFile() as target:
        with _open_member(archive, name, limits.tensors, where) as source:
            try:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
            except OSError as error:
                fix = "free some space, or set TMPDIR to a directory that has room"
                raise StorageError(f"{name} cannot be unpacked: {error}", tempfile.gettempdir(), fix) from None
        yield target
