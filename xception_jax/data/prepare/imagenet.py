"""ImageNet (ILSVRC 2012), from the two archives as they are distributed.

ILSVRC2012_img_train.tar holds one archive for each class, n01440764.tar and so on; ILSVRC2012_img_val.tar holds 50,000
images. Both are read as streams, the inner archives too: nothing is unpacked, and the images are kept byte for byte
(one is a PNG, 22 are CMYK: the decoder knows). Name, features and class order are those of TFDS' imagenet2012.
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

from xception_jax.data.prepare.writer import Dataset
from xception_jax.errors import BadDataError, InputMissingError

NAME = "imagenet2012"
TFDS_VERSION = "5.1.0"
TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"
EXPECTED = {"train": 1_281_167, "validation": 50_000}

_LABELS_FILE = "datasets/imagenet2012/labels.txt"
_VALIDATION_LABELS_FILE = "datasets/imagenet2012/validation_labels.txt"
_WORDS = Path(__file__).with_name("imagenet_words.txt")
_IMAGE_SUFFIXES = (".jpeg", ".jpg")
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})", re.IGNORECASE)
_LITTER = (".DS_Store", "Thumbs.db")
_TAR_ERRORS = (tarfile.TarError, EOFError, zlib.error, OSError)


def class_names() -> list[str]:
    """Returns the 1,000 WordNet ids in the order of their labels, which is alphabetical."""
    return tfds.core.tfds_path(_LABELS_FILE).read_text().split()


def class_words() -> dict[str, str]:
    """Returns the word of each class by its WordNet id: 'n01440764' is a 'tench'. No two classes have the same."""
    lines = _WORDS.read_text().splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))


def validation_wnids() -> list[str]:
    """Returns the WordNet id of each validation image, in the order of their numbers."""
    return tfds.core.tfds_path(_VALIDATION_LABELS_FILE).read_text().split()


def imagenet2012(source: Path) -> Dataset:
    """The dataset, from the directory that holds both archives.

    Raises:
      InputMissingError: an archive is not there.
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
        f"get {TRAIN_ARCHIVE} and {VALIDATION_ARCHIVE} from image-net.org (free, after registration), and put both, "
        "not unpacked, into one directory; point --source at it",
    )


def _train_examples(archive: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    labels = {name: label for label, name in enumerate(names)}
    seen: set[str] = set()
    for outer in members(archive.name, path=archive):
        name = outer.name
        wnid = name.split(".")[0].lower()
        if wnid not in labels or not re.fullmatch(r"\w+\.(tar|tar\.gz|tgz)", name, re.IGNORECASE):
            raise unexpected(archive.name, name, "an archive named after one of the 1,000 classes, n01440764.tar")
        if wnid in seen:
            raise unexpected(archive.name, name, "one archive for each class, this one is there twice")
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
    """Returns the error for a member that does not belong into an archive."""
    return BadDataError(
        f"the archive holds {member!r}", archive, f"it should hold {expected}; fetch the archive as it is distributed"
    )


@dataclasses.dataclass(frozen=True)
class _Member:
    """A regular file in an archive and the folder it is in; `file` can be read until the next member is asked for."""

    archive: str
    folder: str
    name: str
    size: int
    file: IO[bytes]

    def read(self) -> bytes:
        """Returns the content.

        Raises:
          BadDataError: the archive ends before the member does.
        """
        if not self.name.lower().endswith(_IMAGE_SUFFIXES):
            raise unexpected(self.archive, self.name, "images whose names end in .JPEG")
        with _damage_named(self.archive, self.name):
            data = self.file.read()
            if len(data) != self.size:
                raise tarfile.ReadError(f"it ends after {len(data):,} of {self.size:,} bytes")
        return data


class _StrictTarInfo(tarfile.TarInfo):
    """Refuses a damaged header, and an archive without an end mark: TarFile takes either for the end of the archive."""

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
    """Yields the regular files of an archive that is read as a stream, compressed or not.

    Only the last part of a member's path is used, as a name: nothing is written to it. Directories, and what file
    managers leave behind, are passed over.

    Raises:
      BadDataError: the archive is damaged, or holds a link or a device.
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
            if member.isdir() or name.startswith("._") or name in _LITTER:
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
            "fetch it again, and compare its size and MD5 with those on image-net.org",
        ) from error
