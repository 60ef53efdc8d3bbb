"""Reads the layers of a Keras file in any format, in the order of `model.layers`.

There are three formats. A legacy `.h5` of Keras 1 and 2 lists its layers in the attributes `layer_names` and
`weight_names`; a nested model is a single entry with all its tensors in a row. A `.weights.h5` of Keras 3 (and of
TensorFlow from 2.12 on) is a tree of groups named by class and position, 'layers/functional/layers/conv2d_3/vars/0'. A
`.keras` archive holds such a file and the architecture as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from xception_jax.errors import BadDataError
from xception_jax.weights.content import ARCHITECTURE, LEGACY, Content, Group
from xception_jax.weights.keras_architecture import LayerConfig, has_more_layers
from xception_jax.weights.keras_layers import BACKBONE, KerasLayer, natural, of_kind
from xception_jax.weights.limits import COPY_AGAIN
from xception_jax.weights.untrusted_json import parse_object

FileLayer: TypeAlias = KerasLayer[np.ndarray]
_WEIGHT_NAME = re.compile(
    r"(.+?)[/_](depthwise_kernel|pointwise_kernel|kernel|bias|gamma|beta|moving_mean|moving_variance|running_mean|"
    r"running_std|W|b|mean|variance|count)(?:_\d+)?(?::0)?"
)
_MAX_LAYERS = 20_000  # in an architecture; Inception V3 has 311
_RUNNING_AVERAGES = ("moving_mean", "moving_variance", "running_mean", "running_std")


class Submodel(NamedTuple):
    """The layers of the outermost model, whose name is '', or of a model nested in it."""

    name: str
    layers: list[FileLayer]  # in the order of `model.layers`; in a tree, only layers of one kind are in order
    splits: Sequence[list[list[FileLayer]]] = ()  # how a row of tensors may divide into trainable and other layers


class KerasFile(NamedTuple):
    """What a Keras file contains."""

    submodels: list[Submodel]
    architecture: LayerConfig  # of the outermost model; without layers if the file has none


def layers_of(content: Content[np.ndarray], where: str) -> KerasFile:
    """Returns the layers in a Keras file of any format; `BadDataError` if its architecture is malformed."""
    architecture = parse_object(content.texts.get(ARCHITECTURE, "{}"), where)
    submodels = (_legacy if content.format == LEGACY else _tree)(content.groups)
    if has_more_layers(architecture, _MAX_LAYERS):
        what = f"the weight file is refused: its architecture has more than {_MAX_LAYERS:,} layers"
        raise BadDataError(what, where, COPY_AGAIN)
    return KerasFile(submodels, LayerConfig.from_json(architecture))


def _layer(path: str, tensors: Sequence[np.ndarray], keras_name: str) -> FileLayer | None:
    """Returns a layer, or None if it holds only the state of a random number generator, as dropout does."""
    if all(tensor.dtype.kind in "iu" for tensor in tensors):
        return None
    return KerasLayer(path, tuple(tensors), tuple(tensor.shape for tensor in tensors), keras_name)


def _tree(groups: Sequence[Group[np.ndarray]]) -> list[Submodel]:
    submodels: dict[str, list[FileLayer]] = {}
    for group in groups:
        tensors = dict(zip(group.names, group.tensors, strict=True))
        if layer := _layer(group.name, [tensors[name] for name in sorted(tensors, key=natural)], group.label):
            submodels.setdefault(group.name.rpartition("/")[0], []).append(layer)
    return [Submodel(name, sorted(layers, key=lambda layer: natural(layer.name))) for name, layers in submodels.items()]


def _legacy(groups: Sequence[Group[np.ndarray]]) -> list[Submodel]:
    outermost: list[FileLayer] = []
    nested: dict[str, Submodel] = {}
    for name, _, weights, tensors in groups:
        matches = [_WEIGHT_NAME.fullmatch(weight) for weight in weights]
        owners = [match[1] if match else name for match in matches]
        if len(set(owners)) > 1:
            nested[name] = _row(name, owners, tensors, [bool(m and m[2] in _RUNNING_AVERAGES) for m in matches])
        elif layer := _layer(name, tensors, name):
            outermost.append(layer)
    return [submodel for submodel in (Submodel("", outermost), *nested.values()) if submodel.layers]


def _row(name: str, owners: list[str], tensors: list[np.ndarray], is_average: list[bool]) -> Submodel:
    """Returns a nested model. Its tensors are in a row: first the trainable ones, then all others.

    Both parts are in the order of the layers, but if some layers are frozen, neither part has all layers. The start of
    the second part is not marked. It contains all running averages (`is_average`), so at most kernel, gamma and beta of
    the first layer precede the first average in it. `owners` are the names of the tensors' layers.
    """
    grouped: dict[str, list[np.ndarray]] = {}
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
