"""Reads the layers of a Keras file in any format, in the order of `model.layers`.

There are three formats. A legacy `.h5` of Keras 1 and 2 lists its layers in the attributes `layer_names` and
`weight_names`; a nested model is a single entry with all its tensors in a row. A `.weights.h5` of Keras 3 (and of
TensorFlow from 2.12 on) is a tree of groups named by class and position, 'layers/functional/layers/conv2d_3/vars/0'. A
`.keras` archive holds such a file and the architecture as JSON.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import h5py
import ml_dtypes
import numpy as np

from xception_jax.errors import BadDataError
from xception_jax.weights import guard
from xception_jax.weights.keras_architecture import LayerConfig
from xception_jax.weights.keras_layers import BACKBONE, KerasLayer, natural, of_kind

FileLayer: TypeAlias = KerasLayer[h5py.Dataset]
_WEIGHT_NAME = re.compile(
    r"(.+?)[/_](depthwise_kernel|pointwise_kernel|kernel|bias|gamma|beta|moving_mean|moving_variance|running_mean|"
    r"running_std|W|b|mean|variance|count)(?:_\d+)?(?::0)?"
)
_RUNNING_AVERAGES = ("moving_mean", "moving_variance", "running_mean", "running_std")
# Groups that compiling a model adds, at any depth. In a list of layers, the same name is the class of a layer.
_TRAINING_STATE = re.compile(
    r"(?<!/layers)(?<!/_layer_checkpoint_dependencies)/(optimizer|optimizer_weights|metrics)(/|$)"
)


class Submodel(NamedTuple):
    """The layers of the outermost model, whose name is '', or of a model nested in it."""

    name: str
    layers: list[FileLayer]  # in the order of `model.layers`; in a tree, only layers of one kind are in order
    splits: Sequence[list[list[FileLayer]]] = ()  # how a row of tensors may divide into trainable and other layers


class KerasFile(NamedTuple):
    """An open Keras file. Tensors are read on demand."""

    submodels: list[Submodel]
    architecture: LayerConfig  # of the outermost model; without layers if the file has none


@contextlib.contextmanager
def open_keras(path: Path) -> Iterator[KerasFile]:
    """Opens a Keras file of any format; `BadDataError` if it is damaged, refused or not written by Keras."""
    if guard.container_format(path) == "zip":
        with guard.open_archive(path) as archive:
            architecture = _architecture(guard.read_member(archive, "config.json"), path)
            with guard.extracted(archive, "model.weights.h5") as inner, guard.open_hdf5(inner, path) as hdf5:
                yield KerasFile(_read_tree(hdf5), architecture)
        return
    with guard.open_hdf5(path) as hdf5:
        root = hdf5.child(hdf5.file, "model_weights") if "model_weights" in hdf5.file else hdf5.file
        names = hdf5.texts(root, "layer_names")
        if names is None:
            yield KerasFile(_read_tree(hdf5), _architecture("{}", path))
        else:
            [text, *_] = hdf5.texts(hdf5.file, "model_config") or ["{}"]
            yield KerasFile(_read_legacy(hdf5, root, names), _architecture(text, path))


def read(tensor: h5py.Dataset) -> np.ndarray:
    """Reads a tensor in its own dtype. HDF5 lacks bfloat16: Keras writes it as plain bytes or marks it."""
    value = tensor[()]
    if value.dtype == guard.TWO_BYTES:
        return value.view(ml_dtypes.bfloat16)
    return value.astype(ml_dtypes.bfloat16) if tensor.attrs.get("dtype") == "bfloat16" else value


def _architecture(text: str | bytes, path: Path) -> LayerConfig:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise guard.damaged(path, error) from None
    if not isinstance(config, dict):
        raise BadDataError("the architecture in the file is not a JSON object", str(path), guard.COPY_AGAIN)
    return LayerConfig.from_json(config)


def _layer(path: str, tensors: Sequence[h5py.Dataset], keras_name: object) -> FileLayer | None:
    """Returns a layer, or None if it holds only the state of a random number generator, as dropout does."""
    if all(tensor.dtype.kind in "iu" for tensor in tensors):
        return None
    shapes = tuple(tensor.shape for tensor in tensors)
    return KerasLayer(path, tuple(tensors), shapes, keras_name if isinstance(keras_name, str) else "")


def _read_tree(hdf5: guard.Hdf5Guard) -> list[Submodel]:
    submodels: dict[str, list[FileLayer]] = {}
    for path, group, arrays in hdf5.walk(hdf5.file, lambda path: bool(_TRAINING_STATE.search(f"/{path}"))):
        owner, _, last = path.rpartition("/")
        tensors = [arrays[key] for key in sorted(arrays, key=natural)]
        if last == "vars" and (layer := _layer(owner or last, tensors, group.attrs.get("name"))):
            submodels.setdefault(owner.rpartition("/")[0], []).append(layer)
    return [Submodel(name, sorted(layers, key=lambda layer: natural(layer.name))) for name, layers in submodels.items()]


def _read_legacy(hdf5: guard.Hdf5Guard, root: h5py.Group, names: Sequence[str]) -> list[Submodel]:
    outermost: list[FileLayer] = []
    nested: dict[str, Submodel] = {}
    for name in names:
        group = hdf5.child(root, name)
        weights = hdf5.texts(group, "weight_names") or []
        tensors = [hdf5.child(group, weight) for weight in weights]
        matches = [_WEIGHT_NAME.fullmatch(weight) for weight in weights]
        owners = [match[1] if match else name for match in matches]
        if len(set(owners)) > 1:
            nested[name] = _read_row(name, owners, tensors, [bool(m and m[2] in _RUNNING_AVERAGES) for m in matches])
        elif layer := _layer(name, tensors, name):
            outermost.append(layer)
    return [submodel for submodel in (Submodel("", outermost), *nested.values()) if submodel.layers]


def _read_row(name: str, owners: list[str], tensors: list[h5py.Dataset], is_average: list[bool]) -> Submodel:
    """Returns a nested model. Its tensors are in a row: first the trainable ones, then all others.

    Both parts are in the order of the layers, but if some layers are frozen, neither part has all layers. The start of
    the second part is not marked. It contains all running averages (`is_average`), so at most kernel, gamma and beta of
    the first layer precede the first average in it. `owners` are the names of the tensors' layers.
    """
    grouped: dict[str, list[h5py.Dataset]] = {}
    for owner, tensor in zip(owners, tensors, strict=True):
        grouped.setdefault(owner, []).append(tensor)
    found = {owner: _layer(f"{name}/{owner}", own, owner.rpartition("/")[2]) for owner, own in grouped.items()}
    layers = {owner: layer for owner, layer in found.items() if layer}
    first = is_average.index(True) if any(is_average) else 0
    splits = []
    for start in range(first, max(first - 4, -1), -1):
        parts = (dict.fromkeys(owners[:start]), dict.fromkeys(owners[start:]))
        splits.append([of_kind([layers[owner] for owner in part if owner in layers], *BACKBONE) for part in parts])
    return Submodel(name, list(layers.values()), splits)
