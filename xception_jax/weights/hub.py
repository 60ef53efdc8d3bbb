"""Reads the `config.json` that the Hugging Face hub stores beside a file of timm."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path
from typing import Any

from xception_jax.data.images import Preprocessing
from xception_jax.errors import BadDataError, UserError
from xception_jax.user_files import read_json
from xception_jax.weights.network import both_names, described_preprocessing

_MAX_BYTES = 1 << 20
_INTERPOLATIONS = {"bilinear": "antialiased_bilinear", "bicubic": "antialiased_bicubic"}
_FIELDS = {"input_size": "size", "crop_pct": "crop", "interpolation": "interpolation", "mean": "mean", "std": "std"}


def describe(
    path: Path, name: str, default: Preprocessing, num_classes: int
) -> tuple[Preprocessing, tuple[str, ...] | None, list[str]]:
    """Returns preprocessing and class names from a `config.json`, which may be missing, and notes.

    `name` is the network in the file beside it, 'xception' or 'inception_v3'; a description of another one is not used.
    `default` is used for what is not specified. A network without a classifier has 0 classes.

    Raises:
      BadDataError: its classifier follows another pooling than the average.
    """
    described, unread = _read(path)
    if described is None:
        return default, None, unread
    architecture = described.get("architecture", described["pretrained_cfg"].get("architecture", name))
    if name.split("_")[0] not in str(architecture).lower():
        return default, None, [f"{path.name} is not used, because it describes {_short(architecture)}, not {name}"]
    given, preprocessing, notes = described["pretrained_cfg"], default, []
    for theirs, ours in _FIELDS.items():
        if theirs not in given:
            continue
        value = given[theirs]
        try:
            if theirs == "interpolation":
                value = _INTERPOLATIONS[value]
            elif theirs == "input_size":
                _, height, value = value
                if height != value:
                    raise ValueError("our images are square")
            preprocessing = described_preprocessing(preprocessing.to_fields() | {ours: value})
        except (ValueError, TypeError, KeyError, OverflowError):
            used = getattr(default, ours)
            notes.append(f"{theirs} {_short(given[theirs])} in {path.name} is not supported; using {used}")
    if given.get("crop_mode", "center") != "center":
        notes.append(f"crop_mode {_short(given['crop_mode'])} in {path.name} is not supported; using the center")
    pool = described.get("global_pool", given.get("global_pool")) or "avg"
    if num_classes and pool not in ("avg", "fast"):
        fix = "train a classifier on average pooling instead"
        raise BadDataError(f"the classifier follows {_short(pool)} pooling, not average pooling", str(path), fix)
    names = described.get("label_names") or given.get("label_names")
    if isinstance(names, dict):  # by the number of the class, as text
        names = [names.get(str(number), f"class {number}") for number in range(num_classes)]
    if not isinstance(names, list) or not num_classes:
        return preprocessing, None, notes
    if num_classes == 1 and len(names) in (1, 2):  # one logit, of the second of two classes
        return preprocessing, both_names(list(map(str, names))), notes
    if len(names) == num_classes:
        return preprocessing, tuple(map(str, names)), notes
    notes.append(f"{path.name} names {len(names)} classes, the classifier has {num_classes}; the names are left out")
    return preprocessing, None, notes


def _short(value: Any) -> str:
    return reprlib.repr(value)


def read(path: Path) -> dict[str, Any] | None:
    """Returns the content of a `config.json` of timm, or None if there is none."""
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns what `read` does, and a note on a file that cannot be read: its preprocessing and classes are guessed."""
    if not os.path.lexists(path):
        return None, []
    try:
        described = read_json(path, dict, limit=_MAX_BYTES)
    except (OSError, ValueError, UserError) as error:
        reason = error.what if isinstance(error, UserError) else str(error)
        return None, [f"{path.name} is not used, because it cannot be read: {reason}"]
    if "pretrained_cfg" not in described and "architecture" in described:  # of older versions of timm, which were flat
        described = {"pretrained_cfg": described, "label_names": described.get("labels")}
    return (described if isinstance(described.get("pretrained_cfg"), dict) else None), []
