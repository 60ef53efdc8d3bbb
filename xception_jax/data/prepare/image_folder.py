"""A dataset from a folder of images: DIR/train/CLASS/*.jpg, and beside it DIR/validation or DIR/test.

Without split folders, DIR/CLASS/*.jpg is divided 90 to 10 into train and validation, by a hash of the file's path, so
that a file stays on its side when others are added. Classes are the folders' names in alphabetical order, or in that
of their numbers if all are numbers. Links are followed; hidden files and folders, and __MACOSX, are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from xception_jax.data import folders, images
from xception_jax.data.prepare.writer import Dataset
from xception_jax.errors import BadDataError, InputMissingError

SPLITS = ("train", "validation", "test")
VALIDATION_PERCENT = 10
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}


class Skipped:
    """What was left out, by its reason; filled while the examples of `image_folder` are read."""

    NAMED = 10

    def __init__(self):
        self.files: dict[str, list[str]] = {}

    def add(self, reason: str, path: Path) -> None:
        """Takes note of one file or folder."""
        self.files.setdefault(reason, []).append(str(path))

    def lines(self) -> list[str]:
        """Returns one line for each reason: how many, and the first ten."""
        return [
            f"left out, {reason} ({len(paths):,}): {', '.join(paths[: self.NAMED])}"
            for reason, paths in self.files.items()
        ]


def image_folder(source: Path, name: str, skipped: Skipped, *, skip_damaged: bool = False) -> Dataset:
    """The dataset of a folder.

    Args:
      source: the folder.
      name: of the dataset.
      skipped: takes note of everything that is left out.
      skip_damaged: leaves damaged images out; otherwise the first one ends it.

    Raises:
      InputMissingError: the folder is not there, or holds no images.
      BadDataError: two folders mean one split, a class of another split is not among those of 'train', or, while the
        examples are read, an image is damaged, or all of a class in 'train' are.
    """
    if not source.is_dir():
        raise InputMissingError(f"{source} is not a directory", str(source), "point --source at the folder of images")
    files = {split: _files(folder, skipped) for split, folder in _split_folders(source, skipped).items()}
    if not files:
        files = _divide(source, _files(source, skipped))
    counts = {split: len(paths) for split, paths in files.items()}
    if not any(counts.values()):
        raise InputMissingError(
            f"no images in {source}",
            str(source),
            f"put them into train/CLASS/ or CLASS/ below it; names end in {', '.join(images.SUFFIXES)}",
        )
    classes = sorted({path.parent.name for path in files.get("train", [])})
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)  # 2 before 10: such names are labels
    for split, paths in files.items():
        for path in paths:
            if path.parent.name not in classes:
                raise BadDataError(
                    f"the class {path.parent.name!r} of {split} has no images in train",
                    str(path.parent),
                    f"the classes of train are {', '.join(classes[:10])}: correct the folder's name, or remove it",
                )
    return Dataset(
        name=name,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=classes),
                "file_name": tfds.features.Text(),
            }
        ),
        splits={
            split: _examples(
                paths, source, classes, skipped if skip_damaged else None, needed=classes if split == "train" else ()
            )
            for split, paths in files.items()
            if paths
        },
        description="Images of a folder, as they were.",
        expected=counts,
    )


def _split_folders(source: Path, skipped: Skipped) -> dict[str, Path]:
    """Returns the folders that are named after splits, if there is one for training; nothing else is read then."""
    found: dict[str, Path] = {}
    others = []
    for path, is_folder in folders.entries(source):
        split = _SPLIT_NAMES.get(path.name) if is_folder else None
        if split is None:
            others.append(path)
        elif split in found:
            what = f"{found[split].name} and {path.name} both mean the split {split}"
            raise BadDataError(what, str(source), "merge the two folders, or move one elsewhere")
        else:
            found[split] = path
    if "train" not in found:
        return {}
    for path in others:
        skipped.add("neither a split nor in one", path)
    return found


def _files(folder: Path, skipped: Skipped) -> list[Path]:
    """Returns CLASS/file of a folder in alphabetical order, and takes note of everything else in it."""
    found = []
    for path in folders.files(folder):
        if not path.is_file():
            skipped.add("a link that leads nowhere, or no regular file", path)
        elif path.suffix.lower() not in images.SUFFIXES:
            skipped.add("not an image by its name", path)
        elif path.parent.parent != folder:
            skipped.add("not in a folder of a class", path)
        else:
            found.append(path)
    classes = {path.parent for path in found}
    for path, is_folder in folders.entries(folder):
        if is_folder and path not in classes:
            skipped.add("a class without images", path)
    return found


def _divide(source: Path, paths: list[Path]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {"train": [], "validation": []}
    for path in paths:
        digest = hashlib.md5(str(path.relative_to(source)).encode()).digest()
        held_out = int.from_bytes(digest[:4]) % 100 < VALIDATION_PERCENT
        files["validation" if held_out else "train"].append(path)
    # A class of few images may be held out as a whole.
    known = {path.parent for path in files["train"]}
    files["train"] = sorted(files["train"] + [path for path in files["validation"] if path.parent not in known])
    files["validation"] = [path for path in files["validation"] if path.parent in known]
    return files


def _examples(
    paths: list[Path], source: Path, classes: list[str], skipped: Skipped | None, needed: Iterable[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    missing = set(needed)
    for path in paths:
        data = path.read_bytes()
        try:
            images.decode(data)
        except images.DamagedImageError as error:
            if skipped is None:
                raise BadDataError(
                    f"an image cannot be decoded: {error}", str(path), "remove it, or pass --skip-damaged"
                ) from error
            skipped.add("damaged", path)
            continue
        missing.discard(path.parent.name)
        relative = str(path.relative_to(source))
        yield relative, {"image": data, "label": classes.index(path.parent.name), "file_name": relative}
    if missing:
        names = [name for name in classes if name in missing]
        raise BadDataError(
            f"all images in train are damaged of {len(names):,} of {len(classes):,} classes",
            ", ".join(names[: Skipped.NAMED]),
            "replace them, or remove the folders of these classes",
        )
