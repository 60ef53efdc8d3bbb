"""Networks that timm can hold, with random weights."""

from __future__ import annotations

import numpy as np

from tests.models.test_every_field import model_config
from xception_jax.weights import Network, Preprocessing, tree

FIELDS = {
    "legacy_xception": {"name": "xception", "padding": "symmetric", "batch_norm.epsilon": 1e-5},
    "inception_v3": {"name": "inception_v3", "padding": "symmetric", "batch_norm.scale": True},
}


def network_for_timm(name: str, num_classes: int) -> Network:
    """Returns a network with random weights; without heads if it has 0 classes, else Inception V3 with both."""
    fields = FIELDS[name] | {"num_classes": num_classes or 1000}
    if name == "inception_v3" and num_classes:
        fields["aux_head"] = True
    model, rng = model_config(**fields), np.random.default_rng(3)
    leaves = {leaf: rng.random(shape, np.float32) for leaf, shape in tree.shapes(model).items()}
    if not num_classes:
        leaves = {leaf: value for leaf, value in leaves.items() if not leaf.startswith(tree.HEAD)}
    return Network(model, tree.unflatten(leaves), Preprocessing(), None, "", "")
