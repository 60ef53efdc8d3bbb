"""Weight files of Keras, timm and our own, in and out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xception_jax.weights.keras import save_keras
    from xception_jax.weights.load import load_keras, load_network, load_timm
    from xception_jax.weights.network import Network, Preprocessing
    from xception_jax.weights.own import save_network
    from xception_jax.weights.timm import save_timm

__all__ = [
    "Network",
    "Preprocessing",
    "load_keras",
    "load_network",
    "load_timm",
    "save_keras",
    "save_network",
    "save_timm",
]

_MODULES = {
    "Network": "network",
    "Preprocessing": "network",
    "load_keras": "load",
    "load_network": "load",
    "load_timm": "load",
    "save_keras": "keras",
    "save_network": "own",
    "save_timm": "timm",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: `sources` and `released` must not wait for JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
