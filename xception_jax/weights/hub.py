"""The `config.json` that the Hugging Face hub has beside a file of timm."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from xception_jax.data.images import Preprocessing
from xception_jax.weights import guard

WEIGHTS = "model.safetensors"  # beside the description
_INTERPOLATIONS = {"bilinear": "antialiased_bilinear", "bicubic": "antialiased_bicubic"}
_FIELDS = {"input_size": "size", "crop_pct": "crop", "interpolation": "interpolation", "mean": "mean", "std": "std"}


def describe(
    path: Path, default: Preprocessing, num_classes: int
) -> tuple[Preprocessing, tuple[str, ...] | None, list[str]]:
    """Returns the preprocessing that a description gives, the names of the classes, and notes of what is not taken.

    Args:
      path: of the description; there may be none.
      default: what the description does not give.
      num_classes: of the classifier, 0 without one.
    """
    described = read(path)
    if described is None:
        return default, None, []
    given, notes = described["pretrained_cfg"], []
    fields: dict[str, Any] = dataclasses.asdict(default)
    for theirs, ours in _FIELDS.items():
        if theirs in given:
            try:
                value = {ours: _value(theirs, given[theirs])}
                Preprocessing.from_fields(value)
                fields |= value
            except (ValueError, TypeError, KeyError):
                notes.append(f"{theirs} {given[theirs]!r} in {path.name} is not supported: {fields[ours]} is taken")
    if given.get("crop_mode", "center") != "center":
        notes.append(f"crop_mode {given['crop_mode']!r} in {path.name} is not supported: the center is taken")
    names = described.get("label_names")
    if not isinstance(names, list) or not num_classes:
        return Preprocessing.from_fields(fields), None, notes
    if len(names) == num_classes:
        return Preprocessing.from_fields(fields), tuple(map(str, names)), notes
    notes.append(f"{path.name} names {len(names)} classes, the classifier has {num_classes}: the names are left out")
    return Preprocessing.from_fields(fields), None, notes


def read(path: Path) -> dict[str, Any] | None:
    """Returns what is described; None if it is not there, or something else."""
    try:
        described = json.loads(path.read_text()) if path.stat().st_size <= guard.SMALL else None
    except (OSError, ValueError, RecursionError):
        return None
    found = isinstance(described, dict) and isinstance(described.get("pretrained_cfg"), dict)
    return described if found else None


def _value(name: str, value: Any) -> Any:
    if name == "interpolation":
        return _INTERPOLATIONS[value]
    if name == "input_size":
        _, height, width = value
        if height != width:
            raise ValueError("ours are square")
        return height
    return value
