"""What the architecture in a Keras file says of the network: preprocessing, epsilon, and what the head computes.

It is read as data. Nothing of it is built or run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

# Layers in front of the network that leave an image at evaluation as it is, besides Random*.
_NEUTRAL = ("InputLayer", "Dropout", "GaussianNoise", "Identity")
_NETWORK_BEGINS = ("Conv2D", "SeparableConv2D")
_OPERATIONS: dict[str, Callable] = {
    "truedivide": np.divide,
    "divide": np.divide,
    "truediv": np.divide,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "add": np.add,
}


def _layers(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the layers directly in a model's description; none if it describes a layer."""
    config = node.get("config")
    layers = config.get("layers") if isinstance(config, dict) else config  # a list in a Sequential of Keras 1
    return [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []


def _walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the layers of a model and of the models in it, in order."""
    for layer in _layers(node):
        if _layers(layer):
            yield from _walk(layer)
        else:
            yield layer


def _config(layer: dict[str, Any]) -> dict[str, Any]:
    config = layer.get("config")
    return config if isinstance(config, dict) else {}


def epsilons(architecture: dict[str, Any]) -> set[float]:
    """Returns the epsilon of every BatchNormalization."""
    layers = (layer for layer in _walk(architecture) if layer.get("class_name") == "BatchNormalization")
    return {float(value) for layer in layers if isinstance(value := _config(layer).get("epsilon"), int | float)}


def head_problem(architecture: dict[str, Any]) -> str:
    """Returns why the layers above the network are not ours (average pooling, Dense with ReLU, Dense), or ''."""
    layers = list(_walk(architecture))
    if any(layer.get("class_name") == "GlobalMaxPooling2D" for layer in layers):
        return "it pools by the maximum, not by the average"
    dense = [i for i, layer in enumerate(layers) if layer.get("class_name") == "Dense"]
    for i in dense[:-1]:
        activation = _activation(layers[i])
        following = layers[i + 1]
        if activation == "linear" and following.get("class_name") in ("Activation", "ReLU"):
            activation = "relu" if following["class_name"] == "ReLU" else _activation(following)
        if activation != "relu":
            return f"the hidden layer {_config(layers[i]).get('name')} has the activation {activation}, not relu"
    return ""


def ends_in_sigmoid(architecture: dict[str, Any]) -> bool:
    """Says whether the last Dense layer gives each class a probability of its own."""
    layers = list(_walk(architecture))
    last = max((i for i, layer in enumerate(layers) if layer.get("class_name") == "Dense"), default=len(layers))
    return any(_activation(layer) == "sigmoid" for layer in layers[last : last + 2])


def _activation(layer: dict[str, Any]) -> str:
    activation = _config(layer).get("activation", "linear")
    return str(activation.get("config", activation) if isinstance(activation, dict) else activation)


def image_size(architecture: dict[str, Any]) -> int | None:
    """Returns the side of the square input of the network, or None where it is open."""
    size = None
    for layer in _in_front(architecture):
        config = _config(layer)
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        if layer.get("class_name") == "Resizing":
            shape = [None, config.get("height"), config.get("width"), 3]
        if isinstance(shape, list) and len(shape) == 4 and isinstance(shape[1], int) and shape[1] == shape[2]:
            size = shape[1]
    return size


def scaling(architecture: dict[str, Any], adapted: Sequence[np.ndarray] | None) -> tuple[Any, Any, list[str]]:
    """Returns what the layers in front of the network do to pixels from 0 to 255.

    Args:
      architecture: of the whole model.
      adapted: mean and variance of a Normalization layer that learned them.

    Returns:
      (mean, std, unknown): the network sees (pixels / 255 - mean) / std, three values each, or (None, None) if nothing
      scales there; and the names of layers whose effect is not known.
    """
    factor, offset = np.ones(3), np.zeros(3)
    touched, unknown = False, []
    for layer in _in_front(architecture):
        name = str(layer.get("class_name"))
        if name in (*_NEUTRAL, "Resizing") or name.startswith("Random"):
            continue
        try:
            of_one, of_zero = (_apply(layer, np.full(3, value), adapted) for value in (1.0, 0.0))
            factor, offset = factor * (of_one - of_zero), offset * (of_one - of_zero) + of_zero
            touched = True
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            unknown.append(str(_config(layer).get("name", name)))
    if not touched or not (np.isfinite(factor) & (factor > 0)).all():
        return None, None, unknown
    std = 1 / (255 * factor)
    return tuple(np.round(-offset * std, 9).tolist()), tuple(np.round(std, 9).tolist()), unknown


def _in_front(architecture: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for layer in _walk(architecture):
        if layer.get("class_name") in _NETWORK_BEGINS:
            return
        yield layer


def _apply(layer: dict[str, Any], x: np.ndarray, adapted: Sequence[np.ndarray] | None) -> np.ndarray:
    """Returns what a scaling layer makes of three channels; whatever it is not made for raises."""
    config, name = _config(layer), str(layer["class_name"])
    if name == "Rescaling":
        return x * _numbers(config["scale"]) + _numbers(config.get("offset", 0.0))
    if name == "Normalization":
        if config.get("invert"):
            raise ValueError("the inverse")
        if config.get("mean") is not None:
            mean, variance = _numbers(config["mean"]), _numbers(config["variance"])
        elif adapted is not None:
            mean, variance = adapted
        else:
            raise ValueError("not adapted")
        return (x - np.broadcast_to(mean, 3)) / np.maximum(np.sqrt(np.broadcast_to(variance, 3)), 1e-7)
    # x / 127.5 - 1 in a model: an operation whose second argument is a constant.
    function = str(config["function"]).rpartition(".")[2] if name == "TFOpLambda" else name
    return _OPERATIONS[function.lower()](x, _numbers(_constant(layer["inbound_nodes"][0])))


def _constant(node: Any) -> Any:
    """Returns the second argument of an operation; Keras 3 writes {'args', 'kwargs'}, Keras 2 [name, 0, 0, kwargs]."""
    arguments = node["args"][1:] if isinstance(node, dict) else []
    named = node["kwargs"] if isinstance(node, dict) else (node[0] if isinstance(node[0], list) else node)[3]
    return arguments[0] if arguments else named["y"] if "y" in named else named["x2"]


def _numbers(value: Any) -> np.ndarray:
    if isinstance(value, dict):  # {'class_name': '__numpy__', 'config': {'value': [...]}}
        value = value["config"]["value"]
    return np.broadcast_to(np.squeeze(np.asarray(value, np.float64)), 3)
