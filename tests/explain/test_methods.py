"""Grad-CAM, HiResCAM and integrated gradients: exact identities on small networks with random weights."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.random_weights import random_variables
from xception_jax.data.images import Preprocessing
from xception_jax.data.turn import Turn
from xception_jax.explain import methods
from xception_jax.explain.endpoints import cut, list_endpoints
from xception_jax.explain.explainer import uniform_image
from xception_jax.explain.options import METHODS
from xception_jax.models import create_model

NETWORKS = {
    "xception": ({"width_multiplier": 0.05, "middle_blocks": 0}, 71),
    "inception_v3": ({"name": "inception_v3", "width_multiplier": 0.05}, 107),
}


class Small:
    """A network with its variables and a batch of two images."""

    def __init__(self, name: str, num_classes: int = 5):
        fields, self.size = NETWORKS[name]
        self.model = create_model(fields | {"num_classes": num_classes})
        self.images = np.random.default_rng(1).normal(size=(2, self.size, self.size, 3)).astype(np.float32)
        self.variables = random_variables(self.model, self.images)
        self.dense = self.variables["params"]["head"]["predictions"]
        self._compiled = {}

    def __call__(self, method: str, classes=None, **options) -> methods.Explanation:
        key = f"{method} {options}"
        if key not in self._compiled:
            self._compiled[key] = jax.jit(functools.partial(methods.FUNCTIONS[method], self.model, **options))
        given = classes if classes is None else np.broadcast_to(classes, 2)
        return self._compiled[key](self.variables, self.images, given)

    def on(self, method: str, images, **options) -> methods.Explanation:
        return jax.jit(functools.partial(methods.FUNCTIONS[method], self.model, **options))(self.variables, images)


@pytest.fixture(scope="module")
def xception() -> Small:
    return Small("xception")


@pytest.fixture(scope="module", params=NETWORKS)
def small(request) -> Small:
    return Small(request.param)


@pytest.mark.parametrize("name", ["black", "white", "grey"])
def test_a_baseline_is_turned_as_images_are(name):
    view = Preprocessing(size=4)
    plain, turn = uniform_image(view, name), Turn("free", 1.0, 0)
    found = uniform_image(dataclasses.replace(view, turn=turn), name)[0]
    turn.back()(found)
    np.testing.assert_allclose(found, np.broadcast_to(plain[0], found.shape), atol=1e-6)


def test_every_method_that_is_named_has_a_function():
    assert list(METHODS) == list(methods.FUNCTIONS)


def test_endpoints_are_listed_in_the_order_of_the_network():
    deep = create_model({"width_multiplier": 0.02})
    images = jax.ShapeDtypeStruct((1, 71, 71, 3), jnp.float32)
    variables = jax.eval_shape(lambda: deep.init(jax.random.key(0), jnp.zeros(images.shape)))
    assert list_endpoints(deep, variables, 71) == [f"block{number}" for number in range(1, 15)]


def test_at_the_last_block_the_maps_are_cam(small):
    """The logit is the mean over positions of the product of activation and classifier, plus a bias."""
    last = list_endpoints(small.model, small.variables, small.size)[-1]

    @jax.jit
    def explained(variables, images, classes):
        logits, endpoints = small.model.apply(variables, images)
        maps = [method(small.model, variables, images, classes) for method in (methods.grad_cam, methods.hires_cam)]
        return logits, endpoints[last], *maps

    classes = np.array([1, 4])
    for given, sign in ((classes, 1), (~classes, -1)):
        logits, activation, gradient_weighted, elementwise = explained(small.variables, small.images, given)
        expected = np.einsum("bhwc,cb->bhw", activation, small.dense["kernel"][:, classes])
        positions = expected[0].size
        assert (expected > 0).any()
        np.testing.assert_array_equal(elementwise.classes, classes)
        expected *= sign / positions
        np.testing.assert_allclose(gradient_weighted.maps, np.maximum(expected, 0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(elementwise.maps, expected, rtol=1e-4, atol=1e-6)
        chosen = logits[np.arange(2), classes] - small.dense["bias"][classes]
        np.testing.assert_allclose(elementwise.maps.sum((1, 2)), sign * chosen, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block", ["block1", "block4"])
def test_the_rest_of_the_network_continues_from_an_inner_block(xception, block):
    @jax.jit
    def continued(variables, images):
        activation, logits_of = cut(xception.model, variables, images, block)
        expected, _ = xception.model.apply(variables, images)
        return expected, logits_of(activation), logits_of(activation * 0)

    expected, logits, without = continued(xception.variables, xception.images)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    np.testing.assert_allclose(without[0], without[1], rtol=1e-5)  # it sees nothing of the images
    assert np.abs(logits - without).max() > 0.01


def test_the_most_probable_class_is_explained_unless_another_is_asked_for(xception):
    default = xception("hires_cam", endpoint="block4")
    np.testing.assert_array_equal(default.classes, default.logits.argmax(-1))
    again = xception("hires_cam", np.asarray(default.classes), endpoint="block4")
    np.testing.assert_allclose(again.maps, default.maps, rtol=1e-5)
    other = xception("hires_cam", (np.asarray(default.classes) + 1) % 5, endpoint="block4")
    assert np.abs(other.maps - default.maps).max() > 1e-3
    np.testing.assert_array_equal(xception("grad_cam", 3).classes, [3, 3])


@pytest.mark.parametrize("method", METHODS)
def test_a_single_logit_is_explained_by_its_sign(method):
    single = Small("xception", num_classes=1)
    logits = jax.jit(single.model.apply)(single.variables, single.images)[0]
    single.variables["params"]["head"]["predictions"]["bias"] -= logits.mean()  # one positive, one negative
    decision, presence, absence = single(method), single(method, 0), single(method, ~0)
    positive = int(np.argmax(decision.logits[:, 0]))
    assert sorted(np.sign(decision.logits[:, 0])) == [-1, 1]
    assert decision.classes.tolist() == [0, 0]
    assert decision.signs[positive] == 1
    assert decision.signs[1 - positive] == -1
    np.testing.assert_allclose(decision.maps[positive], presence.maps[positive], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(decision.maps[1 - positive], absence.maps[1 - positive], rtol=1e-4, atol=1e-7)
    assert presence.signs.tolist() == [1, 1]


@pytest.mark.parametrize("wrong", [5, ~5, [0, 7]])
def test_a_class_that_the_network_does_not_have_is_refused(xception, wrong):
    with pytest.raises(ValueError, match="there is no class"):
        methods.grad_cam(xception.model, xception.variables, xception.images, wrong)
    with pytest.raises(ValueError, match="there is no class"):
        jax.eval_shape(lambda v, x: methods.grad_cam(xception.model, v, x, wrong), xception.variables, xception.images)


def test_a_path_has_points(xception):
    with pytest.raises(ValueError, match="steps is 0"):
        methods.integrated_gradients(xception.model, xception.variables, xception.images, steps=0)


def test_the_points_of_a_path_do_not_depend_on_the_dtype_of_the_images(xception):
    """In bfloat16, numbers above 256 are rounded to even ones."""
    images = jnp.asarray(xception.images, jnp.bfloat16)
    found = xception.on("integrated_gradients", images, steps=300, batch_size=100)
    expected = xception.on("integrated_gradients", images.astype(jnp.float32), steps=300, batch_size=100)
    scale = np.abs(expected.maps).max()
    np.testing.assert_allclose(found.maps.astype(np.float32), expected.maps, rtol=0, atol=0.02 * scale)


def test_integrated_gradients_sum_to_the_difference_of_the_logits(xception):
    baseline = np.full((1, 1, 1, 3), -1.0, np.float32)
    start = np.broadcast_to(baseline, xception.images.shape)
    there, here = (jax.jit(xception.model.apply)(xception.variables, images)[0] for images in (xception.images, start))
    expected = (there - here)[:, 2]
    coarse, fine = (xception("integrated_gradients", 2, baseline=baseline, steps=n, batch_size=16) for n in (4, 128))
    np.testing.assert_allclose(fine.maps.sum((1, 2)), expected, rtol=0.03, atol=0.005)
    for explanation in (coarse, fine):
        residuals = explanation.maps.sum((1, 2)) - expected
        np.testing.assert_allclose(explanation.residuals, residuals, atol=1e-4)
    assert np.abs(fine.residuals).max() < np.abs(coarse.residuals).max()


def test_the_batch_of_steps_does_not_change_integrated_gradients(xception):
    one, several = (xception("integrated_gradients", 2, steps=7, batch_size=size) for size in (1, 6))
    np.testing.assert_allclose(several.maps, one.maps, rtol=1e-3, atol=1e-6)


class Squared(nn.Module):
    """A network whose gradient is linear: the midpoint rule is exact with any number of steps."""

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(4)(jnp.square(images).reshape(len(images), -1)), {}


@pytest.mark.parametrize("steps", [1, 3])
def test_integrated_gradients_of_a_quadratic_network_are_exact(steps):
    model, images = Squared(), np.random.default_rng(0).normal(size=(3, 5, 5, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), images)
    found = methods.integrated_gradients(model, variables, images, 1, steps=steps, baseline=0.5)
    weights = variables["params"]["Dense_0"]["kernel"][:, 1].reshape(5, 5, 3)
    expected = ((np.square(images) - 0.25) * weights).sum(-1)
    np.testing.assert_allclose(found.maps, expected, rtol=1e-4, atol=1e-5)


def test_an_endpoint_that_is_no_operation_is_refused():
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            return images.mean((1, 2)), {"images": images, "pooled": 2 * images.mean((1, 2))}

    with pytest.raises(ValueError, match="is not an operation"):
        cut(Plain(), {}, np.zeros((1, 4, 4, 3), np.float32), "images")
    with pytest.raises(ValueError, match="has no positions"):
        cut(Plain(), {}, np.zeros((1, 4, 4, 3), np.float32), "pooled")
