"""Our layers in the order of Keras' `model.layers`: what links the two when names say nothing.

Keras sorts layers by their distance from the output, so that every model of the same graph has the same order, in
every version. Within a block of Xception the shortcut comes last; within a module of Inception V3, whichever is
farther from the concatenation comes first, and of equals the earlier tower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from xception_jax.config import ModelConfig, XceptionConfig
from xception_jax.weights import tree
from xception_jax.weights.keras_file import natural

# Convolutions, and for each a dot where its BatchNorm stands.
_INCEPTION_MODULES = {
    **{f"mixed{i}": "3x3dbl_0 . 5x5_0 3x3dbl_1 . . 1x1_0 5x5_1 3x3dbl_2 pool_0 . . . ." for i in (0, 1, 2)},
    "mixed3": "3x3dbl_0 . 3x3dbl_1 . 3x3_0 3x3dbl_2 . .",
    **{
        f"mixed{i}": "7x7dbl_0 . 7x7dbl_1 . 7x7_0 7x7dbl_2 . . 7x7_1 7x7dbl_3 . . 1x1_0 7x7_2 7x7dbl_4 pool_0 . . . ."
        for i in (4, 5, 6, 7)
    },
    "mixed8": "7x7x3_0 . 7x7x3_1 . 3x3_0 7x7x3_2 . . 3x3_1 7x7x3_3 . .",
    **{
        f"mixed{i}": "3x3dbl_0 . 3x3_0 3x3dbl_1 . . 3x3_1x3 3x3_3x1 3x3dbl_1x3 3x3dbl_3x1 1x1_0 . . . . pool_0 . ."
        for i in (9, 10)
    },
}


def _inception_order() -> list[str]:
    order = [f"stem_{i}{suffix}" for i in range(5) for suffix in ("", "_bn")]
    for module, text in _INCEPTION_MODULES.items():
        convolutions = [f"{module}_{name}" for name in text.split() if name != "."]
        norms = iter(convolutions)
        names = iter(convolutions)
        order += [f"{next(norms)}_bn" if name == "." else next(names) for name in text.split()]
    return order


_LEAVES = {
    "conv": ("params/{}/kernel", "params/{}/bias"),
    "separable": ("params/{}/spatial/kernel", "params/{}/pointwise/kernel"),
    "norm": ("params/{}/scale", "params/{}/bias", "batch_stats/{}/mean", "batch_stats/{}/var"),
    "dense": ("params/{}/kernel", "params/{}/bias"),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A layer of ours, as Keras holds it.

    Attributes:
      name: such as 'block5_sepconv1_bn' or 'head/predictions'.
      kind: as of a `Layer`.
      leaves: our variables, in the order of Keras' `layer.weights`.
      shapes: of the Keras tensors.
    """

    name: str
    kind: str
    leaves: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def targets(model: ModelConfig) -> list[Target]:
    """Returns our layers in the order of Keras' `model.layers`.

    Raises:
      ConfigError: `model` is no valid `config.model`.
    """
    shapes = tree.shapes(model)
    if model.name == "xception":
        layers = {name.split("/")[1] for name in shapes if not name.startswith((tree.HEAD, "batch_stats/"))}
        convolutions = sorted((name for name in layers if not name.endswith("_bn")), key=natural)
        order = [name + suffix for name in convolutions for suffix in ("", "_bn")]
    else:
        order = _inception_order()
    head = sorted({"/".join(name.split("/")[1:3]) for name in shapes if name.startswith(tree.HEAD)}, key=natural)
    found = []
    for name in [*order, *head]:  # fc1, fc2, ..., predictions
        kind = "dense" if name in head else "norm" if name.endswith("_bn") else "conv"
        kind = "separable" if f"params/{name}/spatial/kernel" in shapes else kind
        leaves = tuple(leaf.format(name) for leaf in _LEAVES[kind] if leaf.format(name) in shapes)
        found.append(Target(name, kind, leaves, tuple(keras_shape(leaf, shapes[leaf], model) for leaf in leaves)))
    return found


def of_kind(targets: Sequence[Target], kind: str) -> list[Target]:
    """Returns the layers of one kind."""
    return [target for target in targets if target.kind == kind]


def keras_shape(leaf: str, shape: tuple[int, ...], model: ModelConfig) -> tuple[int, ...]:
    """Returns the shape that Keras gives a variable: a depthwise kernel is (h, w, C, M) there, (h, w, 1, C * M) here.

    The M filters of a channel stand side by side in both, so that one is a reshape of the other.
    """
    if leaf.endswith("/spatial/kernel"):
        assert isinstance(model, XceptionConfig)
        height, width, _, filters = shape
        return height, width, filters // model.depth_multiplier, model.depth_multiplier
    return shape
