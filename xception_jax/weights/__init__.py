from xception_jax.weights.keras import load_keras
from xception_jax.weights.keras_write import save_keras
from xception_jax.weights.load import load_network
from xception_jax.weights.network import Network, Preprocessing
from xception_jax.weights.own import save_network
from xception_jax.weights.timm import load_timm

__all__ = ["Network", "Preprocessing", "load_keras", "load_network", "load_timm", "save_keras", "save_network"]
