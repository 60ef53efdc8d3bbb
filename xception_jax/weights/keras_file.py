"""Reads the layers of a Keras file in any format, in the order of `model.layers`.

There are three formats. A legacy `.h5` of Keras 1 and 2 lists its layers in the attributes `layer_names` and
`weight_names`; a nested model is a single entry with all its tensors in a row. A `.weights.h5` of Keras 3 (and of
TensorFlow from 2.12 on) is a tree of groups named by class and position, 'layers/functional/layers/conv2d_3/vars/0'. A
`.keras` archive holds such a file and the architecture as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np

from xception_jax.errors import BadDataError
from xception_jax.weights import guard
from xception_jax.weights.keras_architecture import LayerConfig
from xception_jax.weights.keras_layers import Shape, kind_of, natural

_WEIGHT_NAME = re.compile(
    r"(.+?)[/_](depthwise_kernel|pointwise_kernel|kernel|bias|gamma|beta|moving_mean|moving_variance|running_mean|"
    r"running_std|W|b|mean|variance|count)(?:_\d+)?(?::0)?"
)
_RUNNING_AVERAGES = ("moving_mean", "moving_variance", "running_mean", "running_std")
# Groups that compiling a model adds, at any depth. In a list of layers, the same name is the class of a layer.
_TRAINING_STATE = re.compile(
    r"(?<!/layers)(?<!/_layer_checkpoint_dependencies)/(optimizer|optimizer_weights|metrics)(/|$)"
)


@dataclasses.dataclass(frozen=True)
class FileLayer:
    """A layer with tensors in a Keras file.

    Attributes:
      name: its path in the file, for messages.
      keras_name: the name of the layer in Keras, or '' if the file does not specify it.
      tensors: in the order of `layer.weights`.
    """

    name: str
    keras_name: str
    tensors: tuple[h5py.Dataset, ...]

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of the tensors."""
        return tuple(tensor.shape for tensor in self.tensors)

    @functools.cached_property
    def kind(self) -> str:
        """As `kind_of`."""
        return kind_of(self.shapes)


@dataclasses.dataclass(frozen=True)
class Submodel:
    """Layers of one model: the outermost one, or one nested in it.

    Attributes:
      name: '' for the outermost model.
      layers: in the order of `model.layers`. In a tree this holds only within each kind of layer.
      splits: for a model in a row of tensors, how the row may be split into trainable and other layers.
    """

    name: str
    layers: tuple[FileLayer, ...]
    splits: tuple[tuple[list[FileLayer], list[FileLayer]], ...] = ()


@dataclasses.dataclass(frozen=True)
class KerasFile:
    """An open Keras file. Tensors are read on demand.

    Attributes:
      submodels: in the order of the file.
      architecture: the config of the outermost model, or None if the file has none. A subclassed model has none.
    """

    submodels: tuple[Submodel, ...]
    architecture: LayerConfig | None


@contextlib.contextmanager
def open_keras(path: Path) -> Iterator[KerasFile]:
    """Opens a Keras file of any format.

    Raises:
      BadDataError: the file is damaged, refused by the guard, or not written by Keras.
    """
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
            yield KerasFile(_read_tree(hdf5), None)
        else:
            texts = hdf5.texts(hdf5.file, "model_config")
            architecture = _architecture(texts[0].encode(), path) if texts else None
            yield KerasFile(_read_legacy(hdf5, root, names), architecture)


def read(tensor: h5py.Dataset) -> np.ndarray:
    """Reads a tensor in its own dtype. HDF5 lacks bfloat16: Keras writes it as plain bytes or marks it."""
    value = tensor[()]
    if value.dtype == guard.TWO_BYTES:
        return value.view(ml_dtypes.bfloat16)
    return value.astype(ml_dtypes.bfloat16) if tensor.attrs.get("dtype") == "bfloat16" else value


def _architecture(text: bytes, path: Path) -> LayerConfig | None:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise guard.damaged(path, error) from None
    if not isinstance(config, dict):
        raise BadDataError("the architecture in the file is not a JSON object", str(path), guard.COPY_AGAIN)
    architecture = LayerConfig.from_json(config)
    return architecture if architecture.layers else None


def _holds_numbers(layer: FileLayer) -> bool:
    """Whether the layer holds more than the state of a random number generator, as dropout does."""
    return any(tensor.dtype.kind not in "iu" for tensor in layer.tensors)


def _read_tree(hdf5: guard.Hdf5Guard) -> tuple[Submodel, ...]:
    submodels: dict[str, list[FileLayer]] = {}
    for path, group, arrays in hdf5.walk(hdf5.file, lambda path: bool(_TRAINING_STATE.search(f"/{path}"))):
        name, _, last = path.rpartition("/")
        if last == "vars" and arrays:
            keras_name = group.attrs.get("name")
            tensors = tuple(arrays[key] for key in sorted(arrays, key=natural))
            layer = FileLayer(name or last, keras_name if isinstance(keras_name, str) else "", tensors)
            if _holds_numbers(layer):
                submodels.setdefault(name.rpartition("/")[0], []).append(layer)
    return tuple(
        Submodel(name, tuple(sorted(layers, key=lambda layer: natural(layer.name))))
        for name, layers in submodels.items()
    )


def _read_legacy(hdf5: guard.Hdf5Guard, root: h5py.Group, names: Sequence[str]) -> tuple[Submodel, ...]:
    outermost: list[FileLayer] = []
    nested: dict[str, Submodel] = {}
    for name in names:
        group = hdf5.child(root, name)
        weights = hdf5.texts(group, "weight_names") or []
        tensors = [hdf5.child(group, weight) for weight in weights]
        matches = [_WEIGHT_NAME.fullmatch(weight) for weight in weights]
        if len({match[1] if match else name for match in matches}) > 1:
            owners = [f"{name}/{match[1] if match else name}" for match in matches]
            nested[name] = _read_row(name, owners, tensors, [bool(m and m[2] in _RUNNING_AVERAGES) for m in matches])
        elif tensors and _holds_numbers(layer := FileLayer(name, name, tuple(tensors))):
            outermost.append(layer)
    found = [Submodel("", tuple(outermost)), *nested.values()]
    return tuple(submodel for submodel in found if submodel.layers)


def _read_row(name: str, owners: list[str], tensors: list[h5py.Dataset], is_average: list[bool]) -> Submodel:
    """Returns a nested model, whose tensors are in a row: all trainable ones, then all others.

    Both parts are in the order of the layers, but if some layers are frozen, neither part has all of them. The start of
    the second part is not marked. It contains all running averages, so at most the kernel, gamma and beta of the first
    layer precede the first average in it.

    Args:
      name: of the model.
      owners: for each tensor, the name of its layer.
      tensors: in the order of the row.
      is_average: for each tensor, whether it is a running average.
    """
    grouped: dict[str, list[h5py.Dataset]] = {}
    for owner, tensor in zip(owners, tensors, strict=True):
        grouped.setdefault(owner, []).append(tensor)
    found = [FileLayer(owner, owner.rpartition("/")[2], tuple(own)) for owner, own in grouped.items()]
    layers = {layer.name: layer for layer in found if _holds_numbers(layer)}
    first = is_average.index(True) if any(is_average) else 0
    splits = []
    for start in range(first, max(first - 4, -1), -1):
        parts = (dict.fromkeys(owners[:start]), dict.fromkeys(owners[start:]))
        trainable, others = ([layers[owner] for owner in part if owner in layers] for part in parts)
        splits.append((trainable, others))
    return Submodel(name, tuple(layers.values()), tuple(splits))
