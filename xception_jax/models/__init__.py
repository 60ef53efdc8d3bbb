"""Defines the networks of the paper: `create_model(config.model)` returns a `flax.linen` module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from xception_jax.config import ModelConfig, resolve_model
from xception_jax.errors import ConfigError
from xception_jax.models.inception_v3 import InceptionV3
from xception_jax.models.xception import Xception

__all__ = ["InceptionV3", "Xception", "create_model"]

NETWORKS: dict[str, type[nn.Module]] = {
    "xception": Xception,
    "inception_v3": InceptionV3,
    "inception_v3_2016": InceptionV3,
}


def create_model(model: ModelConfig | ConfigDict | Mapping[str, Any]) -> nn.Module:
    """Builds the network described by `config.model`. Missing fields have their defaults.

    `module.apply(variables, images, train=False)` returns `(logits, endpoints)`. Images are float32 [b, h, w, 3] in
    [-1, 1].

    Raises:
      ConfigError: a field is unknown, out of range, or would have no effect.
    """
    config = resolve_model(model)
    if jnp.dtype(config.dtype) == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "config.model.dtype='float64' has no effect because JAX computes in 32 bits",
            "config.model.dtype",
            "set the environment variable JAX_ENABLE_X64=1, or use 'float32'",
        )
    return NETWORKS[config.name](config)
