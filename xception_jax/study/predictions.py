"""Keeps the predictions of all finished cells on the test split in one small file of the study directory.

predictions.npz has, for each cell, the most probable class of each test image and whether it is right. A report reads a
cell's own predictions_test.npz where there is one, and this file for other cells, so that a study can be analysed again
without the work directories of its cells.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt

from xception_jax.errors import BadDataError
from xception_jax.files import write_atomically
from xception_jax.metrics.predictions import Predictions, load_predictions
from xception_jax.study.cells import PREDICTIONS, Cell
from xception_jax.user_files import read_arrays, reading, writing

FILE = "predictions.npz"
_ARRAYS = ("arm", "seed", "index", "classes", "right")


@dataclasses.dataclass(frozen=True)
class Answers:
    """The predictions of one cell on the test split.

    Attributes:
      index: index of each image in the split.
      classes: the most probable class of each image.
      right: whether it is the label, or one of the labels.
    """

    index: UInt[np.ndarray, " images"]
    classes: UInt[np.ndarray, " images"]
    right: Bool[np.ndarray, " images"]


def read_answers(root: Path, cells: Iterable[Cell]) -> dict[tuple[str, int], Answers]:
    """Returns the predictions of the cells that have them, by arm and seed.

    Raises:
      BadDataError: a file of predictions is damaged, or two cells have predictions of different images.
    """
    kept = _read(root / FILE) if (root / FILE).exists() else {}
    found: dict[tuple[str, int], Answers] = {}
    for cell in cells:
        key, path = (cell.arm, cell.seed), cell.directory / PREDICTIONS
        answers = _answers(load_predictions(path)) if path.exists() else kept.get(key)
        if answers is not None:
            found[key] = answers
    first = next(iter(found.items()), None)
    for (arm, seed), each in found.items():
        if first and not np.array_equal(each.index, first[1].index):
            other = f"{first[0][0]} seed {first[0][1]}"
            what = f"the predictions of {arm} seed {seed} are of other images than those of {other}"
            raise BadDataError(what, str(root), "train all cells on the same test split")
    return found


def write_answers(root: Path, answers: Mapping[tuple[str, int], Answers]) -> None:
    """Adds the predictions of cells to the file; those of other cells are kept. Without any, writes nothing.

    Raises:
      BadDataError: the file is damaged.
      StorageError: it could not be written.
    """
    if not answers:
        return
    index = next(iter(answers.values())).index
    kept = _read(root / FILE) if (root / FILE).exists() else {}
    same = {key: each for key, each in kept.items() if np.array_equal(each.index, index)}
    answers = {**answers, **{key: each for key, each in same.items() if key not in answers}}
    classes = np.stack([each.classes for each in answers.values()])
    arrays: dict[str, Any] = {
        "arm": np.array([arm for arm, _ in answers]),
        "seed": np.array([seed for _, seed in answers]),
        "index": index.astype(np.uint32),
        "classes": classes.astype(np.min_scalar_type(classes.max(initial=0))),
        "right": np.packbits([each.right for each in answers.values()], axis=1),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    with writing("file of predictions", root / FILE):
        write_atomically(root / FILE, buffer.getvalue())


def _answers(predictions: Predictions) -> Answers:
    order = np.argsort(predictions.index, kind="stable")
    best = predictions.classes[:, 0].astype(np.uint32)
    return Answers(predictions.index[order].astype(np.uint32), best[order], predictions.right[order])


def _read(path: Path) -> dict[tuple[str, int], Answers]:
    with reading("file of predictions", path, "delete it; `study report` writes it again from the cells"):
        arrays = read_arrays(path, list(_ARRAYS), [])
        index, classes = arrays["index"], arrays["classes"]
        cells, images = classes.shape
        right = np.unpackbits(arrays["right"], axis=1, count=images).astype(bool)
        if not len(arrays["arm"]) == len(arrays["seed"]) == len(right) == cells or index.shape != (images,):
            raise ValueError("the arrays do not fit each other")
        keys = zip(map(str, arrays["arm"]), map(int, arrays["seed"]), strict=True)
        return {key: Answers(index, classes[row], right[row]) for row, key in enumerate(keys)}
