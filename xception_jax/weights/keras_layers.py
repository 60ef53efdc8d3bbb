"""Our layers in the order of Keras' `model.layers`: what links the two when names say nothing.

Keras sorts layers by their distance from the output, so that every model of the same graph has the same order, in
every version. Layers of one kind are all that need an order, since kinds are told apart by their tensors. Within a
block of Xception the shortcut comes last; within a module of Inception V3, whichever is farther from the
concatenation comes first, and of equals the earlier tower.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from xception_jax.weights import tree
from xception_jax.weights.keras_file import natural

_INCEPTION_MODULES = {
    **{f"mixed{i}": "3x3dbl_0 5x5_0 3x3dbl_1 1x1_0 5x5_1 3x3dbl_2 pool_0" for i in (0, 1, 2)},
    "mixed3": "3x3dbl_0 3x3dbl_1 3x3_0 3x3dbl_2",
    **{
        f"mixed{i}": "7x7dbl_0 7x7dbl_1 7x7_0 7x7dbl_2 7x7_1 7x7dbl_3 1x1_0 7x7_2 7x7dbl_4 pool_0" for i in (4, 5, 6, 7)
    },
    "mixed8": "7x7x3_0 7x7x3_1 3x3_0 7x7x3_2 3x3_1 7x7x3_3",
    **{f"mixed{i}": "3x3dbl_0 3x3_0 3x3dbl_1 3x3_1x3 3x3_3x1 3x3dbl_1x3 3x3dbl_3x1 1x1_0 pool_0" for i in (9, 10)},
}
_INCEPTION = [f"stem_{i}" for i in range(5)] + [
    f"{module}_{layer}" for module, layers in _INCEPTION_MODULES.items() for layer in layers.split()
]

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
      leaves: our variables, in the order of Keras' `layer.weights`.
      shapes: of the Keras tensors.
    """

    name: str
    leaves: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def targets(model: ConfigDict) -> dict[str, list[Target]]:
    """Returns our layers by kind ('conv', 'separable', 'norm', 'dense'), each in the order of Keras' `model.layers`.

    Raises:
      ConfigError: `model` is no valid `config.model`.
    """
    shapes = tree.shapes(model)
    layers = {name.split("/")[1] for name in shapes if not name.startswith(tree.HEAD)}
    convolutions = {name for name in layers if not name.endswith("_bn") and not name.startswith("aux_")}
    ordered = sorted(convolutions, key=natural) if model.name == "xception" else _INCEPTION
    dense = sorted({"/".join(name.split("/")[1:3]) for name in shapes if name.startswith(tree.HEAD)}, key=natural)

    def target(kind: str, name: str) -> Target:
        leaves = tuple(leaf.format(name) for leaf in _LEAVES[kind] if leaf.format(name) in shapes)
        return Target(name, leaves, tuple(keras_shape(leaf, shapes[leaf], model) for leaf in leaves))

    return {
        "conv": [target("conv", name) for name in ordered if f"params/{name}/kernel" in shapes],
        "separable": [target("separable", name) for name in ordered if f"params/{name}/spatial/kernel" in shapes],
        "norm": [target("norm", f"{name}_bn") for name in ordered],
        "dense": [target("dense", name) for name in dense],  # fc1, fc2, ..., predictions
    }


def keras_shape(leaf: str, shape: tuple[int, ...], model: ConfigDict) -> tuple[int, ...]:
    """Returns the shape that Keras gives a variable: a depthwise kernel is (h, w, C, M) there, (h, w, 1, C * M) here.

    The M filters of a channel stand side by side in both, so that one is a reshape of the other.
    """
    if leaf.endswith("/spatial/kernel"):
        height, width, _, filters = shape
        return height, width, filters // model.depth_multiplier, model.depth_multiplier
    return shape
