"""Weights that are not drawn by a compiled program, which would take longer than what is done with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(module, *arguments):
    """Returns variables for `module`: kernels that keep the scale, everything else between 0.5 and 1.5."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return jnp.asarray(rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))
    return jax.tree_util.tree_map_with_path(draw, shapes)
