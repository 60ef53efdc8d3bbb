"""Groups of files that belong together: frames of a video, photographs of a patient, crops of a scan.

If files of one group are on two sides of a split, the network recognizes the group instead of the class, and the
accuracy on the held-out side is too high. Publications that compared both ways of splitting report 4 to 26 points.
"""

from __future__ import annotations

import collections
import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from xception_jax.errors import BadDataError, UsageError
from xception_jax.files import expanded
from xception_jax.user_files import read_text, reading

NUMBERED = r"([^/]+?)[-_. ]?\d+\.\w+$"
"""Captures the name of a file without its last number: 'patient12' of 'train/cat/patient12_003.jpg'."""

FOLDER = r"^([^/]+/.+)/[^/]+$"
"""Captures the folder of a file that is below the folder of its class: 'cat/patient12' of 'cat/patient12/003.jpg'."""

# The same for --groups, which needs a group for every file: of the others, the name and the path.
_ALL_NUMBERED, _ALL_FOLDERS = r"([^/]+?)(?:[-_. ]?\d+)?\.\w+$", r"^([^/]+/.+(?=/[^/]+$)|.+)"

_NAMED = 5
_COLUMNS = ["file", "group"]


def read_groups(groups: str, keys: Sequence[str]) -> list[str]:
    """Returns the group of each file.

    Args:
      groups: a regular expression with one capture group, which is searched in the key; or the name of a CSV file with
        the columns 'file' and 'group'.
      keys: the path of each file relative to the folder, with slashes.

    Raises:
      UsageError: the regular expression is not valid, or does not have exactly one capture group.
      InputMissingError: there is no such CSV file.
      BadDataError: a file has no group, or the CSV file has other columns.
    """
    is_table = groups.lower().endswith(".csv")
    found = _from_csv(expanded(groups, "--groups")) if is_table else _from_pattern(groups, keys)
    if not any(key in found for key in keys):  # a table from Windows
        found = {file.replace("\\", "/"): group for file, group in found.items()}
    missing = [key for key in keys if not found.get(key)]
    if missing:
        raise BadDataError(
            f"{len(missing):,} of {len(keys):,} files have no group",
            f"--groups {groups}: {some(missing)}",
            "add them to the CSV file" if is_table else "use a regular expression that matches every path",
        )
    return [found[key] for key in keys]


def _from_csv(path: Path) -> dict[str, str]:
    fix = "write a first line 'file,group', then one line for each file, with its path relative to --source"
    with reading("table of groups", path, fix):
        reader = csv.reader(io.StringIO(read_text(path), newline=""))
        names = [name.strip() for name in next(reader, ())]
        if not set(_COLUMNS) <= set(names):
            raise ValueError(f"its columns are {', '.join(names)}")
        found: dict[str, str] = {}
        for values in filter(None, reader):
            row = dict(zip(names, map(str.strip, values), strict=False))
            if not row.get("file"):
                raise ValueError(f"line {reader.line_num} has no file")
            file, group = Path(row["file"]).as_posix(), row.get("group", "")
            if found.setdefault(file, group) != group:
                raise ValueError(f"{file} is in the groups {found[file]} and {group}")
        return found


def _from_pattern(groups: str, keys: Sequence[str]) -> dict[str, str]:
    fix = r"use one pair of parentheses around what identifies a group, such as '(patient\d+)_'"
    try:
        pattern = re.compile(groups)
    except re.error as error:
        raise UsageError(f"{groups!r} is not a regular expression: {error}", "--groups", fix) from None
    if pattern.groups != 1:
        raise UsageError(f"the regular expression {groups!r} has {pattern.groups} capture groups", "--groups", fix)
    return {key: match[1] for key in keys if (match := pattern.search(key)) and match[1]}


def check_groups(groups: Sequence[str], splits: Sequence[str], where: str) -> None:
    """Checks that no group is in two splits.

    Raises:
      BadDataError: some are; the message names the first of them.
    """
    found = _splits_of(groups, splits)
    shared = [f"{group} ({' and '.join(sorted(found[group]))})" for group in sorted(found) if len(found[group]) > 1]
    if shared:
        what = f"{len(shared):,} of {len(found):,} groups are in more than one split"
        raise BadDataError(f"{what}: {some(shared)}", where, "move the files of each group into one split folder")


def near_duplicates(
    keys: Sequence[str], labels: Sequence[str], splits: Sequence[str], *, in_folders: bool
) -> list[str]:
    """Returns a warning in three lines if files that may belong together are in different splits, else [].

    These are files in one folder below that of their class, or files with one name and different numbers. Folders or
    names that only tell the class or the camera ('rose_017.jpg', 'IMG_0042.jpg') are not considered: there must be at
    least two for each class, with at least two files on average. Neither are names that are only a number ('0042.jpg').

    Args:
      keys: the path of each file relative to the folder, with slashes.
      labels: the class of each file.
      splits: the split of each file.
      in_folders: whether the first part of each key is the folder of its split.
    """
    if in_folders:
        keys = [key.partition("/")[2] for key in keys]
    for expression, of_all, kind in (
        (FOLDER, _ALL_FOLDERS, "folders below a class"),
        (NUMBERED, _ALL_NUMBERED, "names, without their numbers,"),
    ):
        pattern = re.compile(expression)
        names = {key: match[1] for key in keys if (match := pattern.search(key)) and not match[1].isdecimal()}
        named = [(names[key], *row) for key, *row in zip(keys, labels, splits, strict=True) if key in names]
        by_class = len({(name, label) for name, label, _ in named})
        if by_class < 2 * len(set(labels)) or len(named) < 2 * by_class:
            continue
        found = _splits_of([name for name, _, _ in named], [split for _, _, split in named])
        if shared := [name for name in sorted(found) if len(found[name]) > 1]:
            return [
                f"warning: {len(shared):,} of {len(found):,} {kind} are in several splits: {some(shared)}",
                "  If these are frames of a video or images of a person, held-out accuracy will be 4 to 26 points too "
                "high.",
                "  To keep them together, move the files of each into one split folder, and use --overwrite"
                if in_folders
                else f"  To keep them together, prepare again with --overwrite --groups '{of_all}'",
            ]
    return []


def _splits_of(groups: Sequence[str], splits: Sequence[str]) -> Mapping[str, set[str]]:
    found: dict[str, set[str]] = collections.defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        found[group].add(split)
    return found


def some(names: Sequence[str]) -> str:
    """Returns the first names in one line."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
