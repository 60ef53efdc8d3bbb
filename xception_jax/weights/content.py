"""What a weight file contains, as plain data: names, arrays and texts, without objects of the library that read it.

`encode` and `decode` carry it from the process that reads a file to the one that uses it. Values are in a shared
buffer; both sides compute their places in it from types and shapes.
"""

from __future__ import annotations

import itertools
import json
import mmap
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from xception_jax.weights.limits import Limits, elements

Leaf = TypeVar("Leaf")
Buffer: TypeAlias = bytearray | mmap.mmap
Spec: TypeAlias = tuple[np.dtype, tuple[int, ...]]

_ALIGNMENT = 16  # as malloc's, and enough for every type
SAFETENSORS, LEGACY, TREE = "safetensors", "legacy", "tree"
ARCHITECTURE = "architecture"
# What the process that parses says before it begins, and the keys of an answer without content.
READY, MEMORY, ERROR = b"ready\n", "memory", "error"
BFLOAT16 = "bfloat16"  # NumPy lacks it


class Group(NamedTuple, Generic[Leaf]):
    """Arrays that a file keeps together: those of a Keras layer, or all of a safetensors file."""

    name: str  # its path in the file; '' for safetensors
    label: str  # the name that Keras gave to the layer, or '' if the file has none
    names: list[str]  # of the tensors
    tensors: list[Leaf]


class Content(NamedTuple, Generic[Leaf]):
    """What a weight file contains."""

    format: str  # SAFETENSORS; of Keras, LEGACY (groups are in the order of the layers) or TREE
    groups: list[Group[Leaf]]
    texts: dict[str, str]  # the metadata of safetensors; ARCHITECTURE of Keras, as JSON

    @property
    def tensors(self) -> dict[str, Leaf]:
        """The tensors by name; names are unique in safetensors."""
        return {name: tensor for group in self.groups for name, tensor in zip(group.names, group.tensors, strict=True)}


def dtype_of(name: str) -> np.dtype:
    """Returns a type by its name."""
    if name != BFLOAT16:
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def buffer_bytes(specs: Iterable[Spec]) -> int:
    """Returns the size of the buffer for arrays of these types and shapes."""
    return sum(_padded(*spec) for spec in specs)


def views(buffer: Buffer, specs: Sequence[Spec]) -> list[np.ndarray]:
    """Returns an array for each type and shape, one after another in the buffer."""
    places = itertools.accumulate((_padded(*spec) for spec in specs), initial=0)
    return [np.ndarray(shape, dtype, buffer, place) for place, (dtype, shape) in zip(places, specs, strict=False)]


def _padded(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return -(-elements(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def encode(content: Content[np.ndarray]) -> bytes:
    """Returns everything but the values as JSON."""
    groups = [
        (group.name, group.label, group.names, [_described(tensor) for tensor in group.tensors])
        for group in content.groups
    ]
    return json.dumps({"format": content.format, "groups": groups, "texts": content.texts}).encode()


def _described(tensor: np.ndarray) -> tuple[str, tuple[int, ...]]:
    return BFLOAT16 if tensor.dtype == dtype_of(BFLOAT16) else tensor.dtype.str, tensor.shape


def decode(answer: dict[str, Any], buffer: Buffer, limits: Limits) -> Content[np.ndarray]:
    """Reverses `encode`. The sender has read a stranger's file, so its answer is checked as well.

    Raises:
      ValueError, TypeError, KeyError, OverflowError: the answer is malformed, or does not fit the buffer.
    """
    texts = {_text(key): _text(value) for key, value in answer["texts"].items()}
    specs = [(_numeric(dtype), _shape(sides)) for *_, given in answer["groups"] for dtype, sides in given]
    if len(specs) > limits.objects or len(answer["groups"]) > limits.objects or buffer_bytes(specs) > len(buffer):
        raise ValueError("it does not fit the limits")
    tensors = iter(views(buffer, specs))
    groups = [
        Group(_text(name), _text(label), [_text(each) for each in names], list(itertools.islice(tensors, len(given))))
        for name, label, names, given in answer["groups"]
    ]
    if any(len(group.names) != len(group.tensors) for group in groups):
        raise ValueError("it does not name every array")
    return Content(_text(answer["format"]), groups, texts)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("it holds something else in place of a text")
    return value


def _numeric(name: str) -> np.dtype:
    dtype = dtype_of(name)
    if name != BFLOAT16 and (dtype.kind not in "fiub" or dtype.hasobject):
        raise ValueError("it holds arrays of something else than numbers")
    return dtype


def _shape(sides: Sequence[object]) -> tuple[int, ...]:
    shape = tuple(side for side in sides if isinstance(side, int) and side >= 0)
    if len(shape) != len(sides):
        raise ValueError("it holds a malformed shape")
    return shape
