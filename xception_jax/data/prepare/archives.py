"""Reads tar archives that may come from an untrusted source, as streams and without unpacking them.

Limits keep every archive from taking more time or memory than its size explains: for the number of members, the length
of names and of headers, the size of a member, and the ratio of compression.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

from xception_jax.data.images import MAX_FILE_BYTES
from xception_jax.errors import BadDataError, InputMissingError, StorageError
from xception_jax.files import compression_of

MAX_MEMBERS = 200_000
"""Limit for the members of one archive; the largest, that of the validation images, has 50,000."""

MAX_RATIO = 64
"""Limit for the bytes in a compressed archive, by its size. Images hardly get smaller."""

_MAX_NAME = 255
_MAX_HEADER = 8192  # bytes of a name or of attributes that stand in a header of their own
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_VOLUME_LABEL = b"V"  # of GNU tar
_IGNORED = (".DS_Store", "Thumbs.db")
_IMAGE_SUFFIXES = (".jpeg", ".jpg")


def unexpected(archive: str, member: str, expected: str) -> BadDataError:
    """Returns the error for a member that does not belong in an archive."""
    shown = member if len(member) <= _MAX_NAME else f"{member[:_MAX_NAME]}..."
    fix = f"it should contain {expected}; download the archive as distributed"
    return BadDataError(f"the archive contains {shown!a}", archive, fix)


@dataclasses.dataclass(frozen=True)
class Member:
    """A regular file in an archive and the name of its folder. Read `file` before the next member is requested."""

    archive: str
    folder: str
    name: str
    size: int
    file: IO[bytes]

    def read(self) -> bytes:
        """Returns the content.

        Raises:
          BadDataError: the name is not that of an image, or the archive ends within the member.
        """
        if not self.name.lower().endswith(_IMAGE_SUFFIXES):
            raise unexpected(self.archive, self.name, "images with names that end in .JPEG")
        if self.size > MAX_FILE_BYTES:
            raise unexpected(self.archive, self.name, f"images of at most {MAX_FILE_BYTES:,} bytes")
        with _damage_named(self.archive, self.name):
            data = self.file.read()
            if len(data) != self.size:
                raise tarfile.ReadError(f"it ends after {len(data):,} of {self.size:,} bytes")
        return data


class _StrictTarInfo(tarfile.TarInfo):
    """Raises an error for a damaged header or a missing end mark, which TarFile takes for the end of the archive.

    It also refuses long headers, which TarFile would read into memory and search with slow expressions.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Reads the fields of a header."""
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENSIONS and not 0 <= info.size <= _MAX_HEADER:
            raise tarfile.ReadError(f"a header has {info.size:,} bytes")
        return info

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Reads the next header."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def members(
    archive: str, *, path: Path | None = None, stream: IO[bytes] | None = None, size: int = 0
) -> Iterator[Member]:
    """Reads an archive as a stream, compressed by gzip or not, and yields its regular files.

    Nothing is written to the path of a member: only its last two parts are used, as names. Directories and the files
    that file managers add are skipped.

    Args:
      archive: name of the archive for error messages.
      path: the archive, or
      stream: its content, and
      size: the bytes in it.

    Raises:
      BadDataError: the archive is damaged, contains a link or a device, expands to more than `MAX_RATIO` times its
        size, or has more than `MAX_MEMBERS` members.
    """
    with contextlib.ExitStack() as stack:
        with _damage_named(archive, "its beginning"):
            if path is not None:
                stream, size = stack.enter_context(open(path, "rb")), path.stat().st_size
            assert isinstance(stream, io.BufferedReader)
            compression = compression_of(stream.peek(8)[:8])
            if compression not in ("", "gzip"):
                fix = "unpack it, and put the .tar in its place"
                raise BadDataError(f"the archive is compressed by {compression}", archive, fix)
            packed = compression == "gzip"
            # Not the mode "r|gz", which ends after the first member of the gzip file and ignores its checksum.
            content: Any = stack.enter_context(gzip.GzipFile(fileobj=stream)) if packed else stream
            mode: Any = "r|"  # unknown to typeshed
            tar = stack.enter_context(tarfile.open(mode=mode, fileobj=content, tarinfo=_StrictTarInfo))
        last, most = "its beginning", size * MAX_RATIO if packed else size
        for _ in range(MAX_MEMBERS):
            with _damage_named(archive, f"the member after {last}"):
                member = tar.next()
                if member is None:
                    _refuse_more(tar.fileobj, most)
                    return
                # To skip a member, TarFile would go on reading behind the end of the file.
                if not 0 <= member.size <= most - member.offset_data:
                    raise tarfile.ReadError(f"{member.name!a} has {member.size:,} bytes, more than the archive")
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            last = ascii(member.name[:_MAX_NAME])[1:-1]
            name = PurePosixPath(member.name).name
            if member.isdir() or name.startswith("._") or name in _IGNORED or member.type == _VOLUME_LABEL:
                continue
            if not member.isreg() or member.issparse():
                raise unexpected(archive, member.name, "whole files, neither links nor devices")
            folder = PurePosixPath(member.name).parent.name
            if max(len(name), len(folder)) > _MAX_NAME or not (name.isprintable() and folder.isprintable()):
                raise unexpected(archive, member.name, f"files with printable names of at most {_MAX_NAME} characters")
            file = tar.extractfile(member)
            assert file is not None  # regular files only
            yield Member(archive, folder, name, member.size, file)
        raise unexpected(archive, last, f"at most {MAX_MEMBERS:,} files")


def _refuse_more(stream: Any, most: int) -> None:
    """Raises ReadError if something follows the end of an archive: a hole in its middle looks like its end."""
    read = 0
    while (chunk := stream.read(1 << 20)) and read <= most:
        read += len(chunk)
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("data follow its end, so that it has a hole")


@contextlib.contextmanager
def _damage_named(archive: str, member: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, BadDataError):
        raise
    except OSError as error:
        if error.errno is None:  # how gzip and bzip2 report damage
            raise _damaged(archive, member, error) from error
        what = f"the archive cannot be read: {error.strerror}"
        if isinstance(error, PermissionError):
            raise InputMissingError(what, archive, "grant read permission") from error
        raise StorageError(what, archive, "check the disk, then run the same command again") from error
    except Exception as error:  # tarfile passes on errors of number and text formats, and of too many nested headers
        raise _damaged(archive, member, error) from error


def _damaged(archive: str, member: str, error: Exception) -> BadDataError:
    fix = "download it again and compare its size and MD5 with those on image-net.org"
    return BadDataError(f"the archive is damaged at {member}: {error}", archive, fix)
