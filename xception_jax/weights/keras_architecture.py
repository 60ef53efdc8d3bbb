"""Reads the architecture in a Keras file: BatchNorm's epsilon, what precedes the network, what follows it.

The architecture is treated as data. Nothing of it is built or run.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from xception_jax.data.images import Preprocessing
from xception_jax.weights import tree
from xception_jax.weights.network import MAX_SIDE

# Layers that do nothing in evaluation; those of the first tuple can also precede the network.
_NEUTRAL = ("InputLayer", "Dropout", "GaussianNoise", "Identity")
_NEUTRAL_IN_HEAD = (*_NEUTRAL, "ActivityRegularization", "SpatialDropout2D", "GaussianDropout", "AlphaDropout")
_NETWORK_BEGINS = ("Conv2D", "SeparableConv2D")
_NETWORK_ENDS = ("BatchNormalization", "Concatenate")  # of Xception and Inception V3, before a ReLU
_POOLING = "GlobalAveragePooling2D"
_RESIZING_OPTIONS = ("crop_to_aspect_ratio", "pad_to_aspect_ratio", "antialias")
_OPERATIONS: dict[str, Callable] = {
    **dict.fromkeys(("truedivide", "truediv", "divide"), np.divide),
    "subtract": np.subtract,
    "multiply": np.multiply,
    "add": np.add,
}
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
_LARGEST = 1e9  # integers in JSON can be too large for a float
_MAX_STEPS = 10_000  # layers between the network and the output


class LayerConfig(NamedTuple):
    """The config of a layer, or of a model with the layers in it, as Keras stores it."""

    class_name: str
    name: str
    config: dict[str, Any]  # arguments of the constructor
    inbound_nodes: Any  # what the layer is called on
    layers: list[LayerConfig]  # of a model, else empty

    @classmethod
    def from_json(cls, node: dict[str, Any]) -> LayerConfig:
        """Converts a JSON object. Whatever has an unexpected type is left empty."""
        config = node.get("config")
        layers = config.get("layers") if isinstance(config, dict) else config  # a list in a Sequential of Keras 1
        config = config if isinstance(config, dict) else {}
        name = node.get("name") or config.get("name") or node.get("class_name")
        inner = (
            [cls.from_json(layer) for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
        )
        return cls(str(node.get("class_name")), str(name), config, node.get("inbound_nodes"), inner)

    def flat(self) -> Iterator[LayerConfig]:
        """Yields the layers of this model in order, each nested model followed by its layers."""
        for layer in self.layers:
            yield layer
            yield from layer.flat()


def has_more_layers(architecture: dict[str, Any], limit: int) -> bool:
    """Returns whether a model in JSON has more layers than a limit, nested ones included, before they are converted."""
    count, nodes = 0, [architecture]
    while nodes and count <= limit:
        config = nodes.pop().get("config")
        layers = config.get("layers") if isinstance(config, dict) else config
        if isinstance(layers, list):
            count += len(layers)
            nodes += [layer for layer in layers[: limit + 1] if isinstance(layer, dict)]
    return count > limit


def epsilon(architecture: LayerConfig, count: int) -> float | None:
    """Returns the epsilon of the network's BatchNorms. A head or a second network may have another one.

    It is the most frequent value in the model with `count` BatchNorms, or else in the model with most of them.
    """
    found: list[list[float]] = []
    for model in (architecture, *architecture.flat()):
        norms = (layer.config.get("epsilon") for layer in model.layers if layer.class_name == "BatchNormalization")
        found.append([value for value in norms if isinstance(value, int | float) and abs(value) < _LARGEST])
    values = max(found, key=lambda each: (len(each) == count, len(each)))
    return float(collections.Counter(values).most_common(1)[0][0]) if values else None


def read_preprocessing(
    architecture: LayerConfig, adapted: Sequence[np.ndarray] | None, default: Preprocessing
) -> tuple[Preprocessing, tuple[int, int] | None, list[str]]:
    """Reads what the layers in front of the network do to pixels from 0 to 255.

    `adapted` are mean and variance of a Normalization layer that learned them. `default` is used where the architecture
    specifies nothing. Returns the preprocessing; height and width of the network's input, or None if open; notes.
    """
    changes: dict[str, Any] = {}
    image_shape, unknown, resizing = None, [], []
    pixels = black_and_white = np.array([[0.0] * 3, [255.0] * 3])
    layers = (layer for layer in architecture.flat() if not layer.layers)
    for layer in itertools.takewhile(lambda layer: layer.class_name not in _NETWORK_BEGINS, layers):
        config, name = layer.config, layer.class_name
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        if name == "Resizing":
            shape = [None, config.get("height"), config.get("width"), 3]
            interpolation = config.get("interpolation", "bilinear")
            if interpolation == "bicubic":
                changes["interpolation"] = "bicubic"
                resizing.append("bicubic with the coefficient -0.5 (OpenCV uses -0.75)")
            elif interpolation != "bilinear":
                resizing.append(f"interpolation={interpolation}")
            resizing += [key for key in _RESIZING_OPTIONS if config.get(key)]
        # RandomCrop also crops in evaluation.
        elif name not in _NEUTRAL and (not name.startswith("Random") or name == "RandomCrop"):
            try:
                with np.errstate(all="ignore"):  # values that are not finite are left out below
                    pixels = _scale(layer, pixels, adapted)
            except _MALFORMED:
                unknown.append(layer.name)
        match shape:
            case [_, int(height), int(width), 1 | 3 | 4] if 0 < min(height, width) <= max(height, width) <= MAX_SIDE:
                image_shape = height, width
    black, white = pixels
    if pixels is not black_and_white and (np.abs(pixels) < _LARGEST).all() and (white - black > 1 / _LARGEST).all():
        std = 1 / (white - black)  # the network receives (pixels / 255 - mean) / std
        changes["mean"], changes["std"] = (tuple(np.round(each, 9).tolist()) for each in (-black * std, std))
    elif pixels is not black_and_white:
        unknown.append("a scaling to a range that is reversed or not finite")
    notes = [f"the effect of {tree.listed(unknown)} on images is unknown; it is left out"] if unknown else []
    if architecture.layers and "mean" not in changes:
        notes.append("no layer scales the pixels; assuming -1 to 1 as in keras.applications (convert --mean, --std)")
    if resizing:
        notes.append(f"the Resizing layer is only partly reproduced: {', '.join(resizing)}; images are resized whole")
    return dataclasses.replace(default, **changes), image_shape, notes


def _scale(layer: LayerConfig, x: np.ndarray, adapted: Sequence[np.ndarray] | None) -> np.ndarray:
    """Applies a scaling layer to [..., 3] channels. Any other layer raises one of `_MALFORMED`."""
    config = layer.config
    if layer.class_name == "Rescaling":
        return x * _three(config["scale"]) + _three(config.get("offset", 0.0))
    if layer.class_name == "Normalization":
        if config.get("invert"):
            raise ValueError("the inverse")
        given = (_three(config["mean"]), _three(config["variance"])) if config.get("mean") is not None else adapted
        mean, variance = given or ()  # raises ValueError if there are none
        return (x - np.broadcast_to(mean, 3)) / np.maximum(np.sqrt(np.broadcast_to(variance, 3)), 1e-7)
    # x / 127.5 - 1 in a model: an operation whose second argument is a constant
    name = str(config["function"]).rpartition(".")[2] if layer.class_name == "TFOpLambda" else layer.class_name
    node = layer.inbound_nodes[0]
    if isinstance(node, dict):  # Keras 3; in Keras 2 [name, 0, 0, kwargs]
        positional, named = node["args"][1:], node["kwargs"]
    else:
        positional, named = [], (node[0] if isinstance(node[0], list) else node)[3]
    constant = positional[0] if positional else named["y"] if "y" in named else named["x2"]
    return _OPERATIONS[name.lower()](x, _three(constant))


def _three(value: Any) -> np.ndarray:
    """Returns three numbers from one or three in any format that Keras writes."""
    if isinstance(value, dict):  # {'class_name': '__numpy__', 'config': {'value': [...]}}
        value = value["config"]["value"]
    return np.broadcast_to(np.squeeze(np.asarray(value, np.float64)), 3)


def compare_head(architecture: LayerConfig, count: int) -> tuple[str, bool]:
    """Compares the layers above the network with our classifier, following the graph from the output down.

    Ours is average pooling, `count` Dense layers with ReLU between them, and softmax, sigmoid or nothing at the end.

    Returns:
      Why the head differs, or ''; and whether it ends in a sigmoid.
    """
    steps: list[str] = []
    at_network = False
    with contextlib.suppress(*_MALFORMED):  # several inputs or outputs, or a damaged config
        # A damaged config can lead through nested models again and again.
        for layer in itertools.islice(_downwards(architecture), _MAX_STEPS):
            is_end = layer.class_name in _NETWORK_ENDS
            at_network = is_end and _POOLING in steps
            steps = steps if at_network else [*_steps(layer), *steps]
            if is_end:
                break
    # The network ends in a ReLU, so another ReLU changes nothing, nor does one on averages of positive values.
    ours = rf"(relu )*{_POOLING} (relu )*Dense( (relu )+Dense){{{count - 1}}}( softmax| sigmoid)?"
    is_ours = bool(re.fullmatch(ours, " ".join(steps)))
    if at_network and is_ours:
        return "", steps[-1] == "sigmoid"
    if is_ours or not steps:
        return "no single path leads from the network to the output", False
    what = "average pooling, Dense layers with relu between them, softmax or sigmoid"
    return f"it ends in {', '.join(steps)}, which is not {what}", False


def _downwards(model: LayerConfig) -> Iterator[LayerConfig]:
    """Yields the layers on the only path from the output to the input. Several paths raise one of `_MALFORMED`."""
    layers = {layer.name: layer for layer in model.layers}
    outputs = model.config.get("output_layers")
    name = None if outputs is None else _only(outputs)
    for last in reversed(model.layers):  # no more steps than layers: a damaged config can be circular
        layer = last if name is None else layers[name]  # a Sequential has no graph
        yield from _downwards(layer) if layer.layers else [layer]
        if name is not None:
            if layer.class_name == "InputLayer":
                return
            (node,) = layer.inbound_nodes  # one for each call
            # In Keras 3 {'args', 'kwargs'}; in Keras 2 [[name, 0, 0, kwargs]] or, for an operation, its only element
            name = node["args"][0]["config"]["keras_history"][0] if isinstance(node, dict) else _only(node)


def _only(references: Any) -> str:
    """Returns the layer that [name, 0, 0] or [[name, 0, 0]] refers to."""
    if isinstance(references, list) and references and isinstance(references[0], str):
        return references[0]
    ((name, *_),) = references.values() if isinstance(references, dict) else references
    return name


def _steps(layer: LayerConfig) -> list[str]:
    """Returns what a layer of a head computes, in order."""
    config, kind = layer.config, layer.class_name
    if kind in ("Dense", "Activation"):
        activation = config.get("activation") or "linear"
        name = activation.get("config") if isinstance(activation, dict) else activation
        name = name if isinstance(name, str) else "a custom function"
        return ["Dense"] * (kind == "Dense") + [name] * (name != "linear")
    if kind == "ReLU":
        bent = [_three(config.get(key) or 0.0).any() for key in ("negative_slope", "threshold")]
        return ["ReLU with a slope or a limit" if any(bent) or config.get("max_value") is not None else "relu"]
    if kind == "Softmax" and config.get("axis", -1) == -1:
        return ["softmax"]
    # Reshaping to sides of 1 keeps the features in a row.
    flattens = kind == "Flatten" or (kind == "Reshape" and all(side == 1 for side in config["target_shape"][:-1]))
    return [] if flattens or kind in _NEUTRAL_IN_HEAD else [kind]
