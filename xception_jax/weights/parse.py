"""Parses weight files of any kind into plain data, in the process that calls it.

`isolation` calls it in a process of its own. Here only the checks and limits of `guard` protect from the file; nothing
protects from a fault in libhdf5. Every function raises only `UserError` or `MemoryError`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import h5py
import numpy as np
import safetensors

from xception_jax.errors import StorageError
from xception_jax.files import open_regular
from xception_jax.weights import guard
from xception_jax.weights.content import (
    ARCHITECTURE,
    BFLOAT16,
    LEGACY,
    SAFETENSORS,
    TREE,
    Buffer,
    Content,
    Group,
    buffer_bytes,
    dtype_of,
    views,
)
from xception_jax.weights.limits import Limits, elements

_SAFETENSORS_DTYPES = {"BOOL": "|b1", "U8": "|u1", "I8": "|i1", "BF16": BFLOAT16}
_SAFETENSORS_DTYPES |= {f"{kind.upper()}{8 * size}": f"<{kind}{size}" for kind in "iuf" for size in (2, 4, 8)}
# Groups that compiling a model adds, at any depth. In a list of layers, the same name is the class of a layer.
_TRAINING_STATE = re.compile(
    r"(?<!/layers)(?<!/_layer_checkpoint_dependencies)/(optimizer|optimizer_weights|metrics)(/|$)"
)


class _Unread(NamedTuple):
    """An array that was checked but not read."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], None]  # into an array of this type and shape


def parse_file(path: str | os.PathLike) -> Content[np.ndarray]:
    """Parses a weight file by its path, see `parse`.

    Raises:
      InputMissingError: there is no such file.
    """
    with open_regular(path) as file:
        return parse(file, os.fspath(path))


def parse(
    file: BinaryIO, where: str, limits: Limits | None = None, allocate: Callable[[int], Buffer] = bytearray
) -> Content[np.ndarray]:
    """Parses a weight file; its arrays are in one buffer.

    Args:
      file: a regular file.
      where: its path, for messages.
      limits: by default those for its size. Of them, memory and time are not enforced here.
      allocate: returns a buffer of some size.

    Raises:
      BadDataError: the file is damaged, refused or of an unknown kind.
      StorageError: it cannot be read or unpacked.
      MemoryError: there is not enough memory.
    """
    limits = limits or Limits.of(os.fstat(file.fileno()).st_size)
    with _FORMATS[guard.container_format(file, where)](file, where, limits) as content:
        unread = [tensor for group in content.groups for tensor in group.tensors]
        specs = [(tensor.dtype, tensor.shape) for tensor in unread]
        total = buffer_bytes(specs)
        if total > limits.tensors:
            raise guard.over_limit(where, f"its tensors take {total:,} bytes, more than {limits.tensors:,}")
        arrays = views(allocate(max(1, total)), specs)
        for tensor, array in zip(unread, arrays, strict=True):
            if array.size:
                tensor.read(array)
    rest = iter(arrays)
    groups = [Group(name, label, names, [next(rest) for _ in names]) for name, label, names, _ in content.groups]
    return Content(content.format, groups, content.texts)


@contextlib.contextmanager
def _open_safetensors(file: BinaryIO, where: str, limits: Limits) -> Iterator[Content[_Unread]]:
    """Opens a safetensors file. The library checks the header: shapes, overlaps, gaps."""
    file.seek(0)
    header = int.from_bytes(file.read(8), "little")
    if header > limits.text:
        raise guard.over_limit(where, f"its header takes {header:,} bytes, more than {limits.text:,}")
    path = guard.path_of(file, where)
    if path is None:
        raise StorageError("the file was replaced while it was read", where, "try again")
    try:
        with safetensors.safe_open(path, framework="numpy", backend="pread") as opened:
            names = list(opened.keys())
            if len(names) > limits.objects:
                raise guard.over_limit(where, f"it holds more than {limits.objects:,} objects")
            tensors = [_safetensor(opened, name, where) for name in names]
            yield Content(SAFETENSORS, [Group("", "", names, tensors)], dict(opened.metadata() or {}))
    except (safetensors.SafetensorError, *guard.READ_ERRORS) as error:
        raise guard.damaged(where, error) from None


def _safetensor(opened: safetensors.safe_open, name: str, where: str) -> _Unread:
    stored = opened.get_slice(name)
    dtype, shape = stored.get_dtype(), tuple(stored.get_shape())
    if dtype not in _SAFETENSORS_DTYPES:
        raise guard.refused(where, f"{name} has the type {dtype}", "save its tensors as float32 or bfloat16")
    if 0 in shape and elements(shape) > guard.SMALL:
        raise guard.refused(where, f"{name} is empty, and its shape is {shape}", "save it without this tensor")

    def read(array: np.ndarray) -> None:
        array[...] = opened.get_tensor(name)

    return _Unread(dtype_of(_SAFETENSORS_DTYPES[dtype]), shape, read)


@contextlib.contextmanager
def _open_archive(file: BinaryIO, where: str, limits: Limits) -> Iterator[Content[_Unread]]:
    """Opens a `.keras` archive, which holds a tree in HDF5 and the architecture as JSON."""
    with guard.open_archive(file, where, limits) as archive:
        architecture = guard.read_member(archive, "config.json", where, limits).decode()
        with guard.extracted(archive, "model.weights.h5", where, limits) as inner:
            with guard.open_hdf5(inner, where, limits) as hdf5:
                yield Content(TREE, _tree(hdf5), {ARCHITECTURE: architecture})


@contextlib.contextmanager
def _open_hdf5(file: BinaryIO, where: str, limits: Limits) -> Iterator[Content[_Unread]]:
    """Opens a legacy `.h5`, which lists its layers in attributes, or a `.weights.h5`, which is a tree of groups."""
    with guard.open_hdf5(file, where, limits) as hdf5:
        root = hdf5.child(hdf5.file, "model_weights") if "model_weights" in hdf5.file else hdf5.file
        names = hdf5.texts(root, "layer_names")
        if names is None:
            yield Content(TREE, _tree(hdf5), {})
            return
        if hdf5.label(root, "backend") == "theano":
            fix = "load it in Keras 2 with TensorFlow, which turns the kernels, and save it again"
            raise guard.refused(where, "it was written with Theano, whose convolutions flip their kernels", fix)
        architecture = hdf5.texts(hdf5.file, "model_config")
        texts = {ARCHITECTURE: architecture[0]} if architecture else {}
        yield Content(LEGACY, [_legacy_layer(hdf5, hdf5.child(root, name), name) for name in names], texts)


def _tree(hdf5: guard.Hdf5Guard) -> list[Group[_Unread]]:
    groups = []
    for path, group, arrays in hdf5.walk(hdf5.file, lambda path: bool(_TRAINING_STATE.search(f"/{path}"))):
        owner, _, last = path.rpartition("/")
        if last == "vars":
            unread = [_hdf5_tensor(hdf5, dataset) for dataset in arrays.values()]
            groups.append(Group(owner or last, hdf5.label(group, "name"), list(arrays), unread))
    return groups


def _legacy_layer(hdf5: guard.Hdf5Guard, group: h5py.Group | h5py.Dataset, name: str) -> Group[_Unread]:
    weights = hdf5.texts(group, "weight_names") or []
    return Group(name, name, weights, [_hdf5_tensor(hdf5, hdf5.child(group, weight)) for weight in weights])


def _hdf5_tensor(hdf5: guard.Hdf5Guard, dataset: h5py.Group | h5py.Dataset) -> _Unread:
    """Returns a tensor in its own type. HDF5 lacks bfloat16: Keras writes it as plain bytes or marks it."""
    if not isinstance(dataset, h5py.Dataset):
        raise guard.refused(hdf5.where, f"{dataset.name} is a group where an array should be")
    if dataset.dtype == guard.TWO_BYTES:
        return _Unread(dtype_of(BFLOAT16), dataset.shape, lambda array: dataset.read_direct(array.view("V2")))
    if hdf5.label(dataset, "dtype") == BFLOAT16:

        def read(array: np.ndarray) -> None:
            array[...] = dataset[()].astype(array.dtype)

        return _Unread(dtype_of(BFLOAT16), dataset.shape, read)
    return _Unread(dataset.dtype, dataset.shape, dataset.read_direct)


_FORMATS = {"safetensors": _open_safetensors, "zip": _open_archive, "hdf5": _open_hdf5}
