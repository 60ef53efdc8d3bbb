"""Follows docs/tutorials/your_folder.md from a folder of photographs to a file for Keras.

The commands are those of the page, in its order. The photographs are crops of images that scikit-image and scikit-learn
ship; crops of one region are a group. The network is a whole Xception with random weights at 71 pixels: this test shows
that the steps fit together, not how good the classifier becomes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import xception_jax
from benchmarks.first_hour import CLASSES, PHOTOGRAPHS
from tests.conftest import ROOT
from tests.test_docs import DOCS, SHELL, blocks, commands, program_arguments
from xception_jax.cli import main
from xception_jax.config import resolve_model
from xception_jax.data.images import Preprocessing
from xception_jax.data.sources import TfdsSource
from xception_jax.models import create_model
from xception_jax.weights import Network, save_network

pytestmark = pytest.mark.slow
SIZE = 71
# Not followed: the example of another folder, and training the other layers, which compiles a second step.
LEFT_OUT = ("scans", "--config=finetune")
REPLACED = {"--config.init.weights=keras/xception": "--config.init.weights=random.safetensors"}
ADDED = {
    "prepare": ["--groups", r"(.+/region\d+)_"],
    "train": [f"--config.data.image_size={SIZE}", "--config.duration=10 epochs", "--config.evaluation.heat_maps=2"],
    "evaluate": ["--split", "test"],
}


def page_commands() -> list[list[str]]:
    """Returns the arguments of each command that is followed; the second network is replaced by the first."""
    found = []
    for token, _ in blocks(DOCS / "tutorials" / "your_folder.md", SHELL):
        for words in commands(token.content):
            arguments = program_arguments(words)
            if arguments is not None and not set(LEFT_OUT) & set(arguments):
                arguments = [REPLACED.get(word, word.replace("runs/flowers", "runs/head")) for word in arguments]
                found.append(arguments + ADDED.get(arguments[0], []))
    return found


def save_random_weights(path: Path) -> None:
    model = resolve_model({"name": "xception"})
    variables = create_model(model).init(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32))
    preprocessing = Preprocessing(size=SIZE)
    save_network(path, Network(model, jax.tree.map(np.asarray, variables), preprocessing, None, "random", ""))


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Returns the directory in which the commands of the page were run."""
    place = tmp_path_factory.mktemp("folder")
    subprocess.run([sys.executable, "-c", PHOTOGRAPHS, "flowers"], cwd=place, check=True)
    (place / "flowers" / CLASSES[0]).rename(place / "flowers" / "rose")  # the class that the page explains
    shutil.copytree(place / "flowers" / "rose", place / "new_photos")
    save_random_weights(place / "random.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.syspath_prepend(str(ROOT))
        patch.setenv("TFDS_DATA_DIR", str(place / "datasets"))
        for arguments in page_commands():
            patch.setattr(sys, "argv", ["xception-jax", *arguments])
            assert main() == 0, arguments
    return place


def test_the_page_goes_from_a_folder_to_an_export():
    assert [arguments[0] for arguments in page_commands()] == [
        "prepare",
        "train",
        "evaluate",
        "explain",
        "predict",
        "export",
        "convert",
    ]


def test_no_region_is_on_two_sides(followed):
    regions = {}
    for split in ("train", "validation", "test"):
        source = TfdsSource(followed / "datasets" / "flowers" / "1.0.0", split)
        regions[split] = {name.rsplit("_", 1)[0] for name in source.column("file_name")}
        assert regions[split]
    assert not regions["train"] & regions["test"]
    assert not regions["train"] & regions["validation"]
    assert not regions["validation"] & regions["test"]


def test_every_step_leaves_its_file(followed):
    report = (followed / "runs" / "head" / "report.html").read_text()
    assert "top-5" not in report.lower()  # of five classes
    assert "region" in report  # mistakes by file name
    assert (followed / "sheet.png").stat().st_size > 10_000
    assert (followed / "flowers.onnx").is_file()


@pytest.mark.filterwarnings("ignore")  # of Keras
def test_keras_predicts_the_same(followed, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # read when Keras is imported
    monkeypatch.setenv("TFDS_DATA_DIR", str(followed / "datasets"))  # has the names of the classes
    import keras

    network = xception_jax.load(followed / "runs" / "head")
    assert set(network.classes) == {"rose", *CLASSES[1:]}
    reference = keras.applications.Xception(
        weights=None, input_shape=(SIZE, SIZE, 3), classes=len(CLASSES), classifier_activation=None
    )
    reference.load_weights(followed / "flowers.weights.h5")
    images = np.random.default_rng(0).uniform(-1, 1, (3, SIZE, SIZE, 3)).astype(np.float32)
    ours, theirs = np.asarray(network(images)), np.asarray(reference(images, training=False))
    spread = np.ptp(ours, axis=0).max()  # between images; small, because the weights are random
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * spread)
