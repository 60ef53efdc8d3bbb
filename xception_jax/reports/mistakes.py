"""Prepares the mistakes of a classifier for the report: confusion matrix, pairs, precisions, and cards with images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from xception_jax.data.images import thumbnail
from xception_jax.metrics.predictions import (
    Predictions,
    class_average_precision,
    confusion_matrix,
    expected_calibration_error,
    most_confused,
)
from xception_jax.names import printable, printable_path

MAX_CELL_IMAGES = 6  # of one cell of the confusion matrix
MAX_IMAGES = 150  # of all cells: about 1 MB
_MAX_CLASSES = 30  # a larger confusion matrix is not readable
_MAX_ROWS = 20
THUMBNAIL = 160  # pixels

Cell = tuple[int, int]  # label and predicted class


def choose_examples(predictions: Predictions, count: int = 12) -> tuple[list[int], list[int]]:
    """Returns the indices of the examples in a report: an even sample, and the most confident mistakes."""
    number = min(count, len(predictions.index))
    sample = np.linspace(0, len(predictions.index), number, endpoint=False).astype(int)
    wrong = np.flatnonzero(predictions.labelled & ~predictions.right)
    surest = wrong[np.argsort(-predictions.probabilities[wrong, 0], kind="stable")][:count]
    return predictions.index[sample].tolist(), predictions.index[surest].tolist()


def choose_cells(predictions: Predictions, num_classes: int) -> dict[Cell, list[int]]:
    """Returns the indices of the images of each cell of the confusion matrix, the most confident first.

    If there are too many classes for a matrix, there are only the pairs that the report lists. There are up to
    `MAX_CELL_IMAGES` of a cell and `MAX_IMAGES` in all. Every cell gets its first image before any gets its second,
    and mistakes come before correct predictions.
    """
    if predictions.multi_label:
        return {}
    shown = None
    if num_classes > _MAX_CLASSES:
        shown = {(label, wrong) for label, wrong, _ in most_confused(predictions, _MAX_ROWS)}
    ranked: list[tuple[bool, int, int, Cell, int]] = []
    seen: dict[Cell, int] = {}
    for i in np.argsort(-predictions.probabilities[:, 0], kind="stable").tolist():
        cell = int(predictions.label[i]), int(predictions.classes[i, 0])
        seen[cell] = seen.get(cell, 0) + 1
        if seen[cell] <= MAX_CELL_IMAGES and (shown is None or cell in shown):
            ranked.append((cell[0] == cell[1], seen[cell], len(ranked), cell, int(predictions.index[i])))
    cells: dict[Cell, list[int]] = {}
    for *_, cell, index in sorted(ranked)[:MAX_IMAGES]:
        cells.setdefault(cell, []).append(index)
    return cells


def _with_labels(predictions: Predictions) -> Predictions:
    """Returns the predictions for the images that have labels."""
    kept = {
        name: getattr(predictions, name)[predictions.labelled]
        for name in ("index", "label", "classes", "probabilities")
    }
    return Predictions(**kept)


def errors_context(predictions: Predictions, names: list[str]) -> dict[str, Any]:
    """Returns the errors by class: a confusion matrix, the most confused pairs, or average precisions."""
    n, right = int(predictions.labelled.sum()), int(predictions.right.sum())
    errors: dict[str, Any] = {"n": n, "right": right, "share": right / n if n else math.nan, "depth": 0}
    if predictions.multi_label:
        precisions, counts = class_average_precision(_with_labels(predictions)), predictions.label.sum(axis=0)
        order = [int(c) for c in np.argsort(-np.nan_to_num(precisions, nan=-1), kind="stable") if counts[c]]
        shown = order if len(order) <= _MAX_CLASSES else order[: _MAX_ROWS // 2] + order[-_MAX_ROWS // 2 :]
        rows = [(names[c], int(counts[c]), float(precisions[c])) for c in shown]
        return errors | {
            "kind": "precision",
            "rows": rows,
            "classes": len(order),
            "depth": predictions.classes.shape[1],
            "all_classes": len(names),
        }
    errors["calibration"] = expected_calibration_error(predictions)
    if len(names) > _MAX_CLASSES:
        totals = np.bincount(predictions.label, minlength=len(names))
        pairs = [
            (names[a], names[b], k, k / totals[a], f"{a}-{b}") for a, b, k in most_confused(predictions, _MAX_ROWS)
        ]
        return errors | {"kind": "pairs", "rows": pairs}
    matrix = confusion_matrix(predictions, len(names))
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # Opacity of the cells. Mistakes are rare, and the square root makes them visible beside the diagonal.
    tints = np.where(np.eye(len(names), dtype=bool), shares, np.sqrt(shares)).round(3)
    cells = [list(zip(*row, strict=True)) for row in zip(matrix.tolist(), tints.tolist(), strict=True)]
    return errors | {"kind": "matrix", "rows": list(zip(names, cells, strict=True))}


class Cards:
    """Builds the cards of images: picture, heat map, best classes, label and file name.

    Args:
      predictions: the predictions.
      names: names of the classes.
      images: uint8 [h, w, 3] by index. Images that are not there have no card.
      heat_maps: uint8 [h, w, 3] by index, shown beside the images.
    """

    def __init__(
        self,
        predictions: Predictions,
        names: Sequence[str],
        images: Mapping[int, np.ndarray],
        heat_maps: Mapping[int, np.ndarray],
    ):
        self._predictions, self._names, self._images, self._heat_maps = predictions, names, images, heat_maps
        self._position = {int(index): i for i, index in enumerate(predictions.index)}

    def groups(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """Returns an even sample and the most confident mistakes, each with its heading."""
        sample, mistakes = choose_examples(self._predictions)
        groups = [("Most confident mistakes", mistakes), ("Even sample", sample)]
        return [(title, cards) for title, chosen in groups if (cards := self._cards(chosen))]

    def cells(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the cards of each cell of the confusion matrix, under 'label-predicted'."""
        chosen = choose_cells(self._predictions, len(self._names))
        found = {f"{a}-{b}": self._cards(indices) for (a, b), indices in chosen.items()}
        return {cell: cards for cell, cards in found.items() if cards}

    def _cards(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._card(index) for index in indices if index in self._images]

    def _card(self, index: int) -> dict[str, Any]:
        predictions, names, i = self._predictions, self._names, self._position[index]
        label = predictions.label[i]
        true = np.flatnonzero(label) if predictions.multi_label else [label]
        best = list(zip(predictions.classes[i], predictions.probabilities[i], strict=True))
        shown = best[:3] if predictions.multi_label else best[:1]
        heat_map = self._heat_maps.get(index)
        return {
            "index": index,
            "file": None if predictions.file_name is None else printable_path(str(predictions.file_name[i])),
            "group": None if predictions.group is None else printable(predictions.group[i]),
            "source": _data_uri(self._images[index]),
            "heat_map": None if heat_map is None else _data_uri(heat_map),
            "pixelated": max(self._images[index].shape[:2]) <= 64,
            "right": bool(predictions.right[i]),
            "label": ", ".join(names[int(c)] for c in true) or "no label",
            "guesses": [(names[c], float(p), c in true) for c, p in shown],
        }


def _data_uri(pixels: np.ndarray) -> str:
    """Returns an image for the `src` of an <img> element."""
    small = thumbnail(pixels, THUMBNAIL)
    kind = "png" if max(small.shape[:2]) <= 64 else "jpeg"  # JPEG makes photographs ten times smaller
    buffer = io.BytesIO()
    Image.fromarray(small).save(buffer, kind, **({} if kind == "png" else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
