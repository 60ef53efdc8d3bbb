"""Grad-CAM equals Keras' documented guide, computed by Keras on the same weights, whichever way they travel."""

from __future__ import annotations

import functools
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
import pytest

from tests.data.small_imagenet import photograph
from tests.models.keras_weights import randomise
from tests.weights.released import narrow, narrow_xception, no_initialisers
from xception_jax.explain import methods
from xception_jax.models import create_model
from xception_jax.weights import load_keras

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def classifier() -> keras.Model:
    base = narrow_xception()
    with no_initialisers():
        outputs = keras.layers.Dense(7)(keras.layers.GlobalAveragePooling2D()(base.output))
    return keras.Model(base.input, outputs)


@pytest.fixture(scope="module")
def keras_model() -> keras.Model:
    model = classifier()
    randomise(model, seed=3)
    return model


def grad_cam_of_the_guide(model: keras.Model, layer: keras.layers.Layer, image: np.ndarray, label: int | None):
    """keras.io/examples/vision/grad_cam, with the gradient tape in the form that the JAX backend has."""
    last_conv_layer_model = keras.Model(model.input, layer.output)
    classifier_model = keras.Model(layer.output, model.output)
    last_conv_layer_output = jax.jit(last_conv_layer_model)(image[None])

    @jax.jit
    @jax.grad
    def class_channel(activation):
        predictions = classifier_model(activation)
        chosen = jax.numpy.argmax(predictions[0]) if label is None else label
        return predictions[0, chosen]

    gradients = class_channel(last_conv_layer_output)
    pooled_gradients = np.mean(gradients, axis=(0, 1, 2))
    heatmap = np.asarray(last_conv_layer_output[0] @ pooled_gradients)
    return np.maximum(heatmap, 0) / heatmap.max()


def our_grad_cam(config, variables, image, label, block):
    method = functools.partial(methods.grad_cam, create_model(config), classes=label, endpoint=block)
    return jax.jit(method)(variables, image[None]).maps[0]


@pytest.mark.parametrize(("block", "label"), [("block14", None), ("block4", 0)])
def test_maps_are_those_of_the_guide(keras_model, block, label, tmp_path):
    keras_model.save(tmp_path / "x.keras")
    variables = load_keras(tmp_path / "x.keras", narrow(num_classes=7))
    image = photograph(2, 96)[:71, :71] / np.float32(127.5) - 1
    additions = [each for each in keras_model.layers if isinstance(each, keras.layers.Add)]
    layers = {f"block{number}": each for number, each in enumerate(additions, start=2)}
    layers["block14"] = keras_model.get_layer("block14_sepconv2_act")
    expected = grad_cam_of_the_guide(keras_model, layers[block], image, label)
    found = our_grad_cam(narrow(num_classes=7), variables, image, label, block)
    assert expected.max() == 1
    np.testing.assert_allclose(found / found.max(), expected, atol=2e-4)
