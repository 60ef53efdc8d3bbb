"""The networks of the paper: `create_model(config.model)` gives a `flax.linen` module."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from xception_jax.config import XCEPTION_ONLY, resolve_model
from xception_jax.errors import ConfigError
from xception_jax.models.inception_v3 import InceptionV3
from xception_jax.models.layers import BatchNorm
from xception_jax.models.xception import Xception

__all__ = ["InceptionV3", "Xception", "create_model"]


def create_model(model: ConfigDict) -> nn.Module:
    """Builds the network that a `config.model` describes; fields that it does not set have their defaults.

    `module.apply(variables, images, train=False)` gives `(logits, endpoints)`; images are NHWC in [-1, 1].

    Raises:
      ConfigError: a field is unknown, out of range, or would have no effect.
    """
    model = resolve_model(model)
    dtype = jnp.dtype(model.dtype)
    if dtype == jnp.float64 and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "config.model.dtype='float64' has no effect while JAX computes in 32 bits",
            "config.model.dtype",
            "set the environment variable JAX_ENABLE_X64=1, or leave it at 'float32'",
        )
    norm = partial(
        BatchNorm,
        momentum=model.batch_norm.momentum,
        epsilon=model.batch_norm.epsilon,
        use_scale=model.batch_norm.scale,
        statistics=model.batch_norm.statistics,
        dtype=dtype,
    )
    fields = {name: model[name] for name in model if name not in ("name", "batch_norm", "dtype")}
    if model.name == "xception":
        del fields["aux_head"]
        return Xception(norm=norm, dtype=dtype, **fields)
    for name in XCEPTION_ONLY:
        del fields[name]
    return InceptionV3(norm=norm, dtype=dtype, graph_2016=model.name == "inception_v3_2016", **fields)
