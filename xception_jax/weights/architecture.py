"""What the architecture in a Keras file says of the network: its epsilon, and what is done to images before it.

It is read as data. Nothing of it is built or run.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from xception_jax.data.images import Interpolation

# Layers that give in evaluation what they are given; in front of the network Random* do, too.
NEUTRAL = ("InputLayer", "Dropout", "GaussianNoise", "Identity")
_NETWORK_BEGINS = ("Conv2D", "SeparableConv2D")
_OPERATIONS: dict[str, Callable] = {
    "truedivide": np.divide,
    "divide": np.divide,
    "truediv": np.divide,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "add": np.add,
}


def layers(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the layers directly in a model's description; none if it describes a layer."""
    config = node.get("config")
    found = config.get("layers") if isinstance(config, dict) else config  # a list in a Sequential of Keras 1
    return [layer for layer in found if isinstance(layer, dict)] if isinstance(found, list) else []


def _walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the layers of a model and of the models in it, in order."""
    for layer in layers(node):
        if layers(layer):
            yield from _walk(layer)
        else:
            yield layer


def _models(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a model and the models in it."""
    yield node
    for layer in layers(node):
        if layers(layer):
            yield from _models(layer)


def fields(layer: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that a layer was made with."""
    config = layer.get("config")
    return config if isinstance(config, dict) else {}


def epsilon(architecture: dict[str, Any], count: int) -> float | None:
    """Returns the epsilon of the network's BatchNormalization; a head or a second network may have others.

    Args:
      architecture: of the whole model.
      count: of BatchNorms in the network: looked at is the model that has so many, else the one that has most, and in
        it the most frequent value.
    """
    found = []
    for model in _models(architecture):
        norms = (layer for layer in layers(model) if layer.get("class_name") == "BatchNormalization")
        found.append([value for layer in norms if isinstance(value := fields(layer).get("epsilon"), int | float)])
    values = max(found, key=lambda each: (len(each) == count, len(each)))
    return float(collections.Counter(values).most_common(1)[0][0]) if values else None


def image_shape(architecture: dict[str, Any]) -> tuple[int, int] | None:
    """Returns height and width of what the network is given, or None where they are open."""
    found = None
    for layer in _in_front(architecture):
        config = fields(layer)
        shape = config.get("batch_shape") or config.get("batch_input_shape")
        if layer.get("class_name") == "Resizing":
            shape = [None, config.get("height"), config.get("width"), 3]
        if isinstance(shape, list) and len(shape) == 4 and shape[3] in (1, 3, 4):
            height, width = shape[1:3]
            if isinstance(height, int) and isinstance(width, int):
                found = (height, width)
    return found


def resizing(architecture: dict[str, Any]) -> tuple[Interpolation, list[str]]:
    """Returns the interpolation of a Resizing layer in front, the nearest of ours, and what of the layer is another."""
    interpolation: Interpolation = "bilinear"
    other = []
    for layer in _in_front(architecture):
        if layer.get("class_name") == "Resizing":
            config = fields(layer)
            own = config.get("interpolation", "bilinear")
            if own == "bicubic":
                interpolation = "bicubic"
                other.append("bicubic with the coefficient -0.5 (OpenCV's is -0.75)")
            elif own != "bilinear":
                other.append(f"interpolation={own}")
            other += [name for name in ("crop_to_aspect_ratio", "pad_to_aspect_ratio", "antialias") if config.get(name)]
    return interpolation, other


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
        # RandomCrop cuts in evaluation, too.
        if name in (*NEUTRAL, "Resizing") or (name.startswith("Random") and name != "RandomCrop"):
            continue
        try:
            of_one, of_zero = (_apply(layer, np.full(3, value), adapted) for value in (1.0, 0.0))
            factor, offset = factor * (of_one - of_zero), offset * (of_one - of_zero) + of_zero
            touched = True
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            unknown.append(str(fields(layer).get("name", name)))
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
    config, name = fields(layer), str(layer["class_name"])
    if name == "Rescaling":
        return x * numbers(config["scale"]) + numbers(config.get("offset", 0.0))
    if name == "Normalization":
        if config.get("invert"):
            raise ValueError("the inverse")
        if config.get("mean") is not None:
            mean, variance = numbers(config["mean"]), numbers(config["variance"])
        elif adapted is not None:
            mean, variance = adapted
        else:
            raise ValueError("not adapted")
        return (x - np.broadcast_to(mean, 3)) / np.maximum(np.sqrt(np.broadcast_to(variance, 3)), 1e-7)
    # x / 127.5 - 1 in a model: an operation whose second argument is a constant.
    function = str(config["function"]).rpartition(".")[2] if name == "TFOpLambda" else name
    return _OPERATIONS[function.lower()](x, numbers(_constant(layer["inbound_nodes"][0])))


def _constant(node: Any) -> Any:
    """Returns the second argument of an operation; Keras 3 writes {'args', 'kwargs'}, Keras 2 [name, 0, 0, kwargs]."""
    arguments = node["args"][1:] if isinstance(node, dict) else []
    named = node["kwargs"] if isinstance(node, dict) else (node[0] if isinstance(node[0], list) else node)[3]
    return arguments[0] if arguments else named["y"] if "y" in named else named["x2"]


def numbers(value: Any) -> np.ndarray:
    """Returns three numbers, of one or of three in whatever form Keras writes them."""
    if isinstance(value, dict):  # {'class_name': '__numpy__', 'config': {'value': [...]}}
        value = value["config"]["value"]
    return np.broadcast_to(np.squeeze(np.asarray(value, np.float64)), 3)
