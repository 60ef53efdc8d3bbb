"""Variations of the networks that have no counterpart in Keras: what each option adds, removes or keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_variables

from xception_jax.config import resolve
from xception_jax.errors import ConfigError
from xception_jax.models import create_model
from xception_jax.models.layers import BatchNorm


def build(side=64, batch=2, network="xception", **fields):
    """Returns (model, variables, images) of a narrow network with random weights."""
    small = {"width_multiplier": 0.0625, "num_classes": 7} | ({"middle_blocks": 1} if network == "xception" else {})
    model = create_model({"name": network, **small, **fields})
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (batch, side, side, 3)), jnp.float32)
    return model, random_variables(model, images), images


def shapes(side=64, network="xception", **fields):
    """Returns the shapes of the variables and of what the network computes."""
    model = create_model({"name": network, **fields})
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    return variables["params"], outputs


def test_sides_and_widths_at_299_are_those_of_figure_5():
    _, (logits, endpoints) = shapes(299)
    assert logits.shape == (2, 1000)
    found = {name: value.shape[1:] for name, value in endpoints.items()}
    assert found.pop("pre_logits") == (2048,)
    outer = [(147, 64), (74, 128), (37, 256), (19, 728), *[(19, 728)] * 8, (10, 1024), (10, 2048)]
    assert found == {f"block{i}": (side, side, width) for i, (side, width) in enumerate(outer, start=1)}


@pytest.mark.parametrize(
    "width",
    [
        {"width_multiplier": 0.02},
        {"head_width": 4},  # the module before the last one has three quarters of it
        {"stem": "module", "width_multiplier": 0.1},
        {"stem": "module", "stem_width": 3},
    ],
    ids=str,
)
def test_an_inception_module_narrower_than_its_towers_is_refused(width):
    with pytest.raises(ConfigError, match="has 3 channels, fewer than its 4 towers"):
        create_model({"name": "xception", "module": "inception", **width})


def test_a_stem_of_modules_has_channels_that_segments_divide():
    fields = {"stem": "module", "order": "pointwise_first", "segments": 4, "middle_blocks": 0, "num_classes": 2}
    with pytest.raises(ConfigError, match="stem_width=6 gives a layer 6 channels"):
        create_model({"name": "xception", "stem_width": 6, **fields})
    _, (logits, _) = shapes(stem_width=8, **fields)
    assert logits.shape == (2, 2)


@pytest.mark.parametrize(
    ("fields", "side"),
    [
        ({"name": "xception"}, 7),
        ({"name": "xception", "stem": "small"}, 1),
        ({"name": "inception_v3"}, 75),
        ({"name": "inception_v3", "aux_head": True}, 107),
    ],
    ids=str,
)
def test_images_that_leave_no_pixel_to_a_layer_are_refused(fields, side):
    small = {"num_classes": 2, "width_multiplier": 0.05} | ({"middle_blocks": 0} if "inc" not in fields["name"] else {})
    config = {"model": fields | small, "data": {"image_size": side}}
    assert resolve(config).model.smallest_side == side
    network = create_model(config["model"])

    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    jax.eval_shape(lambda images: network.init(keys, images, train=True), images)
    if side > 1:
        with pytest.raises(ConfigError, match=f"images of {side - 1} pixels are too small"):
            resolve({"model": config["model"], "data": {"image_size": side - 1}})


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_weights_of_half_precision_normalize_in_float32(dtype):
    layer = BatchNorm()
    images = jax.random.normal(jax.random.key(0), (4, 2, 2, 8))
    drawn = {
        "params": {"scale": jnp.linspace(0.5, 2, 8), "bias": jnp.linspace(-1, 1, 8)},
        "batch_stats": {"mean": jnp.linspace(-3, 3, 8), "var": jnp.linspace(0.01, 4, 8)},
    }
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), drawn)
    found = layer.apply(half, images, train=False)
    expected = layer.apply(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half), images, train=False)
    np.testing.assert_array_equal(found, expected)


def test_the_narrowest_networks_can_be_built():
    for fields in ({"module": "inception", "width_multiplier": 0.03}, {"segments": 3, "width_multiplier": 1e-9}):
        _, (logits, _) = shapes(middle_blocks=0, num_classes=2, **fields)
        assert logits.shape == (2, 2)
    shapes(128, "inception_v3", width_multiplier=1e-9)


def test_sides_and_widths_of_inception_v3_at_299():
    _, (_, endpoints) = shapes(299, "inception_v3")
    found = {name: value.shape[1:] for name, value in endpoints.items()}
    assert found.pop("pre_logits") == (2048,)
    widths = [(35, 256), (35, 288), (35, 288), *[(17, 768)] * 5, (8, 1280), (8, 2048), (8, 2048)]
    assert found == {f"mixed{i}": (side, side, width) for i, (side, width) in enumerate(widths)}


def test_names_follow_the_number_of_middle_modules():
    params, (_, endpoints) = shapes(middle_blocks=2)
    assert sorted(endpoints) == sorted([*(f"block{i}" for i in range(1, 9)), "pre_logits"])
    assert params["block7_sepconv1"]["pointwise"]["kernel"].shape[-1] == 728
    assert params["block7_sepconv2"]["pointwise"]["kernel"].shape[-1] == 1024
    assert params["block8_sepconv2"]["pointwise"]["kernel"].shape[-1] == 2048


def test_without_residuals_there_are_no_shortcuts():
    with_residuals, _ = shapes()
    without, (_, endpoints) = shapes(residual=False)
    gone = set(with_residuals) - set(without)
    assert gone == {f"block{i}_shortcut{end}" for i in (2, 3, 4, 13) for end in ("", "_bn")}
    assert set(without) < set(with_residuals)
    assert endpoints["block13"].shape[-1] == 1024


def test_the_small_stem_keeps_the_size():
    _, (_, endpoints) = shapes(32, stem="small")
    assert [endpoints[f"block{i}"].shape[1] for i in (1, 2, 3, 4, 12, 13, 14)] == [32, 16, 8, 4, 4, 2, 2]


@pytest.mark.parametrize(
    ("fields", "first"),
    [
        ({}, {"spatial": (3, 3, 1, 3), "pointwise": (1, 1, 3, 32)}),
        ({"order": "pointwise_first"}, {"pointwise": (1, 1, 3, 32), "spatial": (3, 3, 1, 32)}),
        ({"group_width": "all"}, {"spatial": (3, 3, 3, 3), "pointwise": (1, 1, 3, 32)}),
        ({"module": "regular"}, {"spatial": (3, 3, 3, 32)}),
    ],
)
def test_a_stem_of_modules_meets_the_pixels_with_them_and_keeps_the_size(fields, first):
    params, (_, endpoints) = shapes(32, stem="module", middle_blocks=0, **fields)
    assert {name: layer["kernel"].shape for name, layer in params["block1_conv1"].items()} == first
    assert endpoints["block1"].shape[1:] == (32, 32, 64)


@pytest.mark.parametrize("fields", [{"segments": 3}, {"segments": 8, "order": "pointwise_first"}, {"group_width": 5}])
def test_widths_are_rounded_to_what_the_segments_divide(fields):
    """Also with a width multiplier; no layer may silently fall back to another number of segments."""
    params, _ = shapes(width_multiplier=0.7, middle_blocks=1, depth_multiplier=2, **fields)
    for name, layer in params.items():
        if "spatial" in layer:
            per_segment, filters = layer["spatial"]["kernel"].shape[2:]
            channels = filters // 2
            assert channels % per_segment == 0, name
            assert channels // per_segment == fields.get("segments", channels // 5), name
            if "group_width" in fields:
                assert per_segment == 5, name


def test_dropout_is_active_only_while_training_and_depends_on_the_key():
    model, variables, images = build(75, dropout_rate=0.5)

    @jax.jit
    def train(key):
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0]

    (first, endpoints), (again, _), (other, _) = (train(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first) - np.asarray(other)).max() > 1e-3
    # What is dropped is what the classifier sees: each logit is linear in pre_logits, half of them set to zero.
    head = variables["params"]["head"]["predictions"]
    kept = np.asarray(endpoints["pre_logits"]) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert np.abs(kept - np.asarray(first)).max() > 1e-3
    evaluate = jax.jit(lambda: model.apply(variables, images))
    logits, endpoints = evaluate()  # Needs no key.
    kept = np.asarray(endpoints["pre_logits"]) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(logits, kept, rtol=0, atol=1e-5)


def test_fully_connected_layers():
    params, (logits, endpoints) = shapes(fc_layers=2)
    assert sorted(params["head"]) == ["fc1", "fc2", "predictions"]
    assert params["head"]["fc1"]["kernel"].shape == (2048, 4096)
    assert params["head"]["fc2"]["kernel"].shape == (4096, 4096)
    assert params["head"]["predictions"]["kernel"].shape == (4096, 1000)
    assert endpoints["pre_logits"].shape == (2, 4096)
    assert logits.shape == (2, 1000)
    model, variables, images = build(fc_layers=1, fc_width=32)
    _, endpoints = jax.jit(model.apply)(variables, images)
    pre_logits, fc1 = np.asarray(endpoints["pre_logits"]), variables["params"]["head"]["fc1"]
    pooled = np.asarray(endpoints["block7"]).mean((1, 2))
    expected = np.maximum(pooled @ np.asarray(fc1["kernel"]) + np.asarray(fc1["bias"]), 0)
    np.testing.assert_allclose(pre_logits, expected, rtol=0, atol=1e-6)


def test_the_auxiliary_head_answers_only_while_training():
    model, variables, images = build(139, network="inception_v3", aux_head=True, num_classes=5, dropout_rate=0.0)
    assert "aux_predictions" in variables["params"]

    def train(variables, images):
        return model.apply(variables, images, True, mutable=["batch_stats"])

    (logits, endpoints), _ = jax.eval_shape(train, variables, images)
    assert endpoints["aux_logits"].shape == logits.shape == (2, 5)
    assert "aux_logits" not in jax.eval_shape(model.apply, variables, images)[1]

    # The network itself is the same without it.
    plain, _, _ = build(139, network="inception_v3", num_classes=5)
    without = {
        name: {layer: value for layer, value in tree.items() if not layer.startswith("aux_")}
        for name, tree in variables.items()
    }
    both = jax.jit(lambda v, w, x: (model.apply(v, x)[0], plain.apply(w, x)[0]))
    np.testing.assert_allclose(*both(variables, without, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", ["xception", "inception_v3"])
def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32(network):
    model = create_model({"name": network, "dtype": "bfloat16"})
    images = jax.ShapeDtypeStruct((2, 75, 75, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, endpoints = jax.eval_shape(model.apply, variables, images)
    assert logits.dtype == endpoints.pop("pre_logits").dtype == jnp.float32
    assert {value.dtype for value in endpoints.values()} == {jnp.dtype("bfloat16")}


def test_symmetric_padding_of_inception_v3_counts_the_zeros_in_average_pools():
    """Its max pools have no padding, so that all else is the same: mixed0 differs in the pooled tower alone."""
    outputs = {}
    for padding in ("same", "symmetric"):
        model, variables, images = build(75, network="inception_v3", padding=padding)

        def mixed0(variables, images, model=model):
            return model.apply(variables, images)[1]["mixed0"]

        outputs[padding] = np.asarray(jax.jit(mixed0)(variables, images))
    differs = np.abs(outputs["same"] - outputs["symmetric"]).max((0, 1, 2)) > 0
    pooled = variables["params"]["mixed0_pool_0"]["kernel"].shape[-1]
    assert differs[-pooled:].any()
    assert not differs[:-pooled].any()


def test_the_classifier_starts_as_in_keras():
    """Uniform with Glorot's limit, sqrt(6 / (inputs + outputs)); Flax' default is a normal distribution."""
    model = create_model({"width_multiplier": 0.05, "middle_blocks": 0, "num_classes": 50})
    variables = model.init(jax.random.key(0), jnp.zeros((1, 71, 71, 3)))
    kernel = np.asarray(variables["params"]["head"]["predictions"]["kernel"])
    limit = np.sqrt(6 / sum(kernel.shape))
    assert 0.99 * limit < np.abs(kernel).max() <= limit
