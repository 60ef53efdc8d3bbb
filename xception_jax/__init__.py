"""Xception and Inception V3 in JAX and Flax.

`load` and `train` are imported on first use, so that commands which do not compute start without JAX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xception_jax.api import LoadedNetwork, load, train

__all__ = ["LoadedNetwork", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from xception_jax import api

    return getattr(api, name)
