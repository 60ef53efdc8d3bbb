"""Our Xception and Inception V3 are Keras': the same outputs, gradients and running averages from the same weights.

In float64, where a difference that is more than rounding has a reason. `docs/parity.md` has the differences.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from keras_weights import build_keras, build_reference, copy_weights, keras_floatx
from parity import (
    difference,
    forward_differences,
    keras_outputs,
    keras_step,
    our_outputs,
    our_step,
    random_images,
    side_by_side,
)
from quick import QUICK

from xception_jax.config import default_config
from xception_jax.models import create_model

NAMES = ("xception", "inception_v3")
# At 299 and 224 some max pools see even sides, at 150 and 71 (75: Inception V3's smallest) others.
SIZES = {"xception": (299, 224, 150, 71), "inception_v3": (299, 224, 150, 75)}
ENDPOINTS = {
    "xception": [f"block{i}" for i in range(1, 15)],
    "inception_v3": [f"mixed{i}" for i in range(11)],
}


@pytest.fixture(scope="module", params=NAMES)
def built(request):
    with keras_floatx("float64"):
        return request.param, build_reference(request.param, "float64")


@pytest.fixture
def float64_reference(built):
    """The 64 bits end with each test, the networks stay for the next."""
    with keras_floatx("float64"):
        yield built


@pytest.mark.parametrize("size", range(4), ids=["299", "224", "150", "smallest"])
def test_every_block_in_float64(float64_reference, size):
    name, reference = float64_reference
    images = random_images(SIZES[name][size], 1, "float64")
    # At the size of the paper as users compile it, with all optimisations.
    options = None if SIZES[name][size] == 299 else QUICK
    ours, theirs = side_by_side(
        lambda: our_outputs(reference.model, reference.variables, images, options),
        lambda: keras_outputs(reference, images),
    )
    differences = forward_differences(ours, theirs)
    assert sorted(differences) == sorted([*ENDPOINTS[name], "pre_logits", "logits"])
    for endpoint, found in differences.items():
        assert ours[endpoint].dtype == jnp.float64
        assert 0.1 < found.largest < 100, f"{endpoint}: the weights should keep activations near 1"
        assert found.absolute < 1e-9, f"{endpoint}: {found}"
        assert found.relative < 1e-9, f"{endpoint}: {found}"


def test_one_training_step_in_float64(float64_reference):
    """Gradients of every parameter of a cross entropy, through batch statistics, and the updated running averages."""
    name, reference = float64_reference
    images = random_images(SIZES[name][-1], 4, "float64", seed=3)
    labels = jnp.array([3, 141, 592, 653])
    ours, theirs = side_by_side(
        lambda: our_step(reference.model, reference.variables, images, labels),
        lambda: keras_step(reference, images, labels),
    )
    assert abs(ours.loss - theirs.loss) < 1e-10
    assert sorted(ours.values) == sorted(theirs.values)
    assert len(ours.values) == {"xception": 236, "inception_v3": 378}[name]
    for path, value in theirs.values.items():
        found = difference(ours.values[path], value)
        assert found.largest > 1e-4, f"{path}: hardly a gradient"
        assert found.absolute < 1e-8, f"{path}: {found}"
        assert found.relative < 1e-8, f"{path}: {found}"
        # The running averages moved: an update that both forget would pass.
        if path[0] == "batch_stats":
            before = reference.variables
            for key in path:
                before = before[key]
            assert np.abs(np.asarray(before) - value).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_float32_at_299(name):
    """The arithmetic that a user runs: within 1e-4, and the same class."""
    with keras_floatx("float32"):
        reference = build_reference(name, "float32")
        images = random_images(299, 2, "float32")
        ours, theirs = side_by_side(
            lambda: our_outputs(reference.model, reference.variables, images), lambda: keras_outputs(reference, images)
        )
        for endpoint, found in forward_differences(ours, theirs).items():
            assert ours[endpoint].dtype == jnp.float32
            assert found.absolute < 1e-4, f"{endpoint}: {found}"
        np.testing.assert_array_equal(ours["logits"].argmax(-1), theirs["logits"].argmax(-1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("include_top", [True, False])
def test_parameters_are_as_many_as_keras_counts(name, include_top):
    keras_model = build_keras(name, include_top=include_top)
    config = default_config().model
    config.name = name
    model = create_model(config)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 299, 299, 3))))
    head = variables["params"].pop("head")
    if include_top:
        variables["params"]["head"] = head
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == keras_model.count_params()


def test_weights_that_do_not_fit_are_refused():
    """The copy itself must not hide a difference: another depth is refused."""
    keras_model = build_keras("xception", num_classes=10)
    config = default_config().model
    config.num_classes = 10
    copy_weights("xception", keras_model, create_model(config))
    for field, value in (("middle_blocks", 7), ("middle_blocks", 9)):
        config = default_config().model
        config.update({"num_classes": 10, field: value})
        with pytest.raises(ValueError, match=r"fit|left empty"):
            copy_weights("xception", keras_model, create_model(config))
