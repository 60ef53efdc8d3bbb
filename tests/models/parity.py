"""Runs a network of ours and the Keras one on the same images and tells how far apart they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from keras_weights import Reference


def side_by_side(*functions: Callable):
    """Calls two functions at a time, since most of each is compiling on one core; returns the results of all."""
    x64 = jax.config.jax_enable_x64

    def call(function):
        with jax.enable_x64(x64):  # A setting of the thread.
            return function()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, functions))


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference within one tensor, and the largest value of the reference to measure it by."""

    absolute: float
    largest: float

    @property
    def relative(self) -> float:
        return self.absolute / self.largest


def difference(ours, reference) -> Difference:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, f"{ours.shape} beside {reference.shape}"
    assert np.isfinite(reference).all(), "the reference has values that are not finite"
    return Difference(float(np.abs(ours - reference).max()), float(np.abs(reference).max()))


def random_images(size: int, batch: int, dtype: str, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (batch, size, size, 3)), dtype)


def keras_outputs(reference: Reference, images: jax.Array, compiler_options=None) -> dict[str, jax.Array]:
    keras_model = reference.keras_model

    @partial(jax.jit, compiler_options=compiler_options)
    def forward(trainable, non_trainable, images):
        return keras_model.stateless_call(trainable, non_trainable, images, training=False)[0]

    trainable = [variable.value for variable in keras_model.trainable_variables]
    return forward(trainable, [variable.value for variable in keras_model.non_trainable_variables], images)


def our_outputs(model: nn.Module, variables, images: jax.Array, compiler_options=None) -> dict[str, jax.Array]:
    logits, endpoints = jax.jit(model.apply, compiler_options=compiler_options)(variables, images)
    return {**endpoints, "logits": logits}


def forward_differences(ours: dict[str, jax.Array], reference: dict[str, jax.Array]) -> dict[str, Difference]:
    """Returns the difference of every output; both must have the same ones."""
    assert sorted(ours) == sorted(reference)
    return {name: difference(ours[name], reference[name]) for name in reference}


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """What one step computes: the loss, and gradients and updated running averages by path."""

    loss: float
    values: dict[tuple[str, ...], np.ndarray]


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def keras_step(reference: Reference, images, labels, compiler_options=None) -> TrainingStep:
    keras_model = reference.keras_model
    trainable, non_trainable = keras_model.trainable_variables, keras_model.non_trainable_variables

    def loss(trainable, non_trainable, images):
        outputs, updated = keras_model.stateless_call(trainable, non_trainable, images, training=True)
        return _cross_entropy(outputs["logits"], labels), updated

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=compiler_options)
    (value, updated), gradients = step([v.value for v in trainable], [v.value for v in non_trainable], images)
    values = reference.to_tree(trainable, gradients) | reference.to_tree(non_trainable, updated)
    return TrainingStep(float(value), values)


def our_step(model: nn.Module, variables, images, labels, compiler_options=None) -> TrainingStep:
    def loss(params, batch_stats, images):
        variables = {"params": params, "batch_stats": batch_stats}
        (logits, _), updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return _cross_entropy(logits, labels), updated

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=compiler_options)
    (value, updated), gradients = step(variables["params"], variables["batch_stats"], images)
    leaves = jax.tree_util.tree_flatten_with_path({"params": gradients, **updated})[0]
    return TrainingStep(float(value), {tuple(key.key for key in path): np.asarray(leaf) for path, leaf in leaves})
