"""Reads the `config.json` that the Hugging Face hub stores beside a file of timm."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from xception_jax.data.images import Preprocessing
from xception_jax.weights import guard

WEIGHTS = "model.safetensors"  # beside the config
_INTERPOLATIONS = {"bilinear": "antialiased_bilinear", "bicubic": "antialiased_bicubic"}


def _side(input_size: Any) -> int:
    _, height, width = input_size
    if height != width:
        raise ValueError("our images are square")
    return height


# Our field and its value, by the field of the hub.
_FIELDS = {
    "input_size": ("size", _side),
    "crop_pct": ("crop", lambda crop: crop),
    "interpolation": ("interpolation", lambda name: _INTERPOLATIONS[name]),
    "mean": ("mean", lambda mean: mean),
    "std": ("std", lambda std: std),
}


def describe(
    path: Path, default: Preprocessing, num_classes: int
) -> tuple[Preprocessing, tuple[str, ...] | None, list[str]]:
    """Returns preprocessing and class names from a `config.json`, and notes about what it asks for in vain.

    Args:
      path: of the `config.json`, which may be missing.
      default: used for what the file does not specify.
      num_classes: of the classifier, 0 without one.
    """
    described = read(path)
    if described is None:
        return default, None, []
    given, preprocessing, notes = described["pretrained_cfg"], default, []
    for theirs, (ours, convert) in _FIELDS.items():
        if theirs in given:
            try:
                changed = {ours: convert(given[theirs])}
                preprocessing = Preprocessing.from_fields(dataclasses.asdict(preprocessing) | changed)
            except (ValueError, TypeError, KeyError):
                used = getattr(default, ours)
                notes.append(f"{theirs} {given[theirs]!r} in {path.name} is not supported; using {used}")
    if given.get("crop_mode", "center") != "center":
        notes.append(f"crop_mode {given['crop_mode']!r} in {path.name} is not supported; using the center")
    names = described.get("label_names")
    if not isinstance(names, list) or not num_classes:
        return preprocessing, None, notes
    if len(names) == num_classes:
        return preprocessing, tuple(map(str, names)), notes
    notes.append(f"{path.name} names {len(names)} classes, the classifier has {num_classes}; the names are left out")
    return preprocessing, None, notes


def read(path: Path) -> dict[str, Any] | None:
    """Returns the content of a `config.json` of timm, or None if there is none."""
    try:
        described = json.loads(path.read_text()) if path.stat().st_size <= guard.SMALL else None
    except (OSError, ValueError, RecursionError):
        return None
    is_timm = isinstance(described, dict) and isinstance(described.get("pretrained_cfg"), dict)
    return described if is_timm else None
