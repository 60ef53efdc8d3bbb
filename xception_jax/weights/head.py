"""What the layers above the network compute, by the architecture in a Keras file.

It is followed along the graph, from the output down to the end of the network. Whatever is not known to leave its input
as it is, or to be a part of our own classifier, makes the head another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from xception_jax.weights.architecture import NEUTRAL, fields, layers, numbers

_NEUTRAL = (*NEUTRAL, "ActivityRegularization", "SpatialDropout2D", "GaussianDropout", "AlphaDropout")
_POOLING = "GlobalAveragePooling2D"
_RELU = ("negative_slope", "threshold")  # 0 in what is called relu
# The last layers of Xception and Inception V3, but for a ReLU.
_NETWORK_ENDS = ("BatchNormalization", "Concatenate")


def judge(architecture: dict[str, Any], count: int) -> tuple[str, bool]:
    """Returns why the head is not ours, or '', and whether it gives each class a probability of its own: a sigmoid.

    Ours is average pooling, `count` Dense layers with ReLU between them, and softmax, sigmoid or nothing at the end.
    """
    steps: list[str] = []
    reached = False
    try:
        for layer in _downwards(architecture):
            kind = str(layer.get("class_name"))
            reached = kind in _NETWORK_ENDS and _POOLING in steps
            if reached:
                break
            steps = [*_steps(layer, kind), *steps]
            if kind in _NETWORK_ENDS:
                break
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        pass  # a layer has several inputs, a model several outputs, or the description is damaged
    # The network ends in ReLU: another one changes nothing, nor does one on averages of what is positive.
    ours = rf"(relu )*{_POOLING} (relu )*Dense( (relu )+Dense){{{count - 1}}}( softmax| sigmoid)?"
    matches = re.fullmatch(ours, " ".join(steps))
    if reached and matches:
        return "", steps[-1] == "sigmoid"
    if matches or not steps:
        return "no single path leads from the network to the output", False
    what = "average pooling, Dense layers with relu between them, softmax or sigmoid"
    return f"it ends in {', '.join(steps)}, which is not {what}", False


def _downwards(model: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the layers on the one path from the output of a model to its input, through the models in it.

    Raises:
      ValueError: there are several paths.
    """
    within = layers(model)
    outputs = fields(model).get("output_layers")
    if outputs is None:  # a Sequential
        path: Iterator[dict[str, Any]] = reversed(within)
    else:
        path = _path({_name(layer): layer for layer in within}, _only(outputs))
    for layer in path:
        if layers(layer):
            yield from _downwards(layer)
        else:
            yield layer


def _path(by_name: dict[str, dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Yields the layers of a functional model from the one of that name to the input."""
    for _ in by_name:  # a damaged description may go in a circle
        layer = by_name[name]
        yield layer
        if layer.get("class_name") == "InputLayer":
            return
        (node,) = layer["inbound_nodes"]  # one for each time that it is called
        # Keras 3: {'args', 'kwargs'}; before: [[name, 0, 0, kwargs]], of an operation [name, 0, 0, kwargs]
        name = node["args"][0]["config"]["keras_history"][0] if isinstance(node, dict) else _only(node)


def _only(references: Any) -> str:
    """Returns the layer that [name, 0, 0] or [[name, 0, 0]] refers to."""
    if isinstance(references, list) and references and isinstance(references[0], str):
        return references[0]
    ((name, *_),) = references.values() if isinstance(references, dict) else references
    return name


def _name(layer: dict[str, Any]) -> str:
    return str(layer.get("name") or fields(layer).get("name"))


def _steps(layer: dict[str, Any], kind: str) -> list[str]:
    """Returns what a layer does, in order."""
    config = fields(layer)
    if kind in ("Dense", "Activation"):
        activation = config.get("activation") or "linear"
        name = activation.get("config") if isinstance(activation, dict) else activation
        name = name if isinstance(name, str) else "a function of its own"
        return ["Dense"] * (kind == "Dense") + [name] * (name != "linear")
    if kind == "ReLU":
        bent = config.get("max_value") is not None or any(numbers(config.get(key) or 0.0).any() for key in _RELU)
        return ["ReLU with a slope or a limit" if bent else "relu"]
    if kind == "Softmax" and config.get("axis", -1) == -1:
        return ["softmax"]
    # With sides of 1 the features stay in a row.
    flattens = kind == "Flatten" or (kind == "Reshape" and all(side == 1 for side in config["target_shape"][:-1]))
    return [] if flattens or kind in _NEUTRAL else [kind]
