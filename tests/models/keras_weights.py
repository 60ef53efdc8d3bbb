"""The reference: networks of keras.applications with random weights, and the same weights in our variables.

Keras fills its tensors; `copy_weights` moves them into a tree shaped like ours and refuses a tensor that is left over,
a place that stays empty, or a shape that does not fit. Weights are not the initial ones: every kernel, gamma, beta,
mean and variance is drawn far from its default, so that a forgotten or swapped one changes the output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

os.environ["KERAS_BACKEND"] = "jax"

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras.src.backend.common import dtypes as keras_dtypes

from xception_jax.config import resolve_model
from xception_jax.models import create_model
from xception_jax.weights.keras_layers import targets

APPLICATIONS = {"xception": "Xception", "inception_v3": "InceptionV3"}
_WITH_WEIGHTS = (
    keras.layers.Conv2D,
    keras.layers.SeparableConv2D,
    keras.layers.BatchNormalization,
    keras.layers.Dense,
)

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A Keras network, the variables of ours that hold the same weights, and what belongs to what.

    Attributes:
      keras_model: gives a dict of named outputs: our endpoints and `logits`.
      model: our network with the same computation type, without dropout.
      variables: `params` and `batch_stats` of our network.
      paths: for each variable of the Keras network, by its id, where it is in `variables`.
    """

    keras_model: keras.Model
    model: nn.Module
    variables: dict[str, Any]
    paths: dict[int, Path]

    def to_tree(self, keras_variables: list, values: list) -> dict[Path, np.ndarray]:
        """Returns values (weights or gradients) of Keras variables by their path in our tree, in our shapes."""
        return {
            self.paths[id(variable)]: _in_our_shape(np.asarray(value), self.paths[id(variable)])
            for variable, value in zip(keras_variables, values, strict=True)
        }


@contextlib.contextmanager
def keras_floatx(dtype: str) -> Iterator[None]:
    """Keras builds and computes in `dtype`, and JAX has 64 bits if that needs them; both as before afterwards."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    # On JAX, Keras' own type promotion turns float64 into float32, in BatchNorm among others: 1e-6 is then the floor.
    promotion = mock.patch.dict(keras_dtypes.BIT64_TO_BIT32_DTYPE, {"float64": dtype})
    with jax.enable_x64(dtype == "float64"), promotion:
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        try:
            yield
        finally:
            keras.config.set_floatx(floatx)
            keras.config.set_dtype_policy(policy)


def build_reference(name: str, dtype: str, seed: int = 0, num_classes: int = 1000) -> Reference:
    """Builds both networks; call it and use what it returns inside `keras_floatx(dtype)`."""
    keras_model = build_keras(name, num_classes=num_classes)
    randomise(keras_model, seed)
    model = create_model({"name": name, "num_classes": num_classes, "dtype": dtype, "dropout_rate": 0.0})
    variables, paths = copy_weights(name, keras_model, model)
    return Reference(with_endpoints(name, keras_model), model, variables, paths)


def build_keras(name: str, *, include_top: bool = True, num_classes: int = 1000) -> keras.Model:
    """Builds a network of keras.applications for images of any size; its weights are to be overwritten."""
    application = getattr(keras.applications, APPLICATIONS[name])
    images = keras.Input((None, None, 3))
    with mock.patch.object(keras.initializers.GlorotUniform, "__call__", _zeros):
        if not include_top:
            return application(include_top=False, weights=None, input_tensor=images)
        return application(weights=None, input_tensor=images, classes=num_classes, classifier_activation=None)


def _zeros(self, shape, dtype=None):
    """Stands for an initialiser: drawing random numbers compiles a program for each shape, half a minute in all."""
    del self
    return np.zeros(shape, dtype or keras.config.floatx())


def with_endpoints(name: str, keras_model: keras.Model) -> keras.Model:
    """Returns the same network with a dict of outputs, named as our endpoints."""
    outputs = {}
    if name == "xception":
        additions = _by_creation([layer for layer in keras_model.layers if isinstance(layer, keras.layers.Add)])
        outputs |= {f"block{block}": layer.output for block, layer in enumerate(additions, start=2)}
        outputs |= {
            f"block{b}": keras_model.get_layer(f"block{b}_{n}_act").output for b, n in ((1, "conv2"), (14, "sepconv2"))
        }
    else:
        outputs |= {f"mixed{i}": keras_model.get_layer(f"mixed{i}").output for i in range(11)}
    outputs["pre_logits"] = keras_model.get_layer("avg_pool").output
    outputs["logits"] = keras_model.output
    return keras.Model(keras_model.inputs, outputs)


def randomise(keras_model: keras.Model, seed: int) -> None:
    """Draws every variable anew, at a scale that keeps activations near 1 through all layers."""
    rng = np.random.default_rng(seed)
    for variable in keras_model.variables:
        shape, kind = tuple(variable.shape), variable.name
        if kind in ("kernel", "depthwise_kernel", "pointwise_kernel"):
            fan_in = np.prod(shape[:2]) if kind == "depthwise_kernel" else np.prod(shape[:-1])
            gain = 2.0 if kind == "kernel" and len(shape) == 4 else 1.5
            value = rng.normal(0, np.sqrt(gain / fan_in), shape)
        elif kind == "gamma":
            value = rng.uniform(0.4, 0.9, shape) * rng.choice([-1, 1], shape)
        elif kind in ("beta", "moving_mean", "bias"):
            value = rng.normal(0, 0.4, shape)
        elif kind == "moving_variance":
            value = rng.uniform(0.4, 2.0, shape)
        else:
            raise ValueError(f"no rule for variable {variable.path}")
        variable.assign(jnp.asarray(value, variable.dtype))


def copy_weights(name: str, keras_model: keras.Model, model: nn.Module) -> tuple[dict[str, Any], dict[int, Path]]:
    """Returns our variables with the weights of a Keras network, and the path of each Keras variable in them.

    Raises:
      ValueError: a Keras tensor does not fit the place it belongs to, or a place is left empty.
    """
    template = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 299, 299, 3))))
    places = {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(template)[0]}
    paths = {id(variable): path for variable, path in _variable_paths(name, keras_model)}
    tree: dict[str, Any] = {}
    for variable in keras_model.variables:
        path = paths[id(variable)]
        value = _in_our_shape(np.asarray(variable.value), path)
        if path not in places or value.shape != places[path].shape:
            raise ValueError(f"{variable.path} {value.shape} does not fit {'/'.join(path)}: {places.get(path)}")
        places.pop(path)  # So that no place is filled twice.
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jnp.asarray(value)
    if places:
        raise ValueError(f"left empty: {sorted(places)}")
    return tree, paths


def _by_creation(layers: list) -> list:
    """Sorts layers of one class by the number at the end of their automatic names, which counts creations."""
    return sorted(layers, key=lambda layer: int((re.search(r"_(\d+)$", layer.name) or ["", "0"])[1]))


def _variable_paths(name: str, keras_model: keras.Model) -> Iterator[tuple[Any, Path]]:
    """Links them as weight files are read: by the order of the layers."""
    theirs = [layer for layer in keras_model.layers if isinstance(layer, _WITH_WEIGHTS)]
    for layer, ours in zip(theirs, targets(resolve_model({"name": name})), strict=True):
        for variable, leaf in zip(layer.variables, ours.leaves, strict=True):
            yield variable, tuple(leaf.split("/"))


def _in_our_shape(value: np.ndarray, path: Path) -> np.ndarray:
    """Keras' depthwise kernel is (3, 3, C, M), ours (3, 3, 1, C * M) with the M filters of a channel side by side."""
    if path[-2:] == ("spatial", "kernel"):
        return value.reshape(*value.shape[:2], 1, -1)
    return value
