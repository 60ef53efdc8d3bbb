"""Tests that every Keras file format gives the same bits, for single networks and parts of larger models."""

from __future__ import annotations

import json

import h5py
import keras
import numpy as np
import pytest
from released import Released, assert_same, config, no_initialisers

from xception_jax.errors import BadDataError
from xception_jax.weights import Network, Preprocessing, load_keras, load_network, save_keras, tree
from xception_jax.weights.keras_architecture import LayerConfig, compare_head

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def write(model: keras.Model, path) -> None:
    """Writes the format given by the ending: x.weights.h5, x.keras, x.h5 (with the architecture) or x.legacy."""
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    elif path.suffix == ".legacy":  # what save_weights('x.h5') wrote in Keras 2
        whole = path.with_suffix(".h5")
        model.save(whole)
        with h5py.File(whole) as source, h5py.File(path, "w") as target:
            for key, value in source["model_weights"].attrs.items():
                target.attrs[key] = value
            for name in source["model_weights"]:
                source.copy(f"model_weights/{name}", target)
        whole.unlink()
    else:
        model.save(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("released", "form"),
    [("xception", "weights.h5"), ("xception", "keras"), ("xception", "h5"), ("inception_v3", "weights.h5")],
    indirect=["released"],
)
def test_a_network_by_itself(released: Released, form, tmp_path):
    path = tmp_path / f"x.{form}"
    write(released.keras_model, path)
    network = load_network(path)
    assert_same(network.variables, released.leaves)
    assert network.model == released.model
    assert network.preprocessing == Preprocessing()
    assert compare_head(LayerConfig.from_json(json.loads(released.keras_model.to_json())), 1) == ("", False)


def keras_1_names(model: keras.Model, path) -> None:
    """Writes the layout of the released files, whose automatic names do not contain the block."""
    names = {"Conv2D": "convolution2d", "SeparableConv2D": "separableconvolution2d", "BatchNormalization": "bn"}
    leaves = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    with h5py.File(path, "w") as file:
        order = []
        for i, layer in enumerate(model.layers):
            name = f"{names.get(type(layer).__name__, 'other')}_{1000 - i}"
            group = file.create_group(name)
            weights = [f"{name}_{leaves.get(each.name, each.name)}:0" for each in layer.weights]
            group.attrs["weight_names"] = np.array(weights, "S")
            for weight, value in zip(weights, layer.get_weights(), strict=True):
                group[weight] = value
            order.append(name)
        # Long lists are cut into pieces, because an attribute of HDF5 holds at most 64 kB.
        file.attrs["layer_names0"], file.attrs["layer_names1"] = np.array(order[:70], "S"), np.array(order[70:], "S")


@pytest.mark.parametrize(
    ("released", "include_top"),
    [("xception", True), ("xception", False), ("inception_v3", True)],
    indirect=["released"],
)
def test_the_released_layout_with_names_of_keras_1(released: Released, include_top, tmp_path, capsys):
    path = tmp_path / f"{released.name}_weights_tf_dim_ordering_tf_kernels.h5"
    keras_1_names(released.keras_model if include_top else released.backbone(), path)
    network = load_network(path)
    assert_same(network.variables, released.leaves if include_top else released.backbone_leaves)
    with h5py.File(path, "a") as file:
        file.attrs["backend"] = "theano"
    with pytest.raises(BadDataError, match="written with Theano"):
        load_network(path)
    assert network.classes is None  # the file has the name of a public one, and other content
    assert "is the name of a public file, but this is another one" in capsys.readouterr().err


def transfer_learning(backbone: keras.Model, *, hidden: bool = True) -> keras.Model:
    """Builds the model of Keras' guide: augmentation, scaling, the network as a layer, pooling, dropout, Dense."""
    images = keras.Input((96, 96, 3))
    x = keras.Sequential([keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.1)])(images)
    x = keras.layers.Rescaling(1 / 255)(x)
    x = keras.layers.Normalization(mean=[0.5, 0.4, 0.3], variance=[0.01, 0.04, 0.09])(x)
    x = keras.layers.GlobalAveragePooling2D()(backbone(x, training=False))
    x = keras.layers.Dropout(0.2)(x)
    if hidden:
        x = keras.layers.Dense(32, activation="relu")(x)
    model = with_random_head(keras.Model(images, keras.layers.Dense(5)(x)))
    model.compile("adam", "mse")
    return model


def with_random_head(model: keras.Model) -> keras.Model:
    rng = np.random.default_rng(2)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense):
            layer.set_weights([rng.normal(size=weight.shape) for weight in layer.get_weights()])
    return model


@pytest.fixture(scope="module", autouse=True)
def _quick_initialisers():
    with no_initialisers():
        yield


@pytest.fixture(scope="module", params=["xception", "inception_v3"])
def larger(request) -> tuple[Released, keras.Model]:
    released = request.getfixturevalue(request.param)
    return released, transfer_learning(released.backbone())


def head_leaves(model: keras.Model) -> dict[str, np.ndarray]:
    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    names = ["fc1", "predictions"][-len(dense) :]
    return {
        f"params/head/{name}/{leaf}": value
        for name, layer in zip(names, dense, strict=True)
        for leaf, value in zip(("kernel", "bias"), layer.get_weights(), strict=True)
    }


@pytest.mark.parametrize(
    ("larger", "form"),
    [("xception", "weights.h5"), ("xception", "keras"), ("xception", "legacy")],
    indirect=["larger"],
)
def test_a_network_within_a_larger_model(larger, form, tmp_path, capsys):
    released, keras_model = larger
    path = tmp_path / f"x.{form}"
    write(keras_model, path)
    # The model that is asked for has 1,000 classes: the file's head of five is left out, and said to be.
    assert_same(load_keras(path, released.model), released.backbone_leaves)
    assert "left out: " in capsys.readouterr().err
    network = load_network(path, head=True)
    assert network.model == config(released.name, num_classes=5, fc_layers=1, fc_width=32)
    assert_same(network.variables, released.backbone_leaves | head_leaves(keras_model))
    if form == "keras":
        assert network.preprocessing == Preprocessing(96, 1.0, "bilinear", (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    with pytest.raises(BadDataError, match=r"head does not fit: .*\(2048, 1000\)"):
        load_keras(path, released.model, head=True)


@pytest.mark.parametrize(
    ("larger", "frozen"),
    [
        ("xception", slice(None)),
        ("xception", slice(20, 50)),
        ("xception", "norms"),
        # Among equal convolutions of mixed9: which comes first is told by what is frozen before them.
        ("inception_v3", slice(160)),
        ("inception_v3", slice(160, None)),
    ],
    indirect=["larger"],
)
def test_frozen_layers_come_last_in_a_legacy_file(larger, frozen, tmp_path):
    """A legacy file holds a nested model as a row of tensors: first the trainable ones, then all others."""
    released, keras_model = larger
    backbone = next(layer for layer in keras_model.layers if isinstance(layer, keras.Model) and len(layer.layers) > 9)
    layers = [layer for layer in backbone.layers if layer.weights]
    if frozen == "norms":
        layers = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    else:
        layers = layers[frozen]
    for layer in layers:
        layer.trainable = False
    try:
        write(keras_model, tmp_path / "x.legacy")
    finally:
        for layer in layers:
            layer.trainable = True
    assert_same(load_keras(tmp_path / "x.legacy", released.model), released.backbone_leaves)


def test_an_order_that_single_frozen_layers_lose_is_refused(inception_v3: Released, tmp_path):
    """Layers of equal shape can change places; then the numbers in automatic names disagree."""
    backbone = inception_v3.backbone()
    layers = [layer for layer in backbone.layers if layer.weights]
    for layer, is_frozen in zip(layers, np.random.default_rng(9).random(len(layers)) < 0.5, strict=True):
        layer.trainable = not is_frozen
    write(transfer_learning(backbone), tmp_path / "x.legacy")
    with pytest.raises(BadDataError) as caught:
        load_keras(tmp_path / "x.legacy", inception_v3.model)
    assert "base.trainable = True" in caught.value.fix


def test_a_head_on_the_output_itself(xception: Released, tmp_path):
    """Layers added to `base.output` are in the same submodel as the network."""
    backbone = xception.backbone()
    x = keras.layers.GlobalAveragePooling2D()(backbone.output)
    keras_model = with_random_head(keras.Model(backbone.input, keras.layers.Dense(7, activation="softmax")(x)))
    keras_model.save_weights(tmp_path / "x.weights.h5")
    model = config("xception", num_classes=7)
    assert_same(load_keras(tmp_path / "x.weights.h5", model), xception.backbone_leaves | head_leaves(keras_model))


def test_a_model_in_a_sequential_in_a_model(xception: Released, tmp_path):
    inner = keras.Sequential([keras.Input((96, 96, 3)), xception.backbone(), keras.layers.GlobalAveragePooling2D()])
    images = keras.Input((96, 96, 3))
    classifier = keras.layers.Dense(1, activation="sigmoid")
    keras_model = with_random_head(keras.Model(images, classifier(inner(images / 127.5 - 1.0))))
    keras_model.save(tmp_path / "x.h5")
    network = load_network(tmp_path / "x.h5")
    assert network.model.num_classes == 1
    assert network.has_single_logit
    assert_same(network.variables, xception.backbone_leaves | head_leaves(keras_model))
    assert network.preprocessing.mean == (0.5, 0.5, 0.5)


def test_a_head_that_computes_something_else_is_not_taken(xception: Released, tmp_path, capsys):
    images = keras.Input((96, 96, 3))
    x = keras.layers.GlobalAveragePooling2D()(xception.backbone()(images))
    x = keras.layers.Dense(8, activation="tanh")(x)
    keras.Model(images, keras.layers.Dense(3)(x)).save(tmp_path / "x.keras")
    model = config("xception", num_classes=3, fc_layers=1, fc_width=8)
    with pytest.raises(BadDataError, match="Dense, tanh, Dense, which is not"):
        load_keras(tmp_path / "x.keras", model, head=True)
    assert_same(load_keras(tmp_path / "x.keras", model), xception.backbone_leaves)
    assert "tanh" in capsys.readouterr().err


def test_two_networks_in_one_file_are_not_chosen_between(xception: Released, tmp_path):
    images = keras.Input((96, 96, 3))
    backbone, other = xception.backbone(), xception.backbone()
    other.name = "other"
    keras.Model(images, keras.layers.Add()([backbone(images), other(images)])).save_weights(tmp_path / "x.weights.h5")
    with pytest.raises(BadDataError, match="more than once"):
        load_keras(tmp_path / "x.weights.h5", xception.model)


def test_what_is_missing_or_left_over_is_named(xception: Released, tmp_path):
    path = tmp_path / "x.weights.h5"
    xception.keras_model.save_weights(path)
    for blocks in (7, 9):
        with pytest.raises(BadDataError, match=r"34 layers of kind separable where (31|37) are needed"):
            load_keras(path, config("xception", middle_blocks=blocks))
    with h5py.File(path, "a") as file:
        name = "layers/separable_conv2d_12"
        assert file[f"{name}/vars"].attrs["name"] == "block7_sepconv1"
        file.move(name, "hidden")
    with pytest.raises(BadDataError, match="missing: block7_sepconv1"):
        load_keras(path, xception.model)
    with h5py.File(path, "a") as file:
        file.move("hidden", name)
        file["layers/conv2d_17/vars/0"] = np.zeros((3, 3, 8, 8), np.float32)
    with pytest.raises(BadDataError, match="not part of the network: layers/conv2d_17"):
        load_keras(path, xception.model)
    with h5py.File(path, "a") as file:
        del file["layers/conv2d_17"]
        del file[f"{name}/vars/1"]
    with pytest.raises(BadDataError, match="33 layers of kind separable where 34 are needed"):
        load_keras(path, xception.model)


def test_back_to_keras(released: Released, tmp_path):
    """keras.applications loads the files that we write, bit by bit."""
    path = tmp_path / "x.weights.h5"
    save_keras(path, Network(released.model, tree.unflatten(released.leaves), Preprocessing(), None, "", ""))
    expected = released.keras_model.get_weights()
    released.keras_model.set_weights([np.zeros_like(weight) for weight in expected])
    try:
        released.keras_model.load_weights(path)
        assert all(map(np.array_equal, released.keras_model.get_weights(), expected))
    finally:
        released.keras_model.set_weights(expected)
    assert_same(load_keras(path, released.model), released.leaves)


def test_a_network_without_a_head_goes_back_too(xception: Released, tmp_path):
    variables = tree.unflatten(xception.backbone_leaves)
    save_keras(tmp_path / "x.weights.h5", Network(xception.model, variables, Preprocessing(), None, "", ""))
    backbone = xception.backbone()
    expected = backbone.get_weights()
    backbone.set_weights([np.zeros_like(weight) for weight in expected])
    backbone.load_weights(tmp_path / "x.weights.h5")
    assert all(map(np.array_equal, backbone.get_weights(), expected))
