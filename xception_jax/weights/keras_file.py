"""What a Keras file holds, whatever its form: layers with tensors, in the order of `model.layers`, by container.

Three forms. A legacy `.h5` (Keras 1 and 2, `layer_names` and `weight_names` as attributes) lists the layers; a model
within the model is one entry, its tensors in a row. A `.weights.h5` of Keras 3 (or of TensorFlow 2.12 and later) is a
tree of groups that are called by class and position, 'layers/functional/layers/conv2d_3/vars/0'. A `.keras` archive
holds such a file beside the architecture as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from xception_jax.errors import BadDataError
from xception_jax.weights import architecture, guard

_LEAF = re.compile(
    r"(.+?)[/_](depthwise_kernel|pointwise_kernel|kernel|bias|gamma|beta|moving_mean|moving_variance|running_mean|"
    r"running_std|W|b|mean|variance|count)(?:_\d+)?(?::0)?"
)
_STATISTICS = ("moving_mean", "moving_variance", "running_mean", "running_std")
_TRAINING_STATE = ("optimizer", "optimizer_weights", "metrics")
_LISTS = ("layers", "_layer_checkpoint_dependencies")  # of layers, which are called by their class


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that holds tensors.

    Attributes:
      name: its place in the file, for messages.
      own_name: what Keras calls it, or '' where the file does not say.
      tensors: in the order of `layer.weights`.
    """

    name: str
    own_name: str
    tensors: tuple[h5py.Dataset, ...]

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors."""
        return tuple(tensor.shape for tensor in self.tensors)

    @functools.cached_property
    def kind(self) -> str:
        """'conv', 'separable', 'norm', 'dense', 'normalization' (of the input) or 'other', told by the shapes."""
        ranks = tuple(map(len, self.shapes))
        if ranks in ((4,), (4, 1)):
            return "conv"
        if ranks in ((4, 4), (4, 4, 1)):
            return "separable"
        if ranks in ((1, 1, 1), (1, 1, 1, 1)) and len(set(self.shapes)) == 1:
            return "norm"
        if ranks in ((2,), (2, 1)):
            return "dense"
        if ranks == (1, 1, 0):
            return "normalization"
        return "other"


@dataclasses.dataclass(frozen=True)
class Container:
    """Layers that stand side by side: the model itself, or a model within it.

    Attributes:
      name: '' for the model itself.
      layers: in the order of `model.layers`, as far as the file tells.
      row: of a model within the model in a legacy file: for each tensor its layer, and whether it is a running average.
    """

    name: str
    layers: tuple[Layer, ...]
    row: tuple[tuple[str, bool], ...] = ()

    def parts(self) -> Iterator[tuple[list[Layer], list[Layer]]]:
        """Yields how a row may be cut in two: what can be trained, then all others, each in the order of the layers.

        Where some layers are frozen neither part has all of them. Where the second begins is not marked. It has all
        running averages, so that little of it comes before the first one: kernel, gamma and beta of the first layer.
        """
        layers = {layer.name: layer for layer in self.layers}
        owners = [owner for owner, _ in self.row]
        first = next((i for i, (_, is_average) in enumerate(self.row) if is_average), 0)
        for boundary in range(first, max(first - 4, -1), -1):
            parts = (owners[:boundary], owners[boundary:])
            trainable, others = ([layers[name] for name in dict.fromkeys(part) if name in layers] for part in parts)
            yield trainable, others


@dataclasses.dataclass(frozen=True)
class KerasFile:
    """A Keras file that is open; its tensors are read when they are asked for.

    Attributes:
      form: of the file, in words.
      containers: in the order of the file.
      architecture: the model's own description (`model.get_config()` with its class), or None without; that of a
        subclassed model, which is its Python code, counts as none.
    """

    form: str
    containers: tuple[Container, ...]
    architecture: dict[str, Any] | None


@contextlib.contextmanager
def open_keras(path: Path) -> Iterator[KerasFile]:
    """Opens a Keras file of any form.

    Raises:
      BadDataError: the file is damaged, refused by the guard, or not written by Keras.
    """
    if guard.container_format(path) == "zip":
        with guard.open_archive(path) as archive:
            config = _architecture(guard.read_member(archive, "config.json"), path)
            with guard.extracted(archive, "model.weights.h5") as inner, guard.open_hdf5(inner) as file:
                yield KerasFile("Keras archive", _tree(file, guard.Hdf5Guard(inner, path)), config)
        return
    with guard.open_hdf5(path) as file:
        reader = guard.Hdf5Guard(path, path)
        root = reader.child(file, "model_weights") if "model_weights" in file else file
        names = reader.texts(root, "layer_names")
        if names is None:
            yield KerasFile("Keras 3 weights", _tree(file, reader), None)
        else:
            texts = reader.texts(file, "model_config")
            config = _architecture(texts[0].encode(), path) if texts else None
            yield KerasFile("legacy Keras weights", _legacy(root, names, reader), config)


def read(tensor: h5py.Dataset) -> np.ndarray:
    """Reads one tensor as it is; Keras writes bfloat16, which HDF5 does not know, as bare bytes or marks it."""
    value = tensor[()]
    if value.dtype == guard.TWO_BYTES:
        return value.view(ml_dtypes.bfloat16)
    return value.astype(ml_dtypes.bfloat16) if tensor.attrs.get("dtype") == "bfloat16" else value


def natural(name: str) -> list[Any]:
    """Sorts 'conv2d_9' before 'conv2d_10', and 'conv2d' before both."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _architecture(text: bytes, path: Path) -> dict[str, Any] | None:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise guard.damaged(path, error) from None
    if not isinstance(config, dict):
        raise BadDataError("the architecture in the file is not a JSON object", str(path), guard.COPY_AGAIN)
    return config if architecture.layers(config) else None


def _holds_numbers(layer: Layer) -> bool:
    """Whether it is more than the state of a random generator, as dropout has."""
    return any(tensor.dtype.kind not in "iu" for tensor in layer.tensors)


def _is_training_state(path: str) -> bool:
    """Whether a group belongs to a model that was compiled, at any depth; 'layers/metrics' is a layer of that class."""
    parts = path.split("/")
    return any(
        part in _TRAINING_STATE and parent not in _LISTS for parent, part in zip(["", *parts], parts, strict=False)
    )


def _tree(file: h5py.File, reader: guard.Hdf5Guard) -> tuple[Container, ...]:
    containers: dict[str, list[Layer]] = {}

    def visit(group: h5py.Group, path: str, depth: int) -> None:
        for name, child in reader.children(group, depth).items():
            # TensorFlow on Windows wrote backslashes into the names.
            inner = f"{path}/{name}".replace("\\", "/").strip("/")
            if isinstance(child, h5py.Dataset) or _is_training_state(inner):
                continue
            if name != "vars" and not name.endswith("\\vars"):
                visit(child, inner, depth + 1)
                continue
            variables = reader.children(child, depth + 1)
            tensors = tuple(variables[key] for key in sorted(variables, key=natural))
            if tensors and all(isinstance(tensor, h5py.Dataset) for tensor in tensors):
                own_name = child.attrs.get("name")
                layer = Layer(path or "vars", own_name if isinstance(own_name, str) else "", tensors)
                if _holds_numbers(layer):
                    containers.setdefault(path.rpartition("/")[0], []).append(layer)

    visit(file, "", 0)
    return tuple(
        Container(name, tuple(sorted(layers, key=lambda layer: natural(layer.name))))
        for name, layers in containers.items()
    )


def _legacy(root: h5py.Group, names: Sequence[str], reader: guard.Hdf5Guard) -> tuple[Container, ...]:
    containers: dict[str, Container] = {}
    flat: list[Layer] = []
    for name in names:
        group = reader.child(root, name)
        weights = reader.texts(group, "weight_names") or []
        tensors = [reader.child(group, weight) for weight in weights]
        matches = [_LEAF.fullmatch(weight) for weight in weights]
        owners = [match[1] if match else name for match in matches]
        if len(set(owners)) > 1:
            containers[name] = _row(name, owners, tensors, [bool(m and m[2] in _STATISTICS) for m in matches])
        elif tensors and _holds_numbers(layer := Layer(name, name, tuple(tensors))):
            flat.append(layer)
    inner = [container for container in containers.values() if container.layers]
    return (Container("", tuple(flat)), *inner) if flat else tuple(inner)


def _row(name: str, owners: list[str], tensors: list[h5py.Dataset], statistics: list[bool]) -> Container:
    """Returns a model within the model, whose tensors are in a row."""
    owners = [f"{name}/{owner}" for owner in owners]
    layers = []
    for owner in dict.fromkeys(owners):
        own = tuple(tensor for tensor, other in zip(tensors, owners, strict=True) if other == owner)
        layers.append(Layer(owner, owner.rpartition("/")[2], own))
    return Container(name, tuple(filter(_holds_numbers, layers)), tuple(zip(owners, statistics, strict=True)))
