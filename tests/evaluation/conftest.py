"""Small networks that several tests use: a weight file with ImageNet's classes, and a run with many labels an image."""

from __future__ import annotations

import dataclasses
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import multilabel
from tests.data.small_imagenet import write_small_imagenet
from tests.models.random_weights import random_variables
from xception_jax.config import override, resolve, resolve_model, to_json
from xception_jax.data.imagenet_classes import class_names
from xception_jax.data.prepare import fashion_mnist, imagenet
from xception_jax.data.prepare.writer import write_dataset
from xception_jax.models import create_model
from xception_jax.training.experiment import make_experiment
from xception_jax.training.run_directory import RunDirectory, open_checkpoints
from xception_jax.weights import Network, Preprocessing, save_network

PREPROCESSING = Preprocessing(71, 0.9, "antialiased_bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Every call of a command compiles its own program; equal ones should cost once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.1), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def network() -> Network:
    """Random weights, which prefer the first four of 1,000 classes."""
    model = resolve_model({"width_multiplier": 0.05, "middle_blocks": 0})
    variables = jax.tree.map(np.array, random_variables(create_model(model), np.zeros((1, 71, 71, 3), np.float32)))
    head = variables["params"]["head"]["predictions"]
    head["bias"][:4] += 6
    return Network(model, variables, PREPROCESSING, tuple(class_names()), "", "")


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
    scenes = fashion_mnist.fashion_mnist_scenes()
    few = {split: islice(examples, 41) for split, examples in scenes.splits.items()}
    write_dataset(dataclasses.replace(scenes, name="few_scenes", splits=few), directory / "tfds", progress=False)
    fields = {
        "model.width_multiplier": 0.05,
        "model.middle_blocks": 0,
        "data.name": "few_scenes",
        "data.data_dir": str(directory / "tfds"),
        "data.train_split": "train",
        "data.eval_split": "",
    }
    config = override(resolve(multilabel.get_config()), fields)
    (directory / "config.json").write_text(to_json(config))
    experiment = make_experiment(config)
    variables = random_variables(experiment.model, np.zeros((1, 64, 64, 3), np.float32))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), experiment.abstract)
    params = variables["params"] | {"head": jax.tree.map(jnp.zeros_like, variables["params"]["head"])}
    state = state.replace(**variables, ema=variables | {"params": params})
    run = RunDirectory(str(directory), directory)
    with jax.set_mesh(experiment.mesh), open_checkpoints(experiment, run, print) as checkpoints:
        checkpoints.save(7, state)
    return directory
