"""`import xception_jax`: the API gives what the commands and the module itself give."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image

import xception_jax
from tests.data.small_imagenet import photographs
from xception_jax.config import default_config, resolve_model
from xception_jax.data.turn import Turn
from xception_jax.errors import BadDataError, ConfigError, InputMissingError, UsageError
from xception_jax.evaluation.predict import class_names, predict
from xception_jax.weights import Network, Preprocessing, load_network, save_network, tree
from xception_jax.weights.load import resized

SMALL = {"name": "xception", "num_classes": 7, "width_multiplier": 0.05, "middle_blocks": 1, "stem": "small"}
PREPROCESSING = Preprocessing(size=40, crop=0.9)


def write_network(path, *, head: bool = True, **fields) -> None:
    model = resolve_model(SMALL | fields)
    rng = np.random.default_rng(0)
    leaves = {name: rng.uniform(0.5, 1, shape).astype(np.float32) for name, shape in tree.shapes(model).items()}
    for name in leaves:
        if name.endswith("kernel"):
            leaves[name] -= 0.75
    kept = {name: leaf for name, leaf in leaves.items() if head or not name.startswith(tree.HEAD)}
    save_network(path, Network(model, tree.unflatten(kept), PREPROCESSING, None, "", ""))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("api")
    write_network(directory / "weights.safetensors")
    write_network(directory / "features.safetensors", head=False)
    for number in range(3):
        Image.fromarray(photographs()[number]).save(directory / f"{number}.png")
    (directory / "damaged.jpg").write_bytes(b"\xff\xd8\xff no image")
    return directory


@pytest.fixture(scope="module")
def network(files):
    return xception_jax.load(files / "weights.safetensors")


def test_importing_the_package_does_not_import_jax():
    code = "import sys, xception_jax; assert 'jax' not in sys.modules; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        xception_jax.nothing  # noqa: B018


def test_predictions_are_those_of_the_command(network, files):
    paths = [files / f"{number}.png" for number in range(3)]
    expected = list(predict(load_network(files / "weights.safetensors"), paths, top=4))
    names = class_names(network.network)
    found = network.predict(paths, top=4)
    for ours, theirs in zip(found, expected, strict=True):
        assert [name for name, _ in ours] == [names[k] for k in theirs.classes]
        np.testing.assert_allclose([p for _, p in ours], theirs.probabilities, rtol=1e-5)
    assert [name for name, _ in network.predict(str(paths[1]), top=4)] == [name for name, _ in found[1]]


def test_paths_arrays_and_pillow_images_are_one(network, files):
    from_file = network.preprocess(files / "0.png")
    assert from_file.shape == (1, 40, 40, 3)
    pixels = photographs()[0]
    for image in (pixels, pixels[None], [pixels], Image.fromarray(pixels), (str(files / "0.png"),)):
        np.testing.assert_array_equal(network.preprocess(image), from_file)
    assert len(network.predict(pixels, top=100)) == 7
    assert np.shape(network.predict(pixels[None], top=2)) == (1, 2, 2)


def test_logits_and_features_are_those_of_the_module(network, files):
    images = network.preprocess([files / "0.png", files / "1.png"])
    logits, endpoints = network.module.apply(network.variables, images, train=False)
    np.testing.assert_allclose(network(images), logits, rtol=1e-4, atol=1e-5)
    for name in ("pre_logits", "block3"):
        np.testing.assert_allclose(network.features(images, name), endpoints[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="no endpoint 'block99'") as error:
        network.features(images, "block99")
    assert "block6" in error.value.fix
    for pixels in (np.zeros((1, 40, 40, 3), np.uint8), images[0]):
        for call in (network, network.features):
            with pytest.raises(UsageError, match="preprocess"):
                call(pixels)
    with pytest.raises(UsageError, match="top is 0"):
        network.predict(files / "0.png", top=0)


def test_without_a_classifier_there_are_features(network, files):
    headless = xception_jax.load(files / "features.safetensors")
    images = network.preprocess(files / "2.png")
    np.testing.assert_allclose(headless.features(images), network.features(images), rtol=1e-5, atol=1e-6)
    for call in (headless, lambda images: headless.predict(files / "2.png")):
        with pytest.raises(BadDataError, match="no classifier"):
            call(images)


def test_features_without_a_classifier_come_before_its_hidden_layers(tmp_path, network, files):
    write_network(tmp_path / "hidden.safetensors", head=False, fc_layers=1, fc_width=5)
    hidden = xception_jax.load(tmp_path / "hidden.safetensors")
    images = network.preprocess(files / "2.png")
    assert hidden.features(images).shape == network.features(images).shape


def test_a_network_describes_itself_in_three_lines(network, files):
    lines = repr(network).splitlines()
    assert len(lines) == 3
    count = sum(leaf.size for leaf in jax.tree.leaves(network.variables["params"]))
    assert lines[0] == f"xception, {count:,} parameters, 7 classes"
    assert lines[1].startswith("images: 40 x 40 pixels")
    assert str(files / "weights.safetensors") in lines[2]
    assert "no classifier" in repr(xception_jax.load(files / "features.safetensors"))


def test_what_cannot_be_read_is_named(network, files):
    with pytest.raises(BadDataError, match="cannot be decoded") as error:
        network.predict([files / "0.png", files / "damaged.jpg"])
    assert "damaged.jpg" in error.value.where
    with pytest.raises(InputMissingError):
        network.predict(files / "missing.jpg")
    with pytest.raises(UsageError, match="not 3 channels and at least"):
        network(np.zeros((1, 71, 71, 4), np.float32))
    with pytest.raises(UsageError, match=r"uint8 of shape \(0, 10, 3\)"):
        network.predict(np.zeros((0, 10, 3), np.uint8))
    with pytest.raises(InputMissingError, match="cannot be read"):
        network.predict("a\0b.jpg")
    with pytest.raises(UsageError, match=r"float64 of shape \(40, 40, 3\)"):
        network.predict(np.zeros((40, 40, 3)))
    for step in (None, 3):
        with pytest.raises(InputMissingError):
            xception_jax.load(files / "missing.safetensors", step=step)
    for wrong in ("photo.jpg", [np.zeros((1, 71, 71, 3), np.float32)]):
        with pytest.raises(UsageError, match="images are a"):
            network(wrong)
    for top in (0, 2.5, "3"):
        with pytest.raises(UsageError, match="top is"):
            network.predict(files / "0.png", top=top)
    with pytest.raises(ConfigError, match="the config is a int"):
        xception_jax.train(3, files)


@pytest.mark.slow
def test_a_run_trains_and_is_loaded(tmp_path, shared_environment):
    config = default_config()
    config.model.update(SMALL)
    config.data.name, config.data.data_dir = "fashion_mnist_subset", shared_environment["TFDS_DATA_DIR"]
    config.model.num_classes, config.data.image_size, config.data.augmentation = 10, 28, "none"
    config.data.train_split, config.data.eval_split, config.data.test_split = "train[:32]", "", "test[:16]"
    config.batch_size, config.evaluation.batch_size, config.duration = 8, 8, "1 step"
    config.evaluation.heat_maps = 4
    summary = xception_jax.train(config, tmp_path / "run")
    assert (summary.step, summary.metrics["count"]) == (1, 16)
    assert 'class="heat-map"' in summary.report.read_text()
    network = xception_jax.load(tmp_path / "run")
    assert "Sneaker" in network.classes
    assert len(network.predict(np.zeros((28, 28, 3), np.uint8), top=3)) == 3


def test_a_config_can_be_a_name_or_a_file(tmp_path):
    with pytest.raises(InputMissingError, match="no config nothing"):
        xception_jax.train("nothing", tmp_path / "run")
    (tmp_path / "mine.py").write_text(
        "from configs.fashion_mnist import get_config as shipped\n\n\n"
        "def get_config():\n    config = shipped()\n    config.model.num_classes = 3\n    return config\n"
    )
    with pytest.raises(ConfigError, match="num_classes is 3"):
        xception_jax.train(tmp_path / "mine.py", tmp_path / "run")


def test_train_needs_the_main_thread(tmp_path):
    with ThreadPoolExecutor() as pool, pytest.raises(UsageError, match="main thread"):
        pool.submit(xception_jax.train, "fashion_mnist", tmp_path / "run").result()
    assert not (tmp_path / "run").exists()


def test_turned_images_keep_an_even_size(files):
    """Otherwise `convert --size` would write a file that nothing can open."""
    network = load_network(files / "weights.safetensors")
    turned = dataclasses.replace(network.preprocessing, turn=Turn("free", 1.0, 0))
    network = dataclasses.replace(network, preprocessing=turned)
    assert resized(network, "x", 42).preprocessing.size == 42
    with pytest.raises(BadDataError, match="divisible by 2, and 41 is not"):
        resized(network, "x", 41)
