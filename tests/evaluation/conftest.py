"""Small networks that several tests use: a weight file with ImageNet's classes, and a run with many labels an image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import multilabel
from tests.data.small_imagenet import write_small_imagenet
from xception_jax.config import default_config, resolve, resolve_model, save_json
from xception_jax.data.prepare import imagenet
from xception_jax.data.prepare.writer import write_dataset
from xception_jax.models import create_model
from xception_jax.training.experiment import make_experiment
from xception_jax.training.loop import open_checkpoints
from xception_jax.weights import Network, Preprocessing, save_network

PREPROCESSING = Preprocessing(71, 0.9, "antialiased_bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture(scope="session")
def network() -> Network:
    """Random weights, which prefer the first four of 1,000 classes."""
    model = default_config().model
    model.update(width_multiplier=0.05, middle_blocks=0)
    model = resolve_model(model)
    shape = np.zeros((1, 71, 71, 3), np.float32)
    variables = jax.jit(lambda: create_model(model).init(jax.random.key(3), shape, train=False))()
    variables = jax.tree.map(np.array, dict(variables))
    head = variables["params"]["head"]["predictions"]
    head["kernel"] *= 30
    head["bias"][:4] += 12
    return Network(model, variables, PREPROCESSING, tuple(imagenet.class_names()), "", "")


@pytest.fixture(scope="session")
def weights(network, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_network(path, network)
    return path


@pytest.fixture(scope="session")
def imagenet_dir(tmp_path_factory) -> Path:
    """A small imagenet2012: 30 validation images of the first three classes."""
    directory = tmp_path_factory.mktemp("imagenet")
    archives = write_small_imagenet(directory / "archives", train_per_class=1, validation=30)
    write_dataset(imagenet.imagenet2012(archives), directory, progress=False)
    return directory


@pytest.fixture(scope="session")
def multilabel_run(tmp_path_factory) -> Path:
    """A run that has saved step 7: random weights, and an average whose classifier is all zeros."""
    directory = tmp_path_factory.mktemp("run")
    config = multilabel.get_config()
    config.model.update(width_multiplier=0.05, middle_blocks=0)
    config.data.data_dir = str(directory / "tfds")
    config.data.test_split = "test[:41]"
    config = resolve(config)
    (directory / "config.json").write_text(save_json(config))
    experiment = make_experiment(config)
    with jax.set_mesh(experiment.mesh), open_checkpoints(experiment, directory) as checkpoints:
        state = experiment.init()
        params = state.ema["params"]
        params = params | {"head": jax.tree.map(lambda leaf: leaf * 0, params["head"])}
        checkpoints.save(7, dataclasses.replace(state, ema=state.ema | {"params": params}))
    return directory
