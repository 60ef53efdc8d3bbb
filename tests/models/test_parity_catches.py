"""The parity tests would notice: each known mistake, put into the source of xception.py, changes what blocks compute.

It is held against the unchanged source, with one block in the middle of eight: that this is Keras' network within 1e-9,
block by block, is what the parity tests say.
"""

from __future__ import annotations

import inspect
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from keras_weights import build_reference, copy_weights, keras_floatx
from parity import forward_differences, random_images
from random_weights import random_variables

from xception_jax.models import create_model, xception

# Parity holds within 1e-9; a mistake has to stand out by this much.
NOTICED = 1e-6


def mutated(model: xception.Xception, *replacements: tuple[str, str]) -> xception.Xception:
    """Returns the same network built from the source of xception.py with pieces of it replaced."""
    source = inspect.getsource(xception)
    for old, new in replacements:
        assert source.count(old) == 1, f"xception.py has {old!r} {source.count(old)} times: adapt this test"
        source = source.replace(old, new)
    module = types.ModuleType("mutated_xception")
    sys.modules[module.__name__] = module  # Dataclasses look their module up.
    try:
        exec(compile(source, "mutated_xception.py", "exec"), module.__dict__)
        return module.Xception(model.config)
    finally:
        del sys.modules[module.__name__]


BLOCKS = [f"block{i}" for i in range(1, 8)]
RELU_AT_THE_END_OF_BLOCK1 = (
    'x = nn.relu(conv3x3_bn(x, stem_output, "block1_conv2"))',
    'x = conv3x3_bn(x, stem_output, "block1_conv2")',
)
RELU_BEFORE_BLOCK2 = ("if block > 2:", "if block >= 2:")
# What is replaced, and the first block whose output is wrong then; all after it are too.
MUTATIONS = {
    # Figure 5 drawn literally: a shortcut goes on from the earlier shortcut, not from the sum.
    "chained shortcuts": (
        [
            (
                "residual = shortcut(x, features, block, stride)",
                "residual = shortcut(x if block == 2 else residual, features, block, stride)",
            )
        ],
        3,
    ),
    "a ReLU moved from the end of block1 into block2, past the shortcut": (
        [RELU_AT_THE_END_OF_BLOCK1, RELU_BEFORE_BLOCK2],
        1,
    ),
    "identity shortcuts from behind the ReLU": (
        [("residual = x if config.residual else 0.0", "residual = nn.relu(x) if config.residual else 0.0")],
        5,
    ),
    "no ReLU in front of the last block but one": (
        [
            (
                'sepconv_bn(nn.relu(x), width(728), f"block{block}_sepconv1")',
                'sepconv_bn(x, width(728), f"block{block}_sepconv1")',
            )
        ],
        6,
    ),
    "no ReLU at the end": (
        [
            (
                'x = nn.relu(sepconv_bn(x, features, f"block{block}_sepconv2"))',
                'x = sepconv_bn(x, features, f"block{block}_sepconv2")',
            )
        ],
        7,
    ),
}


def with_fields(**fields) -> xception.Xception:
    return create_model({"num_classes": 10, "dtype": "float64", "dropout_rate": 0.0, "middle_blocks": 1, **fields})


def outputs(model: xception.Xception, variables, images) -> dict[str, jax.Array]:
    """Not as one program: what the networks have in common is compiled once for all."""
    logits, endpoints = model.apply(variables, images)
    return {**endpoints, "logits": logits}


@pytest.fixture(scope="module")
def differing() -> dict[tuple[str, int], list[str]]:
    """Returns, for each (mistake, image size), the outputs that differ from those of the unchanged network."""
    with jax.enable_x64(True):
        plain = with_fields()
        variables = random_variables(plain, jnp.zeros((1, 71, 71, 3)))
        models = {(name, 71): mutated(plain, *replacements) for name, (replacements, _) in MUTATIONS.items()}
        models["unchanged", 71] = mutated(plain)
        models["second ReLU", 71] = mutated(plain, RELU_BEFORE_BLOCK2)
        models["epsilon", 71] = with_fields(batch_norm={"epsilon": 1e-5})
        for size in (71, 80):
            models["symmetric pooling", size] = with_fields(padding="symmetric")
        images = {size: random_images(size, 1, "float64") for size in (71, 80)}
        expected = {size: outputs(plain, variables, images[size]) for size in images}
        found = {}
        for (name, size), model in models.items():
            differences = forward_differences(outputs(model, variables, images[size]), expected[size])
            found[name, size] = [endpoint for endpoint, each in differences.items() if each.absolute > NOTICED]
    return found


def all_from(block: int) -> list[str]:
    return sorted([*BLOCKS[block - 1 :], "pre_logits", "logits"])


def test_an_unchanged_source_passes(differing):
    assert differing["unchanged", 71] == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_in_the_source_is_noticed(differing, name):
    assert sorted(differing[name, 71]) == all_from(MUTATIONS[name][1])


def test_a_second_relu_in_front_of_block2_changes_nothing(differing):
    """block1 ends in a ReLU, so that this one mistake cannot be noticed: the function is the same."""
    assert differing["second ReLU", 71] == []


def test_another_epsilon_is_noticed(differing):
    """1e-5 is Flax' and timm's."""
    assert sorted(differing["epsilon", 71]) == all_from(1)


def test_symmetric_pooling_is_noticed_where_a_side_is_even(differing):
    """At 71 the pools see 33, 17, 9 and 5 pixels, at 80 37, 19, 10 and 5: one size alone would not do."""
    assert differing["symmetric pooling", 71] == []
    assert sorted(differing["symmetric pooling", 80]) == all_from(4)


def test_another_order_of_widths_in_block13_does_not_take_the_weights():
    with keras_floatx("float64"):
        built = build_reference("xception", "float64", num_classes=10)
        model = mutated(
            built.model,
            ('width(728), f"block{block}_sepconv1")', 'width(1024), f"block{block}_sepconv1")'),
        )
        with pytest.raises(ValueError, match="block13_sepconv1"):
            copy_weights("xception", built.keras_model, model)
