"""Builds a dataset from a folder of images: DIR/train/CLASS/*.jpg with DIR/validation or DIR/test beside it.

Without split folders, DIR/CLASS/*.jpg is divided into splits by class, and by group if the files have groups (splits.py
says how, and which files keep their split when others are added). Images may be in folders below that of their class,
such as CLASS/PATIENT/*.jpg. Classes are the folder names in alphabetical order, or in numerical order if all are
numbers. Links are followed. Hidden files and folders and __MACOSX are ignored.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from xception_jax.data import folders, images
from xception_jax.data.metadata import as_shown, check_class_names
from xception_jax.data.prepare.groups import check_groups, near_duplicates, read_groups, some
from xception_jax.data.prepare.splits import DEFAULT_SHARES, TRAIN, divide, divide_groups
from xception_jax.data.prepare.writer import Dataset
from xception_jax.errors import BadDataError, InputMissingError, StorageError, UsageError
from xception_jax.names import printable

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "training": "train",
    "testing": "test",
    "train_set": "train",
    "training_set": "train",
    "validation_set": "validation",
    "val_set": "validation",
    "test_set": "test",
}


class Skipped:
    """Collects the files that `image_folder` skips, by reason. Reading the examples adds further ones."""

    NAMED = 10

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}

    def add(self, reason: str, path: Path) -> None:
        """Adds a file or folder."""
        self.files.setdefault(reason, []).append(folders.text(path))

    def lines(self) -> list[str]:
        """Returns one line for each reason, with the number of files and the first ten."""
        return [
            f"skipped, {reason} ({len(paths):,}): {', '.join(paths[: self.NAMED])}"
            for reason, paths in self.files.items()
        ]


class Contents:
    """Counts what a dataset holds. It is complete when the examples have been read.

    Attributes:
      images: number of images by split and class.
      groups: the groups in each split; empty if the files have no groups.
      warnings: lines for the user.
    """

    CLASSES_SHOWN = 20

    def __init__(self) -> None:
        self.images: dict[str, collections.Counter[str]] = {}
        self.groups: dict[str, set[str]] = {}
        self.warnings: list[str] = []
        self._first: dict[bytes, _File] = {}  # of all files with these bytes
        self._repeated: dict[str, dict[bytes, str]] = {"splits": {}, "classes": {}}

    def add(self, split: str, label: str, group: str | None) -> None:
        """Counts one image."""
        self.images.setdefault(split, collections.Counter())[label] += 1
        if group is not None:
            self.groups.setdefault(split, set()).add(group)

    def compare(self, file: _File, data: bytes) -> None:
        """Compares the bytes of one image with those of all before."""
        digest = hashlib.blake2b(data, digest_size=16).digest()
        first = self._first.setdefault(digest, file)
        for kind, differs in (("splits", file.split != first.split), ("classes", file.label != first.label)):
            if differs:
                self._repeated[kind].setdefault(digest, f"{first.key} and {file.key}")

    def repeated(self) -> list[str]:
        """Returns a warning if files with the same bytes are in several splits or classes, else []."""
        found = [f"{len(pairs):,} in several {kind}" for kind, pairs in self._repeated.items() if pairs]
        first = next((pair for pairs in self._repeated.values() for pair in pairs.values()), "")
        return [f"warning: some images are there more than once: {', '.join(found)}, first: {first}"] if found else []

    def lines(self, classes: list[str]) -> list[str]:
        """Returns a table with one row for each class and one column for each split."""
        rows: list[tuple[str, ...]] = [("class", *self.images)]
        for name in classes[: self.CLASSES_SHOWN]:
            rows.append((printable(name), *(f"{counts[name]:,}" for counts in self.images.values())))
        if len(classes) > self.CLASSES_SHOWN:
            rows.append((f"({len(classes) - self.CLASSES_SHOWN:,} more)", *("" for _ in self.images)))
        rows.append(("all classes", *(f"{counts.total():,}" for counts in self.images.values())))
        if self.groups:
            rows.append(("groups", *(f"{len(self.groups.get(split, ())):,}" for split in self.images)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


@dataclasses.dataclass(frozen=True)
class _File:
    """An image of the folder. `key` is its path relative to the folder, with slashes, and `label` its class."""

    path: Path
    key: str
    label: str
    split: str
    group: str | None


def image_folder(
    source: Path,
    name: str,
    skipped: Skipped,
    contents: Contents | None = None,
    *,
    skip_damaged: bool = False,
    shares: Mapping[str, float] | None = None,
    groups: str = "",
    limits: images.Limits | None = None,
) -> Dataset:
    """Builds the dataset of a folder.

    Args:
      source: the folder.
      name: name of the dataset.
      skipped: collects the files that are skipped.
      contents: counts the images, and collects warnings.
      skip_damaged: skips damaged images instead of raising an error.
      shares: the share of each split, for a folder without split folders; by default `DEFAULT_SHARES`.
      groups: a regular expression or a CSV file that says which files belong together, see `read_groups`.
      limits: limits above which an image counts as damaged.

    Raises:
      InputMissingError: the folder is missing or has no images.
      UsageError: `shares` are given, but the folder has split folders; or `groups` is not valid.
      BadDataError: the name of a class is not valid, two folders stand for the same split, 'train' lacks a class of
        another split, a file has no group, or a group is in two split folders. Also raised while the examples are read,
        if an image is damaged, or all images of a class in 'train' are.
    """
    if not source.is_dir():
        raise InputMissingError(f"{source} is not a directory", str(source), "point --source at the folder of images")
    contents = contents or Contents()
    files = _divided_files(source, skipped, contents, shares, groups)
    by_split: dict[str, list[_File]] = collections.defaultdict(list)
    for file in files:
        by_split[file.split].append(file)
    _check_train(by_split)
    classes = sorted({file.label for file in files})
    check_class_names(classes, str(source))
    if len(classes) == 1:
        contents.warnings.append(
            f"there is a single class, {classes[0]}: --source is a folder with one folder for each class"
        )
    if all(class_name.isdecimal() for class_name in classes):
        classes.sort(key=int)  # the names are labels: 2 comes before 10
    features: dict[str, Any] = {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=classes),
        "file_name": tfds.features.Text(),
    }
    if groups:
        features["group"] = tfds.features.Text()
    return Dataset(
        name=name,
        features=tfds.features.FeaturesDict(features),
        splits={
            split: _examples(
                of_split,
                classes,
                contents,
                skipped if skip_damaged else None,
                needed=classes if split == TRAIN else (),
                limits=limits,
            )
            for split, of_split in by_split.items()
        },
        description="Images of a folder, unchanged.",
        expected={split: len(of_split) for split, of_split in by_split.items()},
        digest=True,
    )


def _divided_files(
    source: Path, skipped: Skipped, contents: Contents, shares: Mapping[str, float] | None, groups: str
) -> list[_File]:
    """Returns all images with their splits and groups, in the order of splits and paths."""
    split_folders = _split_folders(source, skipped)
    if split_folders and shares is not None:
        raise UsageError(
            f"the folder is already divided into {', '.join(split_folders)}",
            "--splits or --folds",
            "remove the option, or point --source at a folder with one folder for each class",
        )
    seen: dict[Path, tuple[Path, str]] = {}
    found = {split: _files(folder, skipped, seen) for split, folder in (split_folders or {"": source}).items()}
    paths = [path for files in found.values() for path in files]
    if not paths:
        raise InputMissingError(
            "; ".join([f"there are no images in {source}", *skipped.lines()]),
            str(source),
            f"put them into train/CLASS/ or CLASS/ in this folder, with names that end in {', '.join(images.SUFFIXES)}",
        )
    keys = [folders.text(path.relative_to(source)) for path in paths]
    labels = [label for files in found.values() for label in files.values()]
    group_of = read_groups(groups, keys) if groups else None
    required, shares = shares is not None, shares or DEFAULT_SHARES
    if split_folders:
        splits = [split for split, files in found.items() for _ in files]
    elif group_of is not None:
        splits = divide_groups(group_of, labels, shares)
    else:
        splits = divide(keys, labels, shares)
    if not split_folders and (empty := [split for split in shares if split not in splits]):
        what = f"{len(paths):,} images leave {', '.join(empty[:10])} without any"
        if required:
            raise BadDataError(what, str(source), "ask for fewer splits, or add images")
        contents.warnings.append(f"{what}: the dataset has no such split")
    if group_of is None:
        contents.warnings += near_duplicates(keys, labels, splits, in_folders=bool(split_folders))
    else:
        check_groups(group_of, splits, str(source))
    files = [
        _File(path, key, label, split, group_of[row] if group_of else None)
        for row, (path, key, label, split) in enumerate(zip(paths, keys, labels, splits, strict=True))
    ]
    order = list(split_folders or shares)
    return sorted(files, key=lambda file: order.index(file.split))  # stable: paths stay in order


def _check_train(by_split: Mapping[str, list[_File]]) -> None:
    """Raises BadDataError if there is a split 'train' that lacks a class of another split."""
    classes = {file.label for file in by_split.get(TRAIN, ())}
    same = {as_shown(label.strip()): label for label in classes}
    for split, files in by_split.items():
        for file in files:
            if TRAIN in by_split and file.label not in classes:
                what = f"the class {file.label!r} of {split} has no images in train"
                fix = f"rename or remove the folder; the classes of train are {', '.join(sorted(classes)[:10])}"
                if (label := same.get(as_shown(file.label.strip()))) is not None:
                    what = f"a class of {split} only looks like one of train: {file.label!a} and {label!a}"
                    fix = "give the two folders the same name"
                raise BadDataError(what, str(file.path.parent), fix)


def _split_folders(source: Path, skipped: Skipped) -> dict[str, Path]:
    """Returns the folders named after splits, or {} if there is none for training. With one, all others are skipped."""
    found: dict[str, Path] = {}
    others: list[tuple[Path, bool]] = []
    for path, is_folder in folders.entries(source):
        split = _SPLIT_NAMES.get(path.name.lower()) if is_folder else None
        if split is None:
            others.append((path, is_folder))
        elif split in found:
            what = f"{found[split].name} and {path.name} both stand for the split {split}"
            raise BadDataError(what, str(source), "merge the two folders, or move one elsewhere")
        else:
            found[split] = path
    if "train" not in found:
        if found and not any(is_folder for _, is_folder in others):
            what = f"there is no training folder next to {', '.join(folder.name for folder in found.values())}"
            raise BadDataError(
                what, str(source), "add one called train, or point --source at the folders of the classes"
            )
        return {}
    if len(found) == 1 and (beside := [path.name for path, is_folder in others if is_folder and _has_images(path)]):
        name = found["train"].name
        what = f"{some(beside)} beside {name} are neither splits nor in {name}, which is taken for the training split"
        fix = f"rename {name} if it is a class; else move the other folders into it, or elsewhere"
        raise BadDataError(what, str(source), fix)
    for path, _ in others:
        skipped.add("neither a split nor in one", path)
    return found


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in images.SUFFIXES for path in folders.files(folder))


def _files(folder: Path, skipped: Skipped, seen: dict[Path, tuple[Path, str]]) -> dict[Path, str]:
    """Returns the class of each image CLASS/.../file of a folder, in alphabetical order; all else in it is skipped.

    Args:
      folder: the folder.
      skipped: takes what is skipped.
      seen: the folders that were read for all splits: split folder and class of each, by its real path.

    Raises:
      BadDataError: two classes or two splits share a folder, by a link.
    """
    found: dict[Path, str] = {}
    real_folder = folder.resolve()
    for top, is_folder in folders.entries(folder):
        before, checked = len(found), set[Path]()
        for path in folders.files(top, but=folder) if is_folder else (top,):
            if is_folder and path.parent not in checked:
                checked.add(path.parent)
                real = path.parent.resolve()
                of_split, label = seen.setdefault(real, (folder, top.name))
                if of_split != folder:
                    what = f"the splits {of_split.name} and {folder.name} share a folder, by a link"
                    raise BadDataError(what, str(path.parent), "remove the link: each image belongs to one split")
                _check_class(path.parent, _class_of(real, real_folder) or label, top.name)
            if is_folder and path.is_symlink():
                _check_class(path, _class_of(Path(os.path.realpath(path)).parent, real_folder) or top.name, top.name)
            if not os.path.isfile(path):
                skipped.add("a broken link or not a regular file", path)
            elif path.suffix.lower() not in images.SUFFIXES:
                skipped.add("not the name of an image", path)
            elif not is_folder:
                skipped.add("not in the folder of a class", path)
            else:
                found[path] = top.name
        if is_folder and len(found) == before:
            skipped.add("a class without images", top)
    return found


def _check_class(link: Path, label: str, expected: str) -> None:
    if label != expected:
        what = f"a link in the class {expected!r} leads to the class {label!r}"
        raise BadDataError(what, str(link), "remove the link: each image belongs to one class")


def _class_of(real: Path, top: Path) -> str:
    """Returns the class of a folder below `top`; '' elsewhere."""
    return real.relative_to(top).parts[0] if real != top and real.is_relative_to(top) else ""


def _examples(
    files: list[_File],
    classes: list[str],
    contents: Contents,
    skipped: Skipped | None,
    needed: Iterable[str],
    limits: images.Limits | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    missing, number = set(needed), {name: label for label, name in enumerate(classes)}
    for file in files:
        try:
            data = images.read(file.path)
            images.decode(data, limits)
        except OSError as error:
            if skipped is None:
                what = f"an image cannot be read: {error.strerror or error}"
                fix = "grant read permission, remove it or pass --skip_damaged"
                raise StorageError(what, folders.text(file.path), fix) from error
            skipped.add("unreadable", file.path)
            continue
        except images.DamagedImageError as error:
            if skipped is None:
                raise BadDataError(
                    f"an image cannot be decoded: {error}", folders.text(file.path), "remove it or pass --skip_damaged"
                ) from error
            skipped.add("damaged", file.path)
            continue
        missing.discard(file.label)
        contents.add(file.split, file.label, file.group)
        contents.compare(file, data)
        example = {"image": data, "label": number[file.label], "file_name": file.key}
        yield file.key, example if file.group is None else example | {"group": file.group}
    if missing:
        names = [name for name in classes if name in missing]
        raise BadDataError(
            f"all images of {len(names):,} of {len(classes):,} classes in train are damaged",
            ", ".join(names[: Skipped.NAMED]),
            "replace the images or remove the folders of these classes",
        )
