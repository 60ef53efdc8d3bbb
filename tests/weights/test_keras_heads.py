"""Tests what surrounds the network in Keras files (heads, training state, preprocessing), on a narrow Xception."""

from __future__ import annotations

import json

import h5py
import keras
import numpy as np
import pytest
from released import narrow, narrow_xception, no_initialisers

from tests.models.keras_weights import keras_floatx
from xception_jax.errors import BadDataError
from xception_jax.weights import load_keras, load_network, tree
from xception_jax.weights.keras_architecture import LayerConfig, compare_head, epsilon

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
layers = keras.layers


@pytest.fixture(scope="module", autouse=True)
def _quick_initialisers():
    with no_initialisers():
        yield


@pytest.fixture(scope="module")
def base() -> keras.Model:
    model = narrow_xception()
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in model.get_weights()])
    return model


def on(base: keras.Model, *above: keras.layers.Layer) -> keras.Model:
    images = keras.Input((71, 71, 3))
    x = base(images)
    for layer in above:
        x = layer(x)
    return keras.Model(images, x)


def architecture(model: keras.Model) -> LayerConfig:
    return LayerConfig.from_json(json.loads(model.to_json()))


def pooled(*above: keras.layers.Layer) -> tuple[keras.layers.Layer, ...]:
    return layers.GlobalAveragePooling2D(), *above


def dense(units: int, activation: str | None = None) -> keras.layers.Layer:
    return layers.Dense(units, activation)


@pytest.mark.parametrize(
    ("above", "count", "sigmoid"),
    [
        (lambda: pooled(dense(1, "sigmoid")), 1, True),
        (lambda: pooled(dense(1)), 1, False),
        (lambda: pooled(dense(5, "softmax")), 1, False),
        (lambda: pooled(dense(5)), 1, False),
        (lambda: pooled(layers.GaussianDropout(0.1), layers.Flatten(), layers.Reshape((-1,)), dense(5)), 1, False),
        (lambda: pooled(dense(8), layers.ReLU(), layers.Dropout(0.1), dense(5), layers.Softmax()), 2, False),
        (lambda: pooled(dense(8, "relu"), dense(5), layers.Dropout(0.1), layers.Activation("sigmoid")), 2, True),
        (lambda: (layers.SpatialDropout2D(0.1), keras.Sequential(pooled(dense(5, "sigmoid")))), 1, True),
    ],
)
def test_heads_that_are_ours(base, above, count, sigmoid):
    assert compare_head(architecture(on(base, *above())), count) == ("", sigmoid)


@pytest.mark.parametrize(
    ("above", "named"),
    [
        (lambda: pooled(layers.UnitNormalization(), dense(5)), "UnitNormalization, Dense"),
        (lambda: pooled(layers.Rescaling(7.0), dense(5)), "Rescaling"),
        (lambda: pooled(dense(5), layers.Rescaling(0.2), layers.Softmax()), "Dense, Rescaling, softmax"),
        (lambda: pooled(layers.Reshape((5, 41)), dense(5)), "Reshape"),
        (lambda: pooled(dense(5, "tanh")), "Dense, tanh"),
        (lambda: pooled(dense(5, "relu")), "Dense, relu"),
        (lambda: pooled(dense(5, "softmax"), layers.Softmax()), "softmax, softmax"),
        (lambda: pooled(layers.Lambda(lambda x: x, output_shape=(205,)), dense(5)), "Lambda"),
        (lambda: (layers.GlobalMaxPooling2D(), dense(5)), "GlobalMaxPooling2D"),
        (lambda: (layers.MaxPooling2D(3), layers.Flatten(), dense(5)), "MaxPooling2D"),
    ],
)
def test_heads_that_are_not(base, above, named):
    problem, sigmoid = compare_head(architecture(on(base, *above())), 1)
    assert f"{named}, " in problem
    assert "which is not average pooling" in problem
    assert not sigmoid


@pytest.mark.parametrize(
    "between",
    [
        lambda: [dense(8)],
        lambda: [dense(8, "relu6")],
        lambda: [dense(8), layers.ReLU(6.0)],
        lambda: [dense(8), layers.ReLU(None, 0.3)],
        lambda: [dense(8, "tanh"), layers.ReLU()],
    ],
)
def test_between_dense_layers_is_relu_itself(base, between):
    keras_model = on(base, *pooled(*between(), dense(5)))
    assert "which is not average pooling" in compare_head(architecture(keras_model), 2)[0]


def test_dense_layers_before_the_pooling_are_not_taken(base):
    keras_model = on(base, dense(8, "relu"), *pooled(dense(5)))
    assert "Dense, relu, GlobalAveragePooling2D, Dense, " in compare_head(architecture(keras_model), 2)[0]


def test_several_inputs_and_outputs_are_not_followed(base):
    images, features = keras.Input((71, 71, 3)), keras.Input((205,))
    x = layers.GlobalAveragePooling2D()(base(images))
    keras_model = keras.Model([images, features], dense(5)(layers.Add()([x, features])))
    assert "it ends in Add, Dense, which" in compare_head(architecture(keras_model), 1)[0]
    keras_model = keras.Model(images, [dense(5)(x), dense(5)(x)])
    assert "no single path" in compare_head(architecture(keras_model), 1)[0]


def test_a_head_on_something_else_is_not_taken(base):
    images = keras.Input((71, 71, 3))
    keras_model = keras.Model(images, dense(5)(layers.GlobalAveragePooling2D()(images)))
    assert "no single path leads from the network" in compare_head(architecture(keras_model), 1)[0]


def test_a_graph_in_a_circle_is_not_followed(base):
    description = json.loads(on(base, *pooled(layers.Dropout(0.1), dense(5))).to_json())
    dropout = next(layer for layer in description["config"]["layers"] if layer["class_name"] == "Dropout")
    dropout["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = dropout["name"]
    assert "which is not" in compare_head(LayerConfig.from_json(description), 1)[0]


def test_a_head_of_another_kind_is_left_out_with_the_reason(base, tmp_path, capsys):
    on(base, *pooled(dense(5, "tanh"))).save(tmp_path / "x.keras")
    model = narrow(num_classes=5)
    assert "head" not in load_keras(tmp_path / "x.keras", model)["params"]
    assert "left out: layers/dense (it ends in relu, GlobalAveragePooling2D, Dense, tanh, " in capsys.readouterr().err
    with pytest.raises(BadDataError, match="Dense, tanh") as caught:
        load_keras(tmp_path / "x.keras", model, head=True)
    assert "--no-head" in caught.value.fix


@pytest.mark.parametrize("activation", ["sigmoid", None])
@pytest.mark.parametrize("form", ["h5", "keras", "weights.h5"])
def test_one_unit_is_a_classifier(base, activation, form, tmp_path):
    """With or without a sigmoid, and whether the file tells or not: softmax of one unit would always be 1."""
    keras_model, path = on(base, *pooled(dense(1, activation))), tmp_path / f"x.{form}"
    keras_model.layers[-1].set_weights([np.full((205, 1), 0.25), np.full(1, -2.0)])
    keras_model.save_weights(path) if form == "weights.h5" else keras_model.save(path)
    network = load_network(path, narrow(num_classes=1), head=True)
    head = network.variables["params"]["head"]["predictions"]
    assert (head["kernel"] == 0.25).all()
    assert head["bias"] == [-2]
    assert network.probabilities == "sigmoid"
    assert not network.multi_label
    assert (network.has_single_logit, network.num_classes) == (True, 2)


@pytest.mark.parametrize("form", ["keras", "weights.h5"])
def test_the_state_of_training_is_no_layer_at_any_depth(base, form, tmp_path, capsys):
    inner = on(base, *pooled(dense(5)))
    keras_model = keras.Sequential([keras.Input((71, 71, 3)), layers.Rescaling(1 / 127.5, -1), inner])
    path = tmp_path / f"x.{form}"
    for model in (inner, keras_model, base):
        model.compile("sgd", "mse")
        model.optimizer.build(model.trainable_variables)
    try:
        keras_model.save(path) if form == "keras" else keras_model.save_weights(path)
    finally:
        base.compiled, base.optimizer = False, None
    if form == "weights.h5":
        with h5py.File(path, "a") as file:  # as TensorFlow 2.12 to 2.15 and tf_keras write it
            assert "optimizer" in file["layers/functional"]
            file["metrics/mean/vars/0"] = np.float32(0)
    assert "head" in load_keras(path, narrow(num_classes=5), head=True)["params"]
    assert "left out" not in capsys.readouterr().err


class Metrics(layers.Layer):
    """A layer whose group in a file is named 'metrics'."""

    def build(self, shape):
        self.factor = self.add_weight(shape=(shape[-1],))

    def call(self, x):
        return x * self.factor


def test_a_layer_that_is_called_metrics_is_one(base, tmp_path, capsys):
    on(base, *pooled(Metrics(), dense(5))).save_weights(tmp_path / "x.weights.h5")
    assert "head" not in load_keras(tmp_path / "x.weights.h5", narrow(num_classes=5))["params"]
    assert "not all of its layers are Dense: layers/metrics" in capsys.readouterr().err


def test_the_epsilon_of_a_head_is_not_that_of_the_network(base, tmp_path):
    path = tmp_path / "x.keras"
    on(base, *pooled(layers.BatchNormalization(epsilon=1e-5), dense(5))).save(path)
    load_keras(path, narrow())
    with pytest.raises(BadDataError, match=r"has the epsilon 0\.001, the model 1e-05"):
        load_keras(path, narrow(batch_norm={"epsilon": 1e-5}))
    with pytest.raises(BadDataError) as caught:  # the network that is inferred is as wide as Keras'
        load_network(path)
    assert "batch_norm=" not in str(caught.value)


def test_the_epsilon_is_that_of_most_and_of_the_model_with_as_many(base):
    beside = keras.Model(base.input, layers.BatchNormalization(epsilon=1e-5)(base.output))
    assert epsilon(architecture(beside), 40) == 1e-3
    images = x = keras.Input((71, 71, 3))
    for _ in range(41):
        x = layers.BatchNormalization(epsilon=1e-5)(x)
    assert epsilon(architecture(keras.Model(images, base(x))), 40) == 1e-3


class Subclassed(keras.Model):
    """A model whose layers are stored by attribute, and whose architecture is not stored."""

    def __init__(self, base: keras.Model):
        super().__init__()
        self.base, self.hidden, self.classifier = base, dense(16, "tanh"), dense(5)
        self.hidden.build((None, 205))
        self.classifier.build((None, 16))
        self.built = True

    def get_config(self):
        return {}


@pytest.mark.parametrize("form", ["keras", "weights.h5"])
def test_a_subclassed_model_tells_no_architecture(base, form, tmp_path, capsys):
    keras_model, path = Subclassed(base), tmp_path / f"x.{form}"
    kernel = np.random.default_rng(1).normal(size=(16, 5)).astype(np.float32)
    keras_model.classifier.set_weights([kernel, kernel[0]])
    keras_model.save(path) if form == "keras" else keras_model.save_weights(path)
    found = load_network(path, narrow(num_classes=5, fc_layers=1, fc_width=16))
    np.testing.assert_array_equal(found.variables["params"]["head"]["predictions"]["kernel"], kernel)
    told = capsys.readouterr().err
    assert "assuming average pooling, and ReLU after the hidden Dense layers: hidden" in told
    assert "the file does not specify an image size; assuming 299" in told
    with pytest.raises(BadDataError, match="num_classes=5, fc_layers=1, fc_width=16"):
        load_network(path)


def test_bfloat16(tmp_path):
    """HDF5 lacks bfloat16. Keras writes plain bytes, which only `.weights.h5` and `.keras` mark."""
    with keras_floatx("bfloat16"):
        keras_model = narrow_xception()
        keras_model.set_weights([np.full(each.shape, 1.5, "bfloat16") for each in keras_model.weights])
        keras_model.save_weights(tmp_path / "x.weights.h5")
        keras_model.save(tmp_path / "x.keras")
        keras_model.save(tmp_path / "x.h5")
    for path in tmp_path.iterdir():
        for leaf in tree.flatten(load_keras(path, narrow())).values():
            assert leaf.dtype == "bfloat16"
            assert (leaf == 1.5).all()


@pytest.mark.parametrize(
    ("front", "shape", "size", "interpolation", "told"),
    [
        ([], (71, 90), 90, "bilinear", "71 x 90 pixels; ours are square, using 90"),
        ([], (None, None), 299, "bilinear", "does not specify an image size; assuming 299"),
        ([layers.Resizing(71, 71)], (90, 120), 71, "bilinear", "no layer scales the pixels; assuming -1 to 1"),
        ([layers.Rescaling(1 / 255), layers.Resizing(71, 71)], (90, 120), 71, "bilinear", ""),
        ([layers.Rescaling(-1 / 127.5, 1)], (71, 71), 71, "bilinear", "a scaling to a range that is reversed"),
        ([layers.Resizing(71, 71, "bicubic")], (None, None), 71, "bicubic", "bicubic with the coefficient -0.5"),
        (
            [layers.Resizing(71, 71, "nearest", crop_to_aspect_ratio=True)],
            *((90, 120), 71, "bilinear", "interpolation=nearest, crop_to_aspect_ratio; images are resized whole"),
        ),
        ([layers.RandomCrop(71, 71)], (90, 90), 71, "bilinear", "the effect of random_crop on images is unknown"),
    ],
)
def test_images_that_ours_are_not(base, front, shape, size, interpolation, told, tmp_path, capsys):
    images = x = keras.Input((*shape, 3))
    for layer in front:
        x = layer(x)
    network = base if front else narrow_xception(*shape)
    keras.Model(images, network(x)).save(tmp_path / "x.keras")
    preprocessing = load_network(tmp_path / "x.keras", narrow()).preprocessing
    assert (preprocessing.size, preprocessing.interpolation) == (size, interpolation)
    err = capsys.readouterr().err
    assert told in err if told else not err
    if size == 299:
        assert load_network(tmp_path / "x.keras", narrow(), size=96).preprocessing.size == 96
        assert "size" not in capsys.readouterr().err
