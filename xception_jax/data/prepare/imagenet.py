"""Builds ImageNet (ILSVRC 2012) from its two archives as distributed.

ILSVRC2012_img_train.tar contains one archive for each class, such as n01440764.tar; ILSVRC2012_img_val.tar contains
50,000 images. All are read as streams without unpacking, and images are kept byte for byte (one is a PNG and 22 are
CMYK, which the decoder handles). Name, features and class order match TFDS' imagenet2012.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from xception_jax.data.imagenet_classes import VALIDATION_NAME, class_names
from xception_jax.data.prepare.archives import members, unexpected
from xception_jax.data.prepare.directory import fingerprint_of_files
from xception_jax.data.prepare.writer import Dataset
from xception_jax.errors import InputMissingError

NAME = "imagenet2012"
TFDS_VERSION = "5.1.0"
TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VALIDATION_ARCHIVE = "ILSVRC2012_img_val.tar"
EXPECTED = {"train": 1_281_167, "validation": 50_000}

_NAMED_CLASS = re.compile(r"(n\d{8})_", re.IGNORECASE)
_VALIDATION_LABELS_FILE = "datasets/imagenet2012/validation_labels.txt"


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
        source=fingerprint_of_files((train, validation)),
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
        for inner in members(f"{archive.name}: {name}", stream=outer.file, size=outer.size):
            if (named := _NAMED_CLASS.match(inner.name)) and named[1].lower() != wnid:
                raise unexpected(f"{archive.name}: {name}", inner.name, f"images of the class {wnid}")
            yield f"{wnid}/{inner.name}", {"image": inner.read(), "label": labels[wnid], "file_name": inner.name}


def _validation_examples(archive: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    labels = {name: label for label, name in enumerate(names)}
    wnids = validation_wnids()
    seen: dict[int, str] = {}  # the writer refuses a name that comes twice
    for member in members(archive.name, path=archive):
        match = VALIDATION_NAME.fullmatch(member.name)
        number = int(match[1]) if match else 0
        if not 1 <= number <= len(wnids) or seen.setdefault(number, member.name) != member.name:
            raise unexpected(
                archive.name, member.name, "images named ILSVRC2012_val_00000001.JPEG to ..._00050000.JPEG, each once"
            )
        wnid = wnids[number - 1]
        if match and (match[2] or f"_{wnid}").lower() != f"_{wnid}":
            raise unexpected(archive.name, member.name, f"an image of the class {wnid} with this number")
        label = labels[wnid]
        yield member.name, {"image": member.read(), "label": label, "file_name": member.name}
