"""Networks of keras.applications with random weights, and the same weights in our variables."""

from __future__ import annotations

import os
from unittest import mock

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from keras.src.applications import xception as keras_xception

from tests.models.keras_weights import _zeros, build_keras, copy_weights, keras_floatx, randomise
from xception_jax.config import resolve_model
from xception_jax.models import create_model
from xception_jax.weights import tree


def config(name: str, **fields):
    """Returns a resolved `config.model`."""
    return resolve_model({"name": name, **fields})


def no_initialisers():
    """Skips the initialisers, which compile a program for each shape; all weights are overwritten."""
    return mock.patch.object(keras.initializers.GlorotUniform, "__call__", _zeros)


class Released:
    """A network of keras.applications with random weights in float32, and the same weights in our variables.

    Attributes:
      name: of the network.
      keras_model: with the classifier.
      model: its `config.model`.
      leaves: our variables by name, by the mapping in memory that the parity tests use.
    """

    def __init__(self, name: str):
        self.name, self.model = name, config(name)
        with keras_floatx("float32"):
            self.keras_model = build_keras(name)
            randomise(self.keras_model, seed=1)
            variables, _ = copy_weights(name, self.keras_model, create_model(self.model))
        self.leaves = {leaf: np.asarray(value) for leaf, value in tree.flatten(variables).items()}
        self.backbone_leaves = {leaf: value for leaf, value in self.leaves.items() if not leaf.startswith(tree.HEAD)}

    def backbone(self) -> keras.Model:
        """Returns the network without its classifier, with the same weights."""
        backbone = build_keras(self.name, include_top=False)
        backbone.set_weights(self.keras_model.get_weights()[:-2])
        return backbone


NARROW = 0.1


def narrow_xception(height: int | None = 71, width: int | None = 71) -> keras.Model:
    """Returns Keras' Xception without its classifier and with a tenth of its filters: 300,000 parameters."""

    def scaled(layer):
        return lambda filters, *args, **kwargs: layer(round(filters * NARROW), *args, **kwargs)

    narrow = mock.patch.multiple(
        keras.layers, Conv2D=scaled(keras.layers.Conv2D), SeparableConv2D=scaled(keras.layers.SeparableConv2D)
    )
    with narrow, mock.patch.object(keras_xception, "layers", keras.layers), no_initialisers():
        return keras.applications.Xception(weights=None, include_top=False, input_shape=(height, width, 3))


def narrow(**fields):
    """Returns the `config.model` of `narrow_xception`."""
    return config("xception", width_multiplier=NARROW, **fields)


def assert_same(variables, expected: dict[str, np.ndarray]) -> None:
    """Asserts the same names, dtypes, shapes and bits."""
    found = tree.flatten(variables)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)
