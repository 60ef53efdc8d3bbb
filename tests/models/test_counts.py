"""Parameters and multiply-adds, exact where a paper or a reference states them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

from xception_jax.models import create_model
from xception_jax.models.cost import count_cost


def cost(image_size=299, **fields):
    return count_cost(create_model(fields), image_size)


@pytest.fixture(scope="module")
def xception():
    return cost()


@pytest.fixture(scope="module")
def inception_v3():
    return cost(name="inception_v3")


def test_xception(xception):
    assert xception.parameters == 22_855_952  # Table 3 of the paper.
    assert xception.parameters + xception.statistics == 22_910_480
    assert xception.multiply_adds == 8_357_403_496
    assert sum(xception.multiply_adds_by_layer.values()) == xception.multiply_adds
    depthwise = sum(cost for layer, cost in xception.multiply_adds_by_layer.items() if layer.endswith("/spatial"))
    assert round(100 * depthwise / xception.multiply_adds, 1) == 1.6


def test_xception_has_36_convolutional_layers(xception):
    """Section 3: 36 of them, a separable convolution being one, in 14 modules; shortcuts are not counted."""
    layers = {layer.split("/")[0] for layer in xception.multiply_adds_by_layer} - {"head"}
    shortcuts = {layer for layer in layers if layer.endswith("_shortcut")}
    assert len(layers - shortcuts) == 36
    assert sorted(shortcuts) == [f"block{i}_shortcut" for i in (13, 2, 3, 4)]
    assert {layer.split("_")[0] for layer in layers} == {f"block{i}" for i in range(1, 15)}


def test_xception_without_its_head():
    model = create_model({})
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 299, 299, 3))))
    del variables["params"]["head"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == 20_861_480


def test_inception_v3(inception_v3):
    assert inception_v3.parameters == 23_817_352
    assert inception_v3.parameters + inception_v3.statistics == 23_851_784
    assert inception_v3.multiply_adds == 5_713_216_096


def test_inception_v3_of_2016_is_the_one_in_table_3():
    found = cost(name="inception_v3_2016")
    assert found.parameters == 23_626_728
    assert found.parameters + found.statistics == 23_660_968
    assert found.multiply_adds == 5_623_817_312


# Widths at which every point of the spectrum costs what Xception does.
EQUAL_COST = [
    ({"segments": 1}, 0.348),
    ({"segments": 2}, 0.466),
    ({"segments": 4}, 0.598),
    ({"segments": 8}, 0.722),
    ({"group_width": 8}, 0.968),
    ({"group_width": 4}, 0.984),
    ({"group_width": 2}, 0.996),
]


@pytest.mark.parametrize(("fields", "width"), EQUAL_COST)
def test_width_multipliers_keep_the_cost(xception, fields, width):
    found = cost(width_multiplier=width, **fields)
    assert abs(found.parameters / xception.parameters - 1) < 0.01
    assert abs(found.multiply_adds / xception.multiply_adds - 1) < 0.06


def test_one_segment_at_full_width():
    assert round(cost(segments=1).parameters / 1e6, 1) == 183.6
