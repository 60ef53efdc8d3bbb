"""Builds a dataset from a folder of images: DIR/train/CLASS/*.jpg with DIR/validation or DIR/test beside it.

Without split folders, DIR/CLASS/*.jpg is divided 90:10 into train and validation by a hash of the file's path, so that
a file stays in its split when others are added. Classes are the folder names in alphabetical order, or in numerical
order if all are numbers. Links are followed. Hidden files and folders and __MACOSX are ignored.
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

VALIDATION_PERCENT = 10
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}


class Skipped:
    """Collects the files that `image_folder` skips, by reason. Reading the examples adds further ones."""

    NAMED = 10

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}

    def add(self, reason: str, path: Path) -> None:
        """Adds a file or folder."""
        self.files.setdefault(reason, []).append(str(path))

    def lines(self) -> list[str]:
        """Returns one line for each reason, with the number of files and the first ten."""
        return [
            f"skipped, {reason} ({len(paths):,}): {', '.join(paths[: self.NAMED])}"
            for reason, paths in self.files.items()
        ]


def image_folder(source: Path, name: str, skipped: Skipped, *, skip_damaged: bool = False) -> Dataset:
    """Builds the dataset of a folder.

    Args:
      source: the folder.
      name: name of the dataset.
      skipped: collects the files that are skipped.
      skip_damaged: skips damaged images instead of raising an error.

    Raises:
      InputMissingError: the folder is missing or has no images.
      BadDataError: two folders stand for the same split, or a class of another split is missing in 'train'. While the
        examples are read: an image is damaged, or all images of a class in 'train' are.
    """
    if not source.is_dir():
        raise InputMissingError(f"{source} is not a directory", str(source), "point --source at the folder of images")
    files = {split: _files(folder, skipped) for split, folder in _split_folders(source, skipped).items()}
    if not files:
        files = _divide(source, _files(source, skipped))
    counts = {split: len(paths) for split, paths in files.items()}
    if not any(counts.values()):
        raise InputMissingError(
            f"there are no images in {source}",
            str(source),
            f"put them into train/CLASS/ or CLASS/ in this folder, with names that end in {', '.join(images.SUFFIXES)}",
        )
    classes = sorted({path.parent.name for path in files.get("train", [])})
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)  # the names are labels: 2 comes before 10
    for split, paths in files.items():
        for path in paths:
            if path.parent.name not in classes:
                raise BadDataError(
                    f"the class {path.parent.name!r} of {split} has no images in train",
                    str(path.parent),
                    f"rename or remove the folder; the classes of train are {', '.join(classes[:10])}",
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
        description="Images of a folder, unchanged.",
        expected=counts,
    )


def _split_folders(source: Path, skipped: Skipped) -> dict[str, Path]:
    """Returns the folders named after splits, or {} if there is none for training. With one, all others are skipped."""
    found: dict[str, Path] = {}
    others = []
    for path, is_folder in folders.entries(source):
        split = _SPLIT_NAMES.get(path.name) if is_folder else None
        if split is None:
            others.append(path)
        elif split in found:
            what = f"{found[split].name} and {path.name} both stand for the split {split}"
            raise BadDataError(what, str(source), "merge the two folders, or move one elsewhere")
        else:
            found[split] = path
    if "train" not in found:
        return {}
    for path in others:
        skipped.add("neither a split nor in one", path)
    return found


def _files(folder: Path, skipped: Skipped) -> list[Path]:
    """Returns the images CLASS/file of a folder in alphabetical order; everything else in it is skipped."""
    found = []
    for path in folders.files(folder):
        if not path.is_file():
            skipped.add("a broken link or not a regular file", path)
        elif path.suffix.lower() not in images.SUFFIXES:
            skipped.add("not the name of an image", path)
        elif path.parent.parent != folder:
            skipped.add("not in the folder of a class", path)
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
    # All images of a small class may be held out; they go to train then.
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
                    f"an image cannot be decoded: {error}", str(path), "remove it or pass --skip-damaged"
                ) from error
            skipped.add("damaged", path)
            continue
        missing.discard(path.parent.name)
        relative = str(path.relative_to(source))
        yield relative, {"image": data, "label": classes.index(path.parent.name), "file_name": relative}
    if missing:
        names = [name for name in classes if name in missing]
        raise BadDataError(
            f"all images of {len(names):,} of {len(classes):,} classes in train are damaged",
            ", ".join(names[: Skipped.NAMED]),
            "replace the images or remove the folders of these classes",
        )
