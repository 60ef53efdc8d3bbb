"""Tests that nothing is built that a weight file only describes: networks, architectures, JSON."""

from __future__ import annotations

import json
import sys
import time

import h5py
import numpy as np
import pytest
import safetensors.numpy
from hostile import own_file

from xception_jax.config import resolve_model
from xception_jax.errors import BadDataError
from xception_jax.weights import Network, Preprocessing, hub, load_network, save_network, tree
from xception_jax.weights.content import LEGACY, SAFETENSORS, TREE, Content, Group
from xception_jax.weights.keras_architecture import LayerConfig, compare_head, epsilon, read_preprocessing
from xception_jax.weights.keras_layers import KerasLayer
from xception_jax.weights.keras_match import _merge
from xception_jax.weights.load import import_content
from xception_jax.weights.released import CONFIG

SECONDS = 10  # of a refusal, on a busy machine; a network of 1,000 blocks takes 15 to build


def refusal(path) -> str:
    start = time.monotonic()
    with pytest.raises(BadDataError) as caught:
        load_network(path)
    assert time.monotonic() - start < SECONDS
    assert len(str(caught.value).splitlines()) == 3
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("middle_blocks", 100_000),
        ("middle_blocks", 10**9),
        ("middle_blocks", 1),
        ("fc_layers", 1_000_000),
        ("kernel_size", 99_999),
        ("kernel_size", 10**9 + 1),
        ("num_classes", 2**62),
        ("depth_multiplier", 10**9),
        ("segments", 10**9),
        ("group_width", 10**18),
    ],
)
def test_a_network_that_is_only_described(tmp_path, field, value):
    own_file(tmp_path / "x.safetensors", **{field: value})
    assert field in refusal(tmp_path / "x.safetensors")


def test_kernels_that_are_there_but_too_large(tmp_path):
    """Every element of a depthwise kernel takes its time to trace."""
    own_file(tmp_path / "x.safetensors", kernel_size=99, middle_blocks=0, width_multiplier=0.01)
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        metadata = file.metadata()
    for i in range(2, 7):
        tensors[f"params/block{i}_sepconv1/spatial/kernel"] = np.ones((99, 99, 1, 1), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", metadata)
    assert "kernel_size=99, but its tensors show at most 21" in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("fields", [{"kernel_size": 5}, {"module": "inception"}, {"fc_layers": 2, "fc_width": 9}])
@pytest.mark.parametrize("with_head", [True, False])
def test_networks_that_are_there(tmp_path, fields, with_head):
    model = resolve_model({"name": "xception", "width_multiplier": 0.05, "middle_blocks": 1, "num_classes": 3} | fields)
    leaves = {name: np.ones(shape, np.float32) for name, shape in tree.shapes(model).items()}
    leaves = {name: leaf for name, leaf in leaves.items() if with_head or not name.startswith(tree.HEAD)}
    network = Network(model, tree.unflatten(leaves), Preprocessing(), None, "", "")
    save_network(tmp_path / "x.safetensors", network)
    assert load_network(tmp_path / "x.safetensors").model == model


NESTED = '{"model": ' + "[" * 100_000 + "]" * 100_000 + "}"
DEEP = '{"model": ' + "[" * 900 + "]" * 900 + "}"
LARGE = '{"model": {"name": "xception"}, "classes": [' + '"a",' * 2_500_000 + '"b"]}'
DIGITS = '{"model": {"middle_blocks": ' + "9" * 5000 + "}}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"model": {"num_classes": 1%s}}' % ("0" * 300),
        "[1]",
        "null",
        "3",
        '"a"',
        "{",
        NESTED,
        DEEP,
        LARGE,
        DIGITS,
        '{"model": NaN}',
    ],
)
def test_json_that_is_nested_or_large(tmp_path, text):
    own_file(tmp_path / "x.safetensors", text or " ")
    refusal(tmp_path / "x.safetensors")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.attrs["layer_names"] = np.array(["conv"], "S")
        file.attrs["model_config"] = text
        file.create_group("conv")
    refusal(tmp_path / "x.h5")
    (tmp_path / CONFIG).write_text(text)
    assert hub.read(tmp_path / CONFIG) is None


def test_a_text_that_is_larger_than_any_description(tmp_path):
    own_file(tmp_path / "x.safetensors", '{"model": "' + "a" * (20 << 20) + '"}')
    assert "its header takes 20," in refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("preprocessing", [{"size": 10**9}, {"size": True}, {"mean": [10**18] * 3}, {"crop": None}, 3])
def test_preprocessing_that_no_network_has(tmp_path, preprocessing):
    own_file(tmp_path / "x.safetensors", json.dumps({"model": {"name": "xception"}, "preprocessing": preprocessing}))
    assert "description" in refusal(tmp_path / "x.safetensors")


def test_a_number_in_a_description_that_is_too_large_for_64_bits(tmp_path):
    description = {"model": {"name": "xception"}, "preprocessing": {"mean": [10**400] * 3}}
    own_file(tmp_path / "x.safetensors", json.dumps(description))
    assert "is too large" in refusal(tmp_path / "x.safetensors")


def config_of(tmp_path, **given):
    (tmp_path / CONFIG).write_text(json.dumps({"pretrained_cfg": given}))
    return hub.describe(tmp_path / CONFIG, "xception", Preprocessing(), 3)


def test_a_config_of_the_hub_that_no_network_has(tmp_path):
    nested: list = []
    for _ in range(50):
        nested = [nested]
    for given in (
        {"input_size": [3, 10**9, 10**9]},
        {"mean": nested},
        {"crop_pct": 10**18},
        {"mean": ["a" * 9999] * 3},
    ):
        preprocessing, _, notes = config_of(tmp_path, **given)
        assert preprocessing == Preprocessing()
        assert len(notes) == 1
        assert len(notes[0]) < 300
    preprocessing, classes, (note,) = config_of(tmp_path, crop_pct=10**400)  # no number of JSON that we read
    assert (preprocessing, classes) == (Preprocessing(), None)
    assert "too large" in note


def model_of(*layers: dict) -> LayerConfig:
    return LayerConfig.from_json({"class_name": "Functional", "config": {"layers": list(layers), "name": "m"}})


def circle(name: str, *inner: dict) -> dict:
    """A model in which ten layers lead to each other in a circle; every one is the model `inner`, or a Dropout."""
    layers = []
    for i in range(10):
        node = [[[f"layer{(i + 1) % 10}", 0, 0, {}]]]
        inside = {"layers": inner, "output_layers": [["layer0", 0, 0]]} if inner else {}
        kind = "Functional" if inner else "Dropout"
        layers.append({"class_name": kind, "name": f"layer{i}", "inbound_nodes": node, "config": inside})
    return layers


def test_an_architecture_that_goes_in_circles():
    layers = circle("a")
    for _ in range(4):
        layers = circle("a", *layers)
    config = {"layers": layers[:1], "output_layers": [["layer0", 0, 0]]}
    start = time.monotonic()
    assert compare_head(LayerConfig.from_json({"config": config}), 1)[0]
    assert time.monotonic() - start < SECONDS


HUGE = 10**4000


@pytest.mark.parametrize(
    "layer",
    [
        {"class_name": "Rescaling", "config": {"scale": HUGE}},
        {"class_name": "Rescaling", "config": {"scale": 1e308, "offset": 1e308}},
        {"class_name": "Rescaling", "config": {"scale": [[[]]] * 1000}},
        {"class_name": "Rescaling", "config": {"scale": "x" * 10_000}},
        {"class_name": "Normalization", "config": {"mean": HUGE, "variance": -1}},
        {"class_name": "TFOpLambda", "config": {"function": {}}, "inbound_nodes": [[]]},
        {"class_name": "Resizing", "config": {"height": HUGE, "width": HUGE}},
        {"class_name": "InputLayer", "config": {"batch_shape": [None, 10**9, 10**9, 3]}},
        {"class_name": "InputLayer", "config": {"batch_shape": [None, -1, 0, 3]}},
    ],
)
def test_layers_in_front_of_the_network_that_no_model_has(layer):
    preprocessing, image_shape, _ = read_preprocessing(model_of(layer), None, Preprocessing())
    assert (preprocessing, image_shape) == (Preprocessing(), None)


def test_epsilons_that_no_model_has():
    layers = [{"class_name": "BatchNormalization", "config": {"epsilon": value}} for value in (HUGE, 1e999, "a", None)]
    assert epsilon(model_of(*layers), 4) is None


def layer(name: str, *shapes: tuple[int, ...]) -> Group:
    return Group(name, name, [f"{name}/{i}" for i in range(len(shapes))], [np.ones(s, np.float32) for s in shapes])


def test_thousands_of_tiny_layers(tmp_path):
    """As many blocks as there are names, but hardly any numbers: the network has 728 channels."""
    start = time.monotonic()
    norms = [layer(f"norm_{i}", (1,), (1,), (1,), (1,)) for i in range(100)]
    separable = [layer(f"sep_{i}", (1, 1, 1, 1), (1, 1, 1, 1)) for i in range(5000)]
    dense = [layer(f"dense_{i}", (1, 1), (1,)) for i in range(5000)]
    for content in (Content(LEGACY, norms + separable + dense, {}), Content(TREE, norms + separable + dense, {})):
        with pytest.raises(BadDataError, match="does not hold xception"):
            import_content(content, tmp_path / "x.h5", None, None)
    names = [f"block{i}.x" for i in range(20_000)] + ["conv3.conv1.weight"]
    tensors = [np.ones((1, 1, 1, 1), np.float32)] * len(names)
    with pytest.raises(BadDataError, match="do not fit"):
        import_content(Content(SAFETENSORS, [Group("", "", names, tensors)], {}), tmp_path / "x", None, None)
    assert time.monotonic() - start < 3 * SECONDS


def test_a_row_of_tensors_with_no_order():
    """Everything fits everywhere, except at the end: a search without limit would try a million places."""
    start = time.monotonic()
    trainable, frozen, wanted = (
        [KerasLayer(f"{name}{i}", ("",), ((1, 1, 8, 8),)) for i in range(1000)] for name in ("a", "b", "c")
    )
    wanted += [*wanted[:999], KerasLayer("end", ("",), ((3, 3, 8, 8),))]
    assert _merge(trainable, frozen, wanted, iter(range(20_000))) is None
    assert _merge(trainable, frozen, wanted[:1500], iter(range(20_000))) is not None
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize("name", ["²", "\u0661", "a1b²", "9" * 1000, "", "\n"])
def test_names_with_strange_digits(tmp_path, name):
    groups = [layer(f"a/{name}", (3, 3, 3, 3)), layer("a/1", (3,), (3,), (3,))]
    with pytest.raises(BadDataError):
        import_content(Content(TREE, groups, {}), tmp_path / "x", None, None)


def test_one_name_twice(tmp_path):
    groups = [layer("a", (3, 3, 3, 3)), layer("a", (3, 3, 3, 3)), *[layer("n", (3,), (3,), (3,), (3,))] * 2]
    with pytest.raises(BadDataError):
        import_content(Content(LEGACY, groups, {}), tmp_path / "x", None, None)


def test_integers_stay_limited():
    """The parsers rely on it: Python refuses to convert longer ones."""
    assert sys.get_int_max_str_digits() == 4300


@pytest.mark.parametrize(
    "text", ['{"pretrained_cfg": {}', '{"pretrained_cfg": {"crop_pct": NaN}}', "{}" + " " * (1 << 21)]
)
def test_a_config_of_the_hub_that_cannot_be_read_is_a_note(tmp_path, text):
    (tmp_path / CONFIG).write_text(text)
    preprocessing, classes, notes = hub.describe(tmp_path / CONFIG, "xception", Preprocessing(), 3)
    assert (preprocessing, classes) == (Preprocessing(), None)
    assert len(notes) == 1
    assert notes[0].startswith("config.json is not used, because it cannot be read: ")


def test_a_file_of_a_newer_release(tmp_path):
    path = tmp_path / "x.safetensors"
    own_file(path, json.dumps({"version": 2}))
    with pytest.raises(BadDataError, match="version 2 of the format") as caught:
        load_network(path)
    assert caught.value.fix == "update xception_jax"
