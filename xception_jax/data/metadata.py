"""Opens the description of a TFDS dataset that may come from an untrusted source.

TFDS trusts these files: it imports the module of every feature that features.json names, writes out as many class names
as it says, and formats file names with it. What is checked here is therefore checked before TFDS reads it.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from xception_jax.errors import BadDataError
from xception_jax.names import one_line
from xception_jax.user_files import parse_json, read_bytes, read_text

INFO, FEATURES = "dataset_info.json", "features.json"
MAX_CLASSES = 1 << 20
MAX_BYTES = 64 << 20
"""Limit for each of the files; those of ImageNet have 10 kB."""

_MAX_EXAMPLES = 1 << 48  # of a split
_FEATURE_CLASSES = "tensorflow_datasets.core.features."
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
_SHARD = r"\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\}"
_TEMPLATE = re.compile(rf"(?:[\w.-]|{_SHARD}){{0,200}}")
_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f]{0,200}")  # becomes part of a path
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FIX = "copy or prepare the dataset again"


def open_builder(directory: Path) -> tfds.core.DatasetBuilder:
    """Opens a dataset from its description.

    Args:
      directory: the directory of one version of the dataset.

    Raises:
      BadDataError: the description is damaged, names code outside of TFDS, files outside of the directory
        or too many classes, or a class has no valid name.
    """
    info, features = _load(directory / INFO), _load(directory / FEATURES)
    _check_info(info, directory / INFO)
    for value in (info, features):
        _check_classes(value, directory)
    for path in directory.glob("*.labels.txt"):
        _check_names_file(path)
    try:
        builder = tfds.builder_from_directory(os.fspath(directory))
        if isinstance(builder.info.features, tfds.features.FeaturesDict):
            check_features(builder.info.features, str(directory))
        return builder
    except (BadDataError, MemoryError):
        raise
    except Exception as error:  # TFDS, protobuf and numpy raise many types for descriptions that do not fit together
        what = f"the description of the dataset cannot be read: {type(error).__name__}: {_one_line(error)}"
        raise BadDataError(what, str(directory), _FIX) from error


def _load(path: Path) -> dict[str, Any]:
    try:
        content = read_bytes(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise BadDataError(f"the file cannot be read: {_reason(error)}", str(path), _FIX) from None
    try:
        return parse_json(content, dict)
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"the file is not valid JSON: {_one_line(error)}", str(path), _FIX) from None


def _reason(error: OSError | ValueError) -> str:
    return _one_line(getattr(error, "strerror", None) or error)


def _check_names_file(path: Path) -> None:
    """Raises BadDataError for a file of class names that TFDS would silently ignore."""
    try:
        read_text(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise BadDataError(f"the names of the classes cannot be read: {_reason(error)}", str(path), _FIX) from None


def _check_info(info: dict[str, Any], path: Path) -> None:
    """Raises BadDataError for numbers of examples and names of files that cannot be."""
    splits = info.get("splits", [])
    try:
        names = [*_spellings(info, "configName"), *(split.get("name", "") for split in splits)]
        for name in (info.get("name", ""), *names):
            if not _NAME.fullmatch(name):
                raise ValueError(f"a name is {_short(name)}")
        if any(split.get("name") == "all" for split in splits):
            raise ValueError("a split is called 'all', which stands for all splits")
        for split in splits:
            for template in _spellings(split, "filepathTemplate"):
                if not _TEMPLATE.fullmatch(template):
                    raise ValueError(f"filepathTemplate is {_short(template)}")
            lengths = [int(length) for found in _spellings(split, "shardLengths") for length in found]
            if min(lengths, default=0) < 0 or sum(lengths) > _MAX_EXAMPLES:
                raise ValueError(
                    f"the split {split.get('name')} has shards of {min(lengths)} to {max(lengths)} examples"
                )
    except (ValueError, TypeError, AttributeError) as error:
        raise BadDataError(f"the description of the dataset is damaged: {_one_line(error)}", str(path), _FIX) from None


def _spellings(fields: dict[str, Any], name: str) -> list[Any]:
    """Returns the values of a field. TFDS also reads it under the name that it has in the protocol buffer."""
    other = re.sub(r"[A-Z]", lambda capital: f"_{capital[0].lower()}", name)
    return [fields[key] for key in (name, other) if key in fields]


def _check_classes(value: dict[str, Any], directory: Path) -> None:
    """Raises BadDataError if a feature is implemented outside of TFDS: reading it would import a module by name."""
    for key, name in _pairs(value):
        if key in _CLASS_KEYS and "." in name and not name.startswith(_FEATURE_CLASSES):
            what = f"the dataset has a feature of the class {_short(name)}, which is not one of TFDS"
            fix = "write the dataset again with features of tensorflow_datasets; others would run code"
            raise BadDataError(what, str(directory / FEATURES), fix)


def _pairs(value: Any) -> Iterator[tuple[str, str]]:
    """Yields (key, text) of all objects in a JSON value. (`parse_json` has bounded its depth.)"""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str):
                yield key, inner
            yield from _pairs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner)


def check_class_names(names: Sequence[str], where: str) -> None:
    r"""Checks that every class has a name that is one line of text.

    TFDS keeps the names of classes as the lines of a file, so a name with a newline would shift all names after it.

    Args:
      names: the names.
      where: the file or folder that they come from.

    Raises:
      BadDataError: a name is empty, has a control character or is not valid text; or two names look the same.
    """
    for name in names:
        if not name.strip() or _CONTROL.search(name):
            what = f"the class name {_short(name)} is empty, has control characters or is not UTF-8"
            raise BadDataError(what, where, "rename the class: a name is one line of text")
    seen: dict[str, str] = {}
    for name in map(str.strip, names):  # TFDS strips the lines when it reads them
        other = seen.get(as_shown(name))
        if other is not None:
            what = f"two classes have the name {_short(name)}"
            if other != name:
                what = f"two classes have names that look the same: {other!a} and {name!a}"
            raise BadDataError(what, where, "rename one of them")
        seen[as_shown(name)] = name


def as_shown(name: str) -> str:
    """Returns a name without format characters, in normal form C. Names that are then equal look the same."""
    if name.isascii():
        return name
    visible = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFC", visible)


def check_features(features: tfds.features.FeaturesDict, where: str) -> None:
    """Checks the number and the names of all classes.

    Raises:
      BadDataError: there are too many, or `check_class_names` refuses a name.
    """
    for feature in features.values():
        label = getattr(feature, "feature", feature)  # of a sequence
        if isinstance(label, tfds.features.FeaturesDict):
            check_features(label, where)
        elif isinstance(label, tfds.features.ClassLabel) and label.num_classes is not None:
            if not 0 <= label.num_classes <= MAX_CLASSES:
                what = f"the dataset has {label.num_classes:,} classes; the limit is {MAX_CLASSES:,}"
                raise BadDataError(what, where, "correct the number of classes")
            if len(label.names) != label.num_classes:
                what = f"the dataset has {label.num_classes:,} classes but {len(label.names):,} names of classes"
                raise BadDataError(what, where, "a name with a newline counts twice: prepare the dataset again")
            check_class_names(label.names, where)


def _short(name: Any) -> str:
    """Returns a name in quotes, with control characters and what is not text escaped."""
    return ascii(name) if _CONTROL.search(str(name)) else repr(name)[:200]


def _one_line(error: BaseException) -> str:
    return ascii(one_line(error))[1:-1][:300]
