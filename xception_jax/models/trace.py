"""Visits the layers of a network in the order of its forward pass, without running it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def trace_layers(model: nn.Module, image_size: int, visit: Callable[[nn.Module, Any, Any], None]) -> dict[str, Any]:
    """Traces a forward pass without dropout on one image [1, image_size, image_size, 3], with the auxiliary head.

    Args:
      model: a network of this package.
      image_size: side of the image, in pixels.
      visit: called after each layer or module with (layer, its first input, its output). Arrays are abstract.

    Returns:
      The variables of the network as shapes and dtypes.
    """

    def intercept(
        next_method: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        output = next_method(*args, **kwargs)
        if context.method_name == "__call__":
            visit(context.module, args[0], output)
        return output

    def init() -> Any:
        with nn.intercept_methods(intercept):
            return model.init(jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)), train=False)

    return jax.eval_shape(init)
