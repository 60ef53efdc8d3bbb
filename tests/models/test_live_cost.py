"""Live weights and multiply-adds, against convolutions of ones that count them."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_jax import ops
from xception_jax.models import create_model
from xception_jax.models.cost import count_cost, live_taps
from xception_jax.models.layers import Conv
from xception_jax.models.trace import trace_layers
from xception_jax.ops.padding import explicit_padding

SMALL = {"num_classes": 10, "width_multiplier": 0.05, "middle_blocks": 1}
NETWORKS = {
    "depthwise": SMALL,
    "regular": SMALL | {"segments": 1},
    "grouped": SMALL | {"segments": 4, "padding": "symmetric"},
    "pointwise first": SMALL | {"order": "pointwise_first", "stem": "small"},
    "one convolution": SMALL | {"module": "regular"},
    "stem of modules": SMALL | {"stem": "module"},
    "towers": SMALL | {"module": "inception", "kernel_size": 5},
    "multiplier": SMALL | {"depth_multiplier": 2, "kernel_size": 7, "fc_layers": 1, "fc_width": 8},
    "inception_v3": {"name": "inception_v3", "num_classes": 3, "width_multiplier": 0.03},
    "inception_v3_2016": {"name": "inception_v3_2016", "num_classes": 3, "width_multiplier": 0.03},
}


@functools.cache
def counted_by_ones(size, window, stride, padding):
    """Returns (live taps, live products) by XLA's convolution of ones: each product is 1, or 0 in the padding."""
    padding = [(side // 2, side // 2) for side in window] if padding == "SYMMETRIC" else padding

    def products(kernel):
        return jax.lax.conv(jnp.ones((1, 1, *size)), kernel, (stride, stride), padding).sum()

    total, met = jax.value_and_grad(products)(jnp.ones((1, 1, *window)))
    return int((met > 0).sum()), round(float(total))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_of_every_network_is_counted_as_its_ones_are(name):
    size = 76 if name.startswith("inception") else 33
    model = create_model(NETWORKS[name])
    geometries = []

    def visit(layer, images, output):
        if isinstance(layer, Conv):
            weights = layer.get_variable("params", "kernel").size
            geometries.append((weights, images.shape[1:3], tuple(layer.kernel_size), layer.stride, layer.padding))

    variables = trace_layers(model, size, visit)
    dead, inside = 0, 0
    for weights, image, window, stride, padding in geometries:
        taps, products = counted_by_ones(image, window, stride, padding)
        per_tap = weights // math.prod(window)
        dead += weights - per_tap * taps
        inside += per_tap * products
    cost = count_cost(model, size)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    dense = sum(c.multiply_adds for name, c in cost.layers.items() if name.startswith("head/"))
    assert (cost.parameters, cost.live_parameters) == (parameters, parameters - dead)
    assert cost.live_multiply_adds == inside + dense < cost.multiply_adds
    assert (dead > 0) == (name not in ("pointwise first", "stem of modules"))  # whose smallest maps have three pixels


@pytest.mark.parametrize("segments", [1, 2, 8], ids=["regular", "grouped", "depthwise"])
@pytest.mark.parametrize("stride", [1, 2])
def test_our_own_convolution_of_ones_meets_as_many_pixels(segments, stride):
    """Every lowering for the platform of the tests, on a map of two pixels, where weights begin to be dead."""
    layer = Conv(8, (5, 3), stride=stride, segments=segments)
    image, kernel = jnp.ones((1, 2, 1, 8)), (5, 3, 8 // segments, 8)

    def products(kernel):
        return ops.conv(image, kernel, segments=segments, stride=stride, padding="SAME").sum()

    total, met = jax.value_and_grad(products)(jnp.ones(kernel))
    taps, pairs = live_taps((2, 1), (5, 3), stride, explicit_padding("SAME", (2, 1), layer.kernel_size, stride))
    assert (int((met > 0).sum()), int(total)) == (64 // segments * taps, 64 // segments * pairs)
    assert taps < 15


def test_taps_of_every_geometry():
    """Small images, kernels larger than they are, and strides larger than the kernel."""
    for n, m, k, stride, padding in itertools.product((1, 2, 5), (1, 4), (1, 3, 5), (1, 2, 3), ("SAME", "SYMMETRIC")):
        pads = explicit_padding(padding, (n, m), (k, 3), stride)
        image = np.pad(np.ones((n, m), int), pads)
        rows = range(0, image.shape[0] - k + 1, stride)
        columns = range(0, image.shape[1] - 3 + 1, stride)
        met = sum((image[i : i + k, j : j + 3] for i in rows for j in columns), np.zeros((k, 3), int))
        assert live_taps((n, m), (k, 3), stride, pads) == ((met > 0).sum(), met.sum()), (n, m, k, stride, padding)


def test_a_map_of_one_pixel_meets_one_tap():
    pads = explicit_padding("SAME", (1, 1), (3, 3), 1)
    assert live_taps((1, 1), (3, 3), 1, pads) == (1, 1)
    assert live_taps((7, 7), (3, 3), 1, explicit_padding("VALID", (7, 7), (3, 3), 1)) == (9, 9 * 25)


# Arms of the first studies: fields, and the rounded weights of all convolutions, live ones, multiply-adds, live ones.
FIRST_STUDIES = {
    "1 segment": ({"segments": 1, "width_multiplier": 0.07495}, (397, 244, 1.85, 1.19)),
    "16 segments": ({"segments": 16, "width_multiplier": 0.17}, (394, 346, 2.17, 1.95)),
    "depthwise": ({"width_multiplier": 0.2}, (392, 388, 1.88, 1.84)),
    "extreme": ({"order": "pointwise_first", "width_multiplier": 0.1992}, (391, 385, 1.90, 1.85)),
    "canonical": ({"module": "inception", "width_multiplier": 0.1199}, (392, 252, 1.67, 1.22)),
}


@pytest.mark.parametrize("arm", FIRST_STUDIES)
def test_equal_parameters_of_the_first_studies_were_not_equal_live_parameters(arm):
    fields, expected = FIRST_STUDIES[arm]
    cost = count_cost(create_model(SMALL | fields), 32)
    convolutions = [c for name, c in cost.layers.items() if c.multiply_adds and not name.startswith("head/")]
    weights = [sum(getattr(c, name) for c in convolutions) / 1e3 for name in ("parameters", "live_parameters")]
    products = [getattr(cost, name) / 1e6 for name in ("multiply_adds", "live_multiply_adds")]
    assert (*map(round, weights), *(round(value, 2) for value in products)) == expected
