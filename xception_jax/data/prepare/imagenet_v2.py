"""Builds ImageNet-V2: 10,000 new test images for ImageNet's classes (Recht et al. 2019, 1902.10811) in three variants.

The source is the public archive or its folder: 'imagenetv2-matched-frequency-format-val/<0 to 999>/*.jpeg'. The name of
a folder is the label, so classes are in the order of imagenet2012, not in the alphabetical order of the folders ('10'
before '2'). Name, features and class order match TFDS' imagenet_v2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from xception_jax.data import folders, images
from xception_jax.data.imagenet_classes import class_names
from xception_jax.data.prepare.archives import members, unexpected
from xception_jax.data.prepare.writer import Dataset
from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.user_files import reading

NAME = "imagenet_v2"
TFDS_VERSION = "3.0.0"
EXPECTED = {"test": 10_000}

# By the name in TFDS: the name in those of archive and folder.
VARIANTS = {"matched-frequency": "matched-frequency", "threshold-0.7": "threshold0.7", "topimages": "top-images"}
_LABEL = re.compile(r"\d{1,3}")


def imagenet_v2(source: Path, variant: str = "matched-frequency") -> Dataset:
    """Builds the dataset imagenet_v2/VARIANT, whose only split is 'test'.

    Args:
      source: the directory that contains the archive or the folder, or the folder itself.
      variant: a key of `VARIANTS`.

    Raises:
      InputMissingError: neither exists.
    """
    stem = f"imagenetv2-{VARIANTS[variant]}"
    archives = [path for path in (source / f"{stem}.tar.gz", source / f"{stem}.tar") if path.is_file()]
    others = [f"imagenetv2-{value}" for value in VARIANTS.values() if f"imagenetv2-{value}" != stem]
    directories = [path for path in (source / f"{stem}-format-val", source) if (path / "0").is_dir()]
    if directories and directories[0] == source and source.resolve().name.startswith(tuple(others)):
        raise BadDataError(f"the folder is another variant than {variant}", str(source), "name its variant instead")
    if directories:
        examples = _from_folder(directories[0])
    elif archives:
        examples = _from_archive(archives[0])
    else:
        raise InputMissingError(
            f"neither {stem}.tar.gz nor the folder {stem}-format-val is in {source}",
            str(source),
            f"download {stem}.tar.gz from huggingface.co/datasets/vaishaal/ImageNetV2; point --source at its directory",
        )
    return Dataset(
        name=NAME,
        config=variant,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=class_names()),
                "file_name": tfds.features.Text(),
            }
        ),
        splits={"test": examples},
        description="New test images for ImageNet, as distributed. Recht et al., ICML 2019.",
        expected=EXPECTED,
        version=TFDS_VERSION,
    )


def _from_archive(archive: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for member in members(archive.name, path=archive):
        if not _LABEL.fullmatch(member.folder):
            raise unexpected(archive.name, f"{member.folder}/{member.name}", "folders named 0 to 999 with images")
        yield _example(member.folder, member.name, member.read())


def _from_folder(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in folders.files(folder):
        if path.parent.parent != folder or not _LABEL.fullmatch(path.parent.name):
            fix = "remove everything but the folders 0 to 999 with their images"
            raise BadDataError("the folder contains a file that is not part of ImageNet-V2", str(path), fix)
        if path.suffix.lower() not in images.SUFFIXES:
            raise BadDataError("the folder contains a file without the name of an image", str(path), "remove it")
        yield _example(path.parent.name, folders.text(Path(path.name)), _read(path))


def _read(path: Path) -> bytes:
    with reading("image", path, "remove it, or unpack the archive again"):
        return images.read(path)


def _example(folder: str, name: str, image: bytes) -> tuple[str, dict[str, Any]]:
    return f"{folder}_{name}", {"image": image, "label": int(folder), "file_name": f"{folder}/{name}"}
