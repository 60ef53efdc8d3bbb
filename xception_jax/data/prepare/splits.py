"""Divides labelled files into splits with given shares, stratified by class, and with groups kept together.

The result depends only on the names, labels and groups of the files, not on their order or on a random seed.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from xception_jax.errors import BadDataError

DEFAULT_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
TRAIN = "train"

_PASSES = 10  # over all groups, each of which may move to a better split; two or three are usually enough


def divide(keys: Sequence[str], labels: Sequence[str], shares: Mapping[str, float]) -> list[str]:
    """Returns the split of each file.

    Of every class, each split has its share of the files, rounded up or down; what rounding takes from a split in one
    class it gets back in the next. 'train' has at least one file of each class. The files of a class are ordered by a
    hash of their keys, and consecutive ones belong to one split. When m files are added to a class, each boundary
    between two of S splits therefore passes at most m + 2(S - 1) of the files that were there before, and in other
    classes at most 2(S - 1).

    Args:
      keys: a name for each file that does not change, such as its path relative to the folder.
      labels: the class of each file.
      shares: the share of each split; they sum to 1.
    """
    rows_of: dict[str, list[int]] = collections.defaultdict(list)
    for row, label in enumerate(labels):
        rows_of[label].append(row)
    splits, result = list(shares), [""] * len(keys)
    owed = np.zeros(len(splits))  # files that each split should have had of the classes so far, less those it has
    for label in sorted(rows_of):
        rows = sorted(rows_of[label], key=lambda row: _hash(keys[row]))
        exact = len(rows) * np.array([shares[split] for split in splits])
        counts = np.floor(exact + 1e-9).astype(int)
        owed += exact - counts
        fractional = np.where(exact - counts > 1e-9, owed, -np.inf)
        for split in np.argsort(-fractional, kind="stable")[: len(rows) - counts.sum()]:
            counts[split] += 1
            owed[split] -= 1
        if TRAIN in shares and not counts[splits.index(TRAIN)]:
            for split, change in ((int(counts.argmax()), -1), (splits.index(TRAIN), 1)):
                counts[split] += change
                owed[split] -= change
        for row, split in zip(rows, np.repeat(splits, counts), strict=True):
            result[row] = str(split)
    return result


def divide_groups(groups: Sequence[str], labels: Sequence[str], shares: Mapping[str, float]) -> list[str]:
    """Returns the split of each file. All files of a group are in one split.

    The groups are placed from the largest to the smallest, each where it brings the number of files of each class, and
    of all files, closest to the shares (measured by chi-square). Groups then move as long as that improves the result.
    Shares are as exact as the sizes of the groups allow. 'train' has files of every class, and no split is empty.
    Additional files can move other groups.

    Args:
      groups: the group of each file.
      labels: the class of each file.
      shares: the share of each split; they sum to 1.

    Raises:
      BadDataError: there are fewer groups than splits, or 'train' needs them all to have every class.
    """
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    classes, class_of = np.unique(np.asarray(labels), return_inverse=True)
    if len(names) < len(shares):
        raise BadDataError(
            f"{len(names)} groups cannot fill {len(shares)} splits",
            f"groups: {', '.join(names)}",
            "correct --groups, or ask for fewer splits with --splits or --folds",
        )
    counts = np.zeros((len(names), len(classes) + 1))  # files of each group by class; the last column is their sum
    np.add.at(counts, (group_of, class_of), 1)
    counts[:, -1] = counts.sum(1)
    order = sorted(range(len(names)), key=lambda group: (-counts[group, -1], _hash(str(names[group]))))
    placed = _place(counts, order, np.array(list(shares.values())))
    train = list(shares).index(TRAIN) if TRAIN in shares else None
    if train is not None:
        _complete_train(counts, placed, train)
    _fill_empty_splits(counts, placed, list(shares), train)
    splits = list(shares)
    return [splits[placed[group]] for group in group_of]


def _place(counts: np.ndarray, order: Sequence[int], shares: np.ndarray) -> np.ndarray:
    """Returns the number of the split of each group."""
    target = shares[:, None] * counts.sum(0)
    present = np.zeros_like(target)
    placed = np.full(len(counts), -1)
    for _ in range(_PASSES):
        moved = False
        for group in order:
            columns = np.flatnonzero(counts[group])
            added, before = counts[group, columns], placed[group]
            if before >= 0:
                present[before, columns] -= added
            # By how much the sum of (present - target)^2 / target grows for each split.
            difference = 2 * (present[:, columns] - target[:, columns]) + added
            growth = (added * difference / target[:, columns]).sum(1)
            best = int(growth.argmin())
            if before >= 0 and growth[best] > growth[before] - 1e-9:
                best = before
            present[best, columns] += added
            placed[group] = best
            moved |= best != before
        if not moved:
            break
    return placed


def _fill_empty_splits(counts: np.ndarray, placed: np.ndarray, splits: Sequence[str], train: int | None) -> None:
    """Gives each empty split the smallest group of the split with the most groups that can spare one.

    'train' spares a group only if it has other groups of the same classes.
    """
    for split in range(len(splits)):
        if split in placed:
            continue
        sizes = np.bincount(placed, minlength=len(splits))
        spare = [group for group in range(len(placed)) if sizes[placed[group]] > 1]
        if train is not None:
            present = counts[placed == train, :-1].sum(0)
            spare = [
                group
                for group in spare
                if placed[group] != train or (present > counts[group, :-1])[counts[group, :-1] > 0].all()
            ]
        if not spare:
            raise BadDataError(
                f"the groups leave no image for the split {splits[split]}: train needs all of them to have every class",
                "--groups",
                "ask for fewer splits with --splits, or add groups",
            )
        placed[min(spare, key=lambda group: (-sizes[placed[group]], counts[group, -1]))] = split


def _complete_train(counts: np.ndarray, placed: np.ndarray, train: int) -> None:
    """Moves the smallest group with files of a class to 'train' if all groups of the class are elsewhere."""
    for column in range(counts.shape[1] - 1):
        holders = np.flatnonzero(counts[:, column])
        if train not in placed[holders]:
            placed[holders[counts[holders, -1].argmin()]] = train


def _hash(name: str) -> bytes:
    """Returns the position of a file or group. The prefix makes it independent of the order inside a split."""
    return hashlib.md5(f"split:{name}".encode()).digest()
