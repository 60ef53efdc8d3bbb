"""Our Xception and Inception V3 are Keras': the same outputs, gradients and running averages from the same weights.

In float64, where a difference that is more than rounding has a reason. The differences are in
docs/explanation/parity.md.
"""

from __future__ import annotations

import dataclasses
from functools import partial

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

from tests.conftest import NEWER_CODE
from xception_jax.config import resolve_model
from xception_jax.models import create_model
from xception_jax.weights import load_keras

# Keras turns JAX arrays into NumPy ones, as it saves them, in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

NAMES = ("xception", "inception_v3")
# At 299 and 224 some max pools see even sides, at 150 and 71 (75: Inception V3's smallest) others.
SIZES = {"xception": (299, 224, 150, 71), "inception_v3": (299, 224, 150, 75)}
ENDPOINTS = {
    "xception": [f"block{i}" for i in range(1, 15)],
    "inception_v3": [f"mixed{i}" for i in range(11)],
}
# Images of a training step: with two, the last layers of Inception V3, which have one pixel, normalise by two values.
# And options of the compiler: gradients of convolutions in float64 are plain loops, a tenth as fast if not optimised.
STEPS = {
    "xception": (2, None),
    "inception_v3": (4, {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}),
}


@pytest.fixture(scope="module", params=NAMES)
def built(request, tmp_path_factory):
    """The weights go through a file: Keras saves it, our loader reads it."""
    name, path = request.param, tmp_path_factory.mktemp("weights") / "x.weights.h5"
    with keras_floatx("float64"):
        reference = build_reference(name, "float64")
        reference.keras_model.save_weights(path)
    loaded = load_keras(path, resolve_model({"name": name, "dtype": "float64"}))
    jax.tree.map(np.testing.assert_array_equal, loaded, reference.variables)
    return name, dataclasses.replace(reference, variables=loaded)


@pytest.fixture
def float64_reference(built):
    """The 64 bits end with each test, the networks stay for the next."""
    with keras_floatx("float64"):
        yield built


@pytest.fixture(scope="module")
def outputs(built):
    """Returns, for each of the sizes, (our outputs, Keras' outputs)."""
    name, reference = built
    with keras_floatx("float64"):
        images = [random_images(size, 1, "float64") for size in SIZES[name]]
        ours = [partial(our_outputs, reference.model, reference.variables, x) for x in images]
        computed = side_by_side(*ours, *(partial(keras_outputs, reference, x) for x in images))
    return list(zip(computed[: len(images)], computed[len(images) :], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("size", range(4), ids=["299", "224", "150", "smallest"])
def test_every_block_in_float64(built, outputs, size):
    name = built[0]
    ours, theirs = outputs[size]
    differences = forward_differences(ours, theirs)
    assert sorted(differences) == sorted([*ENDPOINTS[name], "pre_logits", "logits"])
    for endpoint, found in differences.items():
        assert ours[endpoint].dtype == jnp.float64
        assert 0.1 < found.largest < 100, f"{endpoint}: the weights should keep activations near 1"
        assert found.absolute < 1e-9, f"{endpoint}: {found}"
        assert found.relative < 1e-9, f"{endpoint}: {found}"


@pytest.mark.slow
def test_one_training_step_in_float64(float64_reference):
    """Gradients of every parameter of a cross entropy, through batch statistics, and the updated running averages."""
    name, reference = float64_reference
    count, options = STEPS[name]
    images = random_images(SIZES[name][-1], count, "float64", seed=3)
    labels = jnp.array([3, 141, 592, 653][:count])
    ours, theirs = side_by_side(
        lambda: our_step(reference.model, reference.variables, images, labels, options),
        lambda: keras_step(reference, images, labels, options),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_float32_at_299(name):
    """The arithmetic that a user runs, in programs compiled as for a user: within 1e-4, and the same class."""
    optimised = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    if NEWER_CODE:
        optimised["xla_cpu_use_fusion_emitters"] = True
    with keras_floatx("float32"):
        reference = build_reference(name, "float32")
        images = random_images(299, 2, "float32")
        ours, theirs = side_by_side(
            lambda: our_outputs(reference.model, reference.variables, images, optimised),
            lambda: keras_outputs(reference, images, optimised),
        )
        for endpoint, found in forward_differences(ours, theirs).items():
            assert ours[endpoint].dtype == jnp.float32
            assert found.absolute < 1e-4, f"{endpoint}: {found}"
        np.testing.assert_array_equal(ours["logits"].argmax(-1), theirs["logits"].argmax(-1))


def test_parameters_are_as_many_as_keras_counts(built):
    name, reference = built
    for include_top, keras_model in ((True, reference.keras_model), (False, build_keras(name, include_top=False))):
        variables = {**reference.variables, "params": dict(reference.variables["params"])}
        if not include_top:
            del variables["params"]["head"]
        assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == keras_model.count_params()


def test_weights_that_do_not_fit_are_refused(built):
    """The copy itself must not hide a difference: tensors left over, or places left empty."""
    name, reference = built
    # The wrong options for each network leave tensors over, or have places that Keras has nothing for.
    wrong = {"xception": [("middle_blocks", 7), ("middle_blocks", 9)], "inception_v3": [("aux_head", True)]}
    for field, value in wrong[name]:
        with keras_floatx("float64"), pytest.raises(ValueError, match=r"does not fit|left empty"):
            copy_weights(name, reference.keras_model, create_model({"name": name, "dtype": "float64", field: value}))
