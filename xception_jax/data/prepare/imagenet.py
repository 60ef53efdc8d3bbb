"""Builds ImageNet (ILSVRC 2012) from its two archives as distributed.

ILSVRC2012_img_train.tar contains one archive for each class, such as n01440764.tar; ILSVRC2012_img_val.tar contains
50,000 images. All are read as streams without unpacking, and images are kept byte for byte (one is a PNG and 22 are
CMYK, which the decoder handles). Name, features and class order match TFDS' imagenet2012.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Self

import tensorflow_datasets as tfds

from xception_jax.data.imagenet_classes import class_names
from xception_jax.data.prepare.writer import Dataset
from xception_jax.errors import BadDataError, InputMissingError

NAME = "imagenet2012"
TFDS_VERSION = "5.1.0"
TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"
EXPECTED = {"train": 1_281_167, "validation": 50_000}

_VALIDATION_LABELS_FILE = "datasets/imagenet2012/validation_labels.txt"
_IMAGE_SUFFIXES = (".jpeg", ".jpg")
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})", re.IGNORECASE)
_IGNORED = (".DS_Store", "Thumbs.db")
_TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError)


def validation_wnids() -> list[str]:
    """Returns the WordNet ids of the validation images in the order of their numbers."""
    return tfds.core.tfds_path(_VALIDATION_LABELS_FILE).read_text().split()


def imagenet2012(source: Path) -> Dataset:
    """Builds the dataset from the directory that contains both archives.

    Raises:
      InputMissingError: an archive is missing.
    """
    train, validation = _find(source, TRAIN_ARCHIVE), _find(source, VALIDATION_ARCHIVE)
    names = class_names()
    return Dataset(
        name=NAME,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=names),
                "file_name": tfds.features.Text(),
            }
        ),
        splits={"train": _train_examples(train, names), "validation": _validation_examples(validation, names)},
        description="ILSVRC 2012, images as distributed. Russakovsky et al., IJCV 2015.",
        expected=EXPECTED,
        version=TFDS_VERSION,
    )


def _find(source: Path, name: str) -> Path:
    for path in (source / name, source / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputMissingError(
        f"{name} is not in {source}",
        str(source),
        f"download {TRAIN_ARCHIVE} and {VALIDATION_ARCHIVE} from image-net.org (free, after registration) into one "
        "directory, do not unpack them, and point --source at the directory",
    )


def _train_examples(archive: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    labels = {name: label for label, name in enumerate(names)}
    seen: set[str] = set()
    for outer in members(archive.name, path=archive):
        name = outer.name
        wnid = name.split(".")[0].lower()
        if wnid not in labels or not re.fullmatch(r"\w+\.(tar|tar\.gz|tgz)", name, re.IGNORECASE):
            raise unexpected(archive.name, name, "archives named after the 1,000 classes, such as n01440764.tar")
        if wnid in seen:
            raise unexpected(archive.name, name, "one archive for each class, not two of this one")
        seen.add(wnid)
        for inner in members(f"{archive.name}: {name}", stream=outer.file):
            yield f"{wnid}/{inner.name}", {"image": inner.read(), "label": labels[wnid], "file_name": inner.name}


def _validation_examples(archive: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    labels = {name: label for label, name in enumerate(names)}
    wnids = validation_wnids()
    for member in members(archive.name, path=archive):
        match = _VALIDATION_NAME.match(member.name)
        if match is None or not 1 <= int(match[1]) <= len(wnids):
            raise unexpected(
                archive.name, member.name, "images named ILSVRC2012_val_00000001.JPEG to ..._00050000.JPEG"
            )
        label = labels[wnids[int(match[1]) - 1]]
        yield member.name, {"image": member.read(), "label": label, "file_name": member.name}


def unexpected(archive: str, member: str, expected: str) -> BadDataError:
    """Returns the error for a member that does not belong in an archive."""
    fix = f"it should contain {expected}; download the archive as distributed"
    return BadDataError(f"the archive contains {member!r}", archive, fix)


@dataclasses.dataclass(frozen=True)
class _Member:
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
        with _damage_named(self.archive, self.name):
            data = self.file.read()
            if len(data) != self.size:
                raise tarfile.ReadError(f"it ends after {len(data):,} of {self.size:,} bytes")
        return data


class _StrictTarInfo(tarfile.TarInfo):
    """Raises an error for a damaged header or a missing end mark, which TarFile takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Reads the next header."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def members(archive: str, *, path: Path | None = None, stream: IO[bytes] | None = None) -> Iterator[_Member]:
    """Reads an archive as a stream, compressed or not, and yields its regular files.

    Nothing is written to the path of a member: only its last two parts are used, as names. Directories and the files
    that file managers add are skipped.

    Args:
      archive: name of the archive for error messages.
      path: the archive, or
      stream: its content.

    Raises:
      BadDataError: the archive is damaged, or contains a link or a device.
    """
    with contextlib.ExitStack() as stack:
        with _damage_named(archive, "its beginning"):
            tar = stack.enter_context(tarfile.open(path, mode="r|*", fileobj=stream, tarinfo=_StrictTarInfo))
        last = "its beginning"
        while True:
            with _damage_named(archive, f"the member after {last}"):
                member = tar.next()
            if member is None:
                return
            last = member.name
            name = PurePosixPath(member.name).name
            if member.isdir() or name.startswith("._") or name in _IGNORED:
                continue
            if not member.isreg():
                raise unexpected(archive, member.name, "files, neither links nor devices")
            file = tar.extractfile(member)
            assert file is not None  # regular files only
            yield _Member(archive, PurePosixPath(member.name).parent.name, name, member.size, file)


@contextlib.contextmanager
def _damage_named(archive: str, member: str) -> Iterator[None]:
    try:
        yield
    except _TAR_ERRORS as error:
        raise BadDataError(
            f"the archive is damaged at {member}: {error}",
            archive,
            "download it again and compare its size and MD5 with those on image-net.org",
        ) from error
