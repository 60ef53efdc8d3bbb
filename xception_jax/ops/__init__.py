"""Convolution and pooling, lowered for the platform that the program is compiled for."""

from xception_jax.ops.conv import conv
from xception_jax.ops.pooling import avg_pool, max_pool

__all__ = ["avg_pool", "conv", "max_pool"]
