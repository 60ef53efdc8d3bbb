"""Tests what is written for Keras and timm, and what is refused because they could not load it."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
from released import Released, assert_same, config, no_initialisers

from tests.models.test_every_field import INCEPTION_VALUES, MODEL_FIELDS, VALUES, model_config
from tests.weights.for_timm import FIELDS, network_for_timm
from xception_jax.errors import BadDataError, ConfigError
from xception_jax.weights import Network, Preprocessing, load_network, save_keras, save_timm, tree

GOLDEN = np.load(Path(__file__).with_name("timm_golden.npz"))  # tests/peers computes it with timm itself

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# Fields that change no shape below the classifier and nothing in evaluation.
FREE = {"num_classes", "dropout_rate", "dtype", "batch_norm.momentum", "batch_norm.statistics"}
HIDDEN, ADDED = {"fc_layers", "fc_width"}, {"batch_norm.scale", "aux_head"}
KERAS_INCEPTION = {"name": "inception_v3", "batch_norm.scale": False}
WRITERS = {
    "keras xception": (save_keras, {"name": "xception"}, VALUES, FREE | HIDDEN),
    "keras inception_v3": (save_keras, KERAS_INCEPTION, INCEPTION_VALUES, FREE | HIDDEN),
    "timm xception": (save_timm, FIELDS["legacy_xception"], VALUES, FREE | ADDED),
    "timm inception_v3": (save_timm, FIELDS["inception_v3"], INCEPTION_VALUES, FREE | ADDED),
}


def changed(base: dict, field: str, values):
    """Returns the model of `base` with another value of a field."""
    options, beside = values
    candidates = [*reversed(options), MODEL_FIELDS[field].default, False]
    value = next(each for each in candidates if each != base.get(field, MODEL_FIELDS[field].default))
    return model_config(**base | beside | {field: value})


CASES = [(writer, field) for writer, (_, _, values, _) in WRITERS.items() for field in values]


@pytest.mark.parametrize(("writer", "field"), CASES)
def test_what_the_other_library_does_not_have_is_refused(tmp_path, writer, field):
    """No weights are given: a network that is not refused for its field is refused for what is missing."""
    save, base, values, free = WRITERS[writer]
    model = changed(base, field, values[field])
    head = {"params": {"head": {"predictions": {"bias": np.zeros(model.num_classes, np.float32)}}}}
    expected = BadDataError if field in free else ConfigError
    with pytest.raises(expected) as caught:
        save(tmp_path / "x", Network(model, head, Preprocessing(), None, "", ""))
    assert not (tmp_path / "x").exists()
    if field not in free:
        named = {"fc_width": "fc_layers", "intermediate_slope": "intermediate_activation"}.get(field, field)
        assert caught.value.where == f"config.model.{named}"
        assert ".safetensors" in caught.value.fix


@pytest.mark.parametrize("save", [save_keras, save_timm])
def test_a_refusal_says_what_differs_and_what_to_do(tmp_path, save):
    model = config("xception", width_multiplier=0.5, padding="symmetric")
    with pytest.raises(ConfigError) as caught:
        save(tmp_path / "x", Network(model, {}, Preprocessing(), None, "", ""))
    what, where, fix = str(caught.value).splitlines()
    assert re.match(r"error: the network of .* has width_multiplier=1\.0, this one 0\.5", what)
    assert where.endswith("config.model.width_multiplier")
    assert "OUT.safetensors" in fix


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("name", FIELDS)
def test_the_names_are_those_of_timm(tmp_path, name, num_classes):
    network = network_for_timm(name, num_classes)
    save_timm(tmp_path / "x.safetensors", network)
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    described = {f"{key} {value.shape}" for key, value in tensors.items()}
    golden = {text.replace("(1000", f"({num_classes}") for text in GOLDEN[f"{name}/names"].tolist()}
    if not num_classes:
        golden = {text for text in golden if not text.startswith(("fc.", "AuxLogits."))}
    assert described == golden
    loaded = load_network(tmp_path / "x.safetensors", network.model if num_classes else None)
    assert_same(loaded.variables, tree.flatten(network.variables))
    assert loaded.model == network.model


def test_a_batch_norm_without_scale_gets_ones_for_timm(tmp_path):
    given = network_for_timm("inception_v3", 0)
    model = given.model.replace(batch_norm=given.model.batch_norm.replace(scale=False))
    leaves = tree.flatten(given.variables)
    scales = {name for name in leaves if name.endswith("/scale")}
    without = {name: leaf for name, leaf in leaves.items() if name not in scales}
    save_timm(tmp_path / "x.safetensors", Network(model, tree.unflatten(without), Preprocessing(), None, "", ""))
    ones = {name: np.ones_like(leaves[name]) for name in scales}
    assert_same(load_network(tmp_path / "x.safetensors").variables, without | ones)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_keras_loads_networks_of_other_classes(xception: Released, tmp_path, num_classes):
    """keras.applications loads what is written, with any number of classes."""
    rng = np.random.default_rng(0)
    head = {"kernel": rng.random((2048, num_classes), np.float32), "bias": rng.random(num_classes, np.float32)}
    leaves = xception.backbone_leaves | {f"{tree.HEAD}predictions/{name}": value for name, value in head.items()}
    model = config("xception", num_classes=num_classes)
    path = tmp_path / "x.weights.h5"
    save_keras(path, Network(model, tree.unflatten(leaves), Preprocessing(), None, "", ""))
    with no_initialisers():
        keras_model = keras.applications.Xception(weights=None, classes=num_classes, classifier_activation=None)
    keras_model.load_weights(path)
    weights = keras_model.get_weights()
    assert all(map(np.array_equal, weights, [*xception.keras_model.get_weights()[:-2], head["kernel"], head["bias"]]))


def test_keras_loads_bfloat16(xception: Released, tmp_path):
    leaves = {name: value.astype("bfloat16") for name, value in xception.backbone_leaves.items()}
    path = tmp_path / "x.weights.h5"
    save_keras(path, Network(xception.model, tree.unflatten(leaves), Preprocessing(), None, "", ""))
    assert_same(load_network(path).variables, leaves)
    backbone = xception.backbone()
    expected = [weight.astype("bfloat16").astype("float32") for weight in backbone.get_weights()]
    backbone.load_weights(path)
    assert all(map(np.array_equal, backbone.get_weights(), expected))


def test_a_network_with_hidden_layers_goes_to_the_model_that_has_them(xception: Released, tmp_path, capsys):
    model = config("xception", num_classes=5, fc_layers=1, fc_width=8)
    shapes = {name: shape for name, shape in tree.shapes(model).items() if name.startswith(tree.HEAD)}
    leaves = xception.backbone_leaves | {name: np.full(shape, 1.5, np.float32) for name, shape in shapes.items()}
    path = tmp_path / "x.weights.h5"
    save_keras(path, Network(model, tree.unflatten(leaves), Preprocessing(), None, "", ""))
    assert "keras.applications has no hidden layers" in capsys.readouterr().err
    layers = keras.layers
    with no_initialisers():
        base = keras.applications.Xception(weights=None, include_top=False)
        x = layers.Dense(8, "relu")(layers.GlobalAveragePooling2D()(base.output))
        keras_model = keras.Model(base.input, layers.Dense(5)(x))
    keras_model.load_weights(path)
    *backbone, kernel, bias, last_kernel, last_bias = keras_model.get_weights()
    assert all(map(np.array_equal, backbone, xception.keras_model.get_weights()[:-2]))
    assert all((weight == 1.5).all() for weight in (kernel, bias, last_kernel, last_bias))
