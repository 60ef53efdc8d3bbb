"""Weight files of Keras, timm and our own, in and out."""

from xception_jax.weights.keras import save_keras
from xception_jax.weights.load import load_keras, load_network, load_timm
from xception_jax.weights.network import Network, Preprocessing
from xception_jax.weights.own import save_network

__all__ = ["Network", "Preprocessing", "load_keras", "load_network", "load_timm", "save_keras", "save_network"]
