"""Lists our layers in the order of Keras' `model.layers`, which links the two without using names.

Keras sorts layers by their distance from the output, so a graph has the same order in every version. Within a block of
Xception the shortcut comes last. Within a module of Inception V3 the layers farther from the concatenation come first;
among equals, the earlier tower.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Generic, TypeVar

from xception_jax.config import ModelConfig, XceptionConfig
from xception_jax.weights import tree

Leaf = TypeVar("Leaf")
Shape = tuple[int, ...]

# Kind of a layer by the ranks of its tensors, with or without a bias or BatchNorm's gamma.
_KINDS = {(4,): "conv", (4, 1): "conv", (4, 4): "separable", (4, 4, 1): "separable", (2,): "dense", (2, 1): "dense"}
_KINDS |= {(1, 1, 1): "norm", (1, 1, 1, 1): "norm", (1, 1, 0): "normalization"}  # the latter scales the input
BACKBONE = ("conv", "separable", "norm")
# Leaves of our layers in the order of Keras' `layer.weights`.
_LEAVES = ("spatial/kernel", "pointwise/kernel", "kernel", "scale", "bias", "mean", "var")
_VARIABLE = re.compile(r"(?:params|batch_stats)/((?:head/)?\w+)/(" + "|".join(_LEAVES) + ")")

# Convolutions of a module, with a dot for each BatchNorm; the BatchNorms come in the order of the convolutions.
_A = "3x3dbl_0 . 5x5_0 3x3dbl_1 . . 1x1_0 5x5_1 3x3dbl_2 pool_0 . . . ."
_A_TO_B = "3x3dbl_0 . 3x3dbl_1 . 3x3_0 3x3dbl_2 . ."
_B = "7x7dbl_0 . 7x7dbl_1 . 7x7_0 7x7dbl_2 . . 7x7_1 7x7dbl_3 . . 1x1_0 7x7_2 7x7dbl_4 pool_0 . . . ."
_B_TO_C = "7x7x3_0 . 7x7x3_1 . 3x3_0 7x7x3_2 . . 3x3_1 7x7x3_3 . ."
_C = "3x3dbl_0 . 3x3_0 3x3dbl_1 . . 3x3_1x3 3x3_3x1 3x3dbl_1x3 3x3dbl_3x1 1x1_0 . . . . pool_0 . ."
_INCEPTION_MODULES = (_A, _A, _A, _A_TO_B, _B, _B, _B, _B, _B_TO_C, _C, _C)  # mixed0, ..., mixed10


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no equality
class KerasLayer(Generic[Leaf]):
    """A layer with weights as Keras stores it: one in a file, or one of ours.

    Attributes:
      name: its path in the file, or our name, such as 'block5_sepconv1_bn' or 'head/predictions'.
      leaves: the tensors in the file, or the names of our variables, in the order of Keras' `layer.weights`.
      shapes: shapes of the tensors.
      keras_name: the name of a layer in Keras, or '' if the file does not specify it.
    """

    name: str
    leaves: tuple[Leaf, ...]
    shapes: tuple[Shape, ...]
    keras_name: str = ""

    @functools.cached_property
    def kind(self) -> str:
        """'conv', 'separable', 'norm', 'dense', 'normalization' or 'other'."""
        kind = _KINDS.get(tuple(map(len, self.shapes)), "other")
        return "other" if kind == "norm" and len(set(self.shapes)) > 1 else kind


def of_kind(layers: Sequence[KerasLayer[Leaf]], *kinds: str) -> list[KerasLayer[Leaf]]:
    """Returns the layers of some kinds, in order."""
    return [layer for layer in layers if layer.kind in kinds]


def natural(name: str) -> list[int | str]:
    """Splits a name into a sort key that puts 'conv2d_9' before 'conv2d_10', and 'conv2d' before both."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def targets(model: ModelConfig) -> list[KerasLayer[str]]:
    """Returns our layers in the order of Keras' `model.layers`."""
    shapes = tree.shapes(model)
    leaves: dict[str, dict[str, str]] = {}  # our variables by layer and leaf
    for name in shapes:
        if match := _VARIABLE.fullmatch(name):
            leaves.setdefault(match[1], {})[match[2]] = name
    head = [name for name in leaves if name.startswith("head/")]  # fc1, fc2, ..., predictions
    if model.name == "xception":
        convolutions = (name for name in leaves if name not in head and not name.endswith("_bn"))
        order = [name + suffix for name in sorted(convolutions, key=natural) for suffix in ("", "_bn")]
    else:
        order = _inception_order()
    found = []
    for layer in [*order, *sorted(head, key=natural)]:
        names = tuple(leaves[layer][leaf] for leaf in _LEAVES if leaf in leaves[layer])
        found.append(KerasLayer(layer, names, tuple(_keras_shape(name, shapes[name], model) for name in names)))
    return found


def _inception_order() -> list[str]:
    order = [f"stem_{i}{suffix}" for i in range(5) for suffix in ("", "_bn")]
    for i, text in enumerate(_INCEPTION_MODULES):
        convolutions = [f"mixed{i}_{name}" for name in text.split() if name != "."]
        names, norms = iter(convolutions), (f"{name}_bn" for name in convolutions)
        order += [next(norms if name == "." else names) for name in text.split()]
    return order


def _keras_shape(name: str, shape: Shape, model: ModelConfig) -> Shape:
    """Returns Keras' shape of a variable: its depthwise kernel is (h, w, C, M), ours is (h, w, 1, C * M).

    The M filters of a channel are neighbours in both, so a reshape converts one to the other.
    """
    if not name.endswith("/spatial/kernel") or shape[2] != 1:  # not depthwise
        return shape
    assert isinstance(model, XceptionConfig)  # the only network with depthwise kernels
    height, width, _, filters = shape
    return height, width, filters // model.depth_multiplier, model.depth_multiplier
