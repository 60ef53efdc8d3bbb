"""Figures 1 to 4 and the separable convolution against computations written out."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from random_weights import random_variables

from xception_jax.config.model import XceptionConfig
from xception_jax.models.layers import BatchNorm, Conv
from xception_jax.models.modules import (
    InceptionModule,
    RegularConv,
    SeparableConv,
    SimplifiedInceptionModule,
    figure_3_from_figure_2,
)

pytestmark = pytest.mark.smoke

CHANNELS = 6
FLOAT64 = jnp.dtype("float64")


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def native(x, kernel, segments=1):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=segments
    )


def assert_close(a, b):
    assert a.dtype == b.dtype == FLOAT64
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_channels_that_cannot_be_divided_are_not_left_out():
    x = jnp.zeros((1, 4, 4, 8))
    with pytest.raises(ValueError, match="64 features are not a multiple of towers=3"):
        SimplifiedInceptionModule(64).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="depth_multiplier=4"):
        SeparableConv(10, order="pointwise_first", depth_multiplier=4).init(jax.random.key(0), x)
    for width in (3, 16):
        with pytest.raises(ValueError, match=f"8 features are not a multiple of group_width={width}"):
            SeparableConv(10, group_width=width).init(jax.random.key(0), x)


@pytest.mark.parametrize("towers", [1, 3, 4])
def test_figure_2_equals_figure_3(towers):
    """The paper's "strictly equivalent reformulation", in values and in gradients of weights and input."""
    figure_2 = SimplifiedInceptionModule(24, towers=towers, dtype=FLOAT64)
    figure_3 = SeparableConv(24, segments=towers, order="pointwise_first", dtype=FLOAT64)
    x, dy = draw((2, 7, 8, CHANNELS)), draw((2, 7, 8, 24), 1)
    params = random_variables(figure_2, x)["params"]
    mapped = figure_3_from_figure_2(params)
    assert jax.tree.map(jnp.shape, mapped) == jax.tree.map(jnp.shape, random_variables(figure_3, x)["params"])

    def step(module, params, x, dy):
        y, vjp = jax.vjp(lambda params, x: module.apply({"params": params}, x), params, x)
        return y, *vjp(dy)

    step = jax.jit(step, static_argnums=0)
    y_2, dparams_2, dx_2 = step(figure_2, params, x, dy)
    y_3, dparams_3, dx_3 = step(figure_3, mapped, x, dy)
    assert_close(y_2, y_3)
    assert_close(dx_2, dx_3)
    # The map only puts weights side by side, so it maps gradients too.
    jax.tree.map(assert_close, figure_3_from_figure_2(dparams_2), dparams_3)


def test_more_segments_are_another_function():
    """The comparison above can fail: with the same shapes of y, the wrong number of towers does not fit or differs."""
    x = draw((1, 5, 5, CHANNELS))
    params = figure_3_from_figure_2(random_variables(SimplifiedInceptionModule(24, 3, FLOAT64), x)["params"])
    shuffled = {**params, "spatial": {"kernel": params["spatial"]["kernel"][..., ::-1]}}
    module = SeparableConv(24, segments=3, order="pointwise_first", dtype=FLOAT64)
    apply = jax.jit(module.apply)
    difference = apply({"params": params}, x) - apply({"params": shuffled}, x)
    assert jnp.abs(difference).max() > 1e-3


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: np.where(x > 0, x, 0),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.25 * x),
    "scaled": lambda x: x / np.sqrt((x**2).mean((1, 2, 3), keepdims=True)),
    "scaled_elu": lambda x: ACTIVATIONS["elu"](x / np.sqrt((x**2).mean((1, 2, 3), keepdims=True))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", ["depthwise_first", "pointwise_first"])
def test_separable_convolution_step_by_step(order, activation):
    """Depthwise first is Xception's; pointwise first, with one 3 x 3 for each channel, is figure 4."""
    module = SeparableConv(8, order=order, intermediate_activation=activation, intermediate_slope=0.25, dtype=FLOAT64)
    x = draw((2, 5, 6, CHANNELS))
    params = random_variables(module, x)["params"]
    pointwise, spatial = np.asarray(params["pointwise"]["kernel"][0, 0]), np.asarray(params["spatial"]["kernel"])

    def depthwise(x):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows, columns = x.shape[1:3]
        taps = [padded[:, i : i + rows, j : j + columns] * spatial[i, j, 0] for i in range(3) for j in range(3)]
        return np.sum(taps, axis=0)

    f = ACTIVATIONS[activation]
    expected = (
        depthwise(f(np.asarray(x) @ pointwise))
        if order == "pointwise_first"
        else f(depthwise(np.asarray(x))) @ pointwise
    )
    assert_close(jax.jit(module.apply)({"params": params}, x), expected)


@pytest.mark.parametrize(
    ("fields", "segments", "spatial_shape", "pointwise_shape"),
    [
        ({"segments": 1}, 1, (3, 3, 6, 6), (1, 1, 6, 12)),
        ({"segments": 3}, 3, (3, 3, 2, 6), (1, 1, 6, 12)),
        ({"segments": "depthwise"}, 6, (3, 3, 1, 6), (1, 1, 6, 12)),
        ({"group_width": 3}, 2, (3, 3, 3, 6), (1, 1, 6, 12)),
        ({"group_width": "all"}, 1, (3, 3, 6, 6), (1, 1, 6, 12)),
        ({"kernel_size": 5}, 6, (5, 5, 1, 6), (1, 1, 6, 12)),
        ({"depth_multiplier": 2}, 6, (3, 3, 1, 12), (1, 1, 12, 12)),
        ({"depth_multiplier": 2, "segments": 3}, 3, (3, 3, 2, 12), (1, 1, 12, 12)),
    ],
)
def test_options_of_the_separable_convolution(fields, segments, spatial_shape, pointwise_shape):
    module = SeparableConv(12, dtype=FLOAT64, **fields)
    x = draw((1, 5, 6, CHANNELS))
    params = random_variables(module, x)["params"]
    assert params["spatial"]["kernel"].shape == spatial_shape
    assert params["pointwise"]["kernel"].shape == pointwise_shape

    @jax.jit
    def expected(params, x):
        return native(native(x, params["spatial"]["kernel"], segments), params["pointwise"]["kernel"])

    assert_close(jax.jit(module.apply)({"params": params}, x), expected(params, x))


def test_pointwise_first_with_a_depth_multiplier_keeps_the_output_channels():
    module = SeparableConv(12, order="pointwise_first", depth_multiplier=2, dtype=FLOAT64)
    x = draw((1, 5, 6, CHANNELS))
    variables = random_variables(module, x)
    assert variables["params"]["pointwise"]["kernel"].shape == (1, 1, 6, 6)
    assert variables["params"]["spatial"]["kernel"].shape == (3, 3, 1, 12)
    assert jax.eval_shape(module.apply, variables, x).shape == (1, 5, 6, 12)


@pytest.mark.parametrize("features", [16, 19])
def test_figure_1_step_by_step(features):
    module = InceptionModule(features, norm=partial(BatchNorm, dtype=FLOAT64), dtype=FLOAT64)
    x = draw((2, 6, 7, CHANNELS))
    variables = random_variables(module, x, True)
    width, rest = features // 4, features - 3 * (features // 4)
    shapes = {name: leaf["kernel"].shape for name, leaf in variables["params"].items() if "kernel" in leaf}
    assert shapes == {
        "tower_1x1": (1, 1, CHANNELS, width),
        "tower_3x3_reduce": (1, 1, CHANNELS, width),
        "tower_3x3": (3, 3, width, width),
        "tower_double_reduce": (1, 1, CHANNELS, width),
        "tower_double_1": (3, 3, width, width),
        "tower_double_2": (3, 3, width, width),
        "tower_pool": (1, 1, CHANNELS, rest),
    }

    @jax.jit
    def figure_1(variables, x):
        params, batch_stats = variables["params"], variables["batch_stats"]

        def conv(x, name):
            return native(x, params[name]["kernel"])

        def conv_bn_relu(x, name):
            bn, running = params[f"{name}_bn"], batch_stats[f"{name}_bn"]
            normalised = (conv(x, name) - running["mean"]) / jnp.sqrt(running["var"] + 1e-3)
            return jnp.maximum(normalised * bn["scale"] + bn["bias"], 0)

        ones = jnp.ones((3, 3, 1, CHANNELS))
        average = native(x, ones, CHANNELS) / native(jnp.ones_like(x), ones, CHANNELS)
        towers = [
            conv(x, "tower_1x1"),
            conv(conv_bn_relu(x, "tower_3x3_reduce"), "tower_3x3"),
            conv(conv_bn_relu(conv_bn_relu(x, "tower_double_reduce"), "tower_double_1"), "tower_double_2"),
            conv(average, "tower_pool"),
        ]
        return jnp.concatenate(towers, axis=-1)

    y = jax.jit(module.apply, static_argnums=2)(variables, x, False)
    assert y.shape == (2, 6, 7, features)
    assert_close(y, figure_1(variables, x))


@pytest.mark.parametrize(
    ("fields", "divisor"),
    [
        ({}, 1),
        ({"segments": 4, "depth_multiplier": 2}, 4),
        ({"segments": 4, "depth_multiplier": 2, "order": "pointwise_first"}, 8),
        ({"group_width": 8}, 8),
        ({"group_width": "all"}, 1),
    ],
)
def test_channel_divisor(fields, divisor):
    assert XceptionConfig(**fields).channel_divisor == divisor


@pytest.mark.parametrize("order", ["depthwise_first", "pointwise_first"])
def test_a_batch_norm_between_the_convolutions(order):
    """It stands before the activation, and is the only difference."""
    norm = partial(BatchNorm, dtype=FLOAT64)
    fields = {"order": order, "intermediate_activation": "relu", "dtype": FLOAT64}
    with_norm = SeparableConv(8, intermediate_norm=norm, **fields)
    x = draw((4, 5, 6, CHANNELS))
    variables = random_variables(with_norm, x, True)
    params, names = variables["params"], ("spatial", "pointwise")
    assert set(params) == {*names, "intermediate_bn"}
    first, second = names if order == "depthwise_first" else names[::-1]
    segments = {"spatial": CHANNELS if order == "depthwise_first" else 8, "pointwise": 1}

    def normalized(train):
        y = native(x, params[first]["kernel"], segments[first])
        between = {kind: variables[kind]["intermediate_bn"] for kind in variables}
        y, _ = norm().apply(between, y, train, mutable=["batch_stats"])
        return native(jnp.maximum(y, 0), params[second]["kernel"], segments[second])

    for train in (True, False):
        found, updates = with_norm.apply(variables, x, train, mutable=["batch_stats"])
        assert_close(found, normalized(train))
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), updates, {"batch_stats": variables["batch_stats"]})
        assert all(jax.tree.leaves(moved)) == train


@pytest.mark.parametrize("segments", [1, 4, 64])
def test_variance_preserving_keeps_the_variance_and_glorot_does_not(segments):
    """Glorot's fans are those of the whole layer, so that the variance falls with the number of segments."""
    x = draw((8, 12, 12, 64))
    gains = {}
    for name in ("glorot", "variance_preserving"):
        layer = Conv(64, (3, 3), segments=segments, initialization=name, padding="VALID", dtype=FLOAT64)
        gains[name] = float(layer.init_with_output(jax.random.key(0), x)[0].var() / x.var())
    assert gains["variance_preserving"] == pytest.approx(1, rel=0.15)
    assert gains["glorot"] == pytest.approx(2 / (1 + segments), rel=0.15)


def test_regular_is_one_convolution_without_a_pointwise_partner():
    module, x = RegularConv(10, dtype=FLOAT64), draw((2, 5, 6, CHANNELS))
    params = random_variables(module, x)["params"]
    assert jax.tree.map(jnp.shape, params) == {"spatial": {"kernel": (3, 3, CHANNELS, 10)}}
    assert_close(jax.jit(module.apply)({"params": params}, x), native(x, params["spatial"]["kernel"]))
