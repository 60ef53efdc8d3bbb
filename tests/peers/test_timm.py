"""Beside timm itself, at several sizes: `make test-peers` runs it, with PEERS naming an interpreter that has timm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from skimage import data
from timm_weights import part, sample

from tests.weights.for_timm import network_for_timm
from xception_jax.models import create_model
from xception_jax.weights import load_network, save_timm

PEERS = os.environ.get("PEERS")
HERE = Path(__file__).parent
# At 299 one max pool sees an even side, at 224 two; 96 is what the golden numbers are of.
NETWORKS = [f"{name}:{size}" for name in ("legacy_xception", "inception_v3") for size in (299, 224, 96)]

pytestmark = pytest.mark.skipif(not PEERS, reason="needs an interpreter with timm: make test-peers")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Returns the directory of the weights that timm wrote, and what it computes from them."""
    directory = tmp_path_factory.mktemp("timm")
    np.save(directory / "photograph.npy", data.astronaut())
    command = [PEERS, "timm_reference.py", directory / "out.npz", directory / "photograph.npy", *NETWORKS]
    subprocess.run([*map(str, command), "--weights", str(directory)], cwd=HERE, check=True)
    return directory, np.load(directory / "out.npz")


@pytest.mark.parametrize("key", NETWORKS)
def test_logits_and_feature_maps_of_a_photograph(reference, key):
    directory, outputs = reference
    name, size = key.split(":")
    network = load_network(directory / f"{name}.safetensors")
    with jax.enable_x64(True):
        apply = jax.jit(create_model(network.model.replace(dtype="float64")).apply)
        images = part(data.astronaut(), int(size))
        logits, endpoints = jax.device_get(apply(jax.tree.map(np.float64, network.variables), images))
    expected = outputs[f"{key}/logits"]
    print(key, np.abs(logits - expected).max(), "of", np.abs(expected).max())
    assert np.abs(logits - expected).max() < 1e-9 * np.abs(expected).max()
    for endpoint, value in endpoints.items():
        if endpoint != "pre_logits":
            expected = outputs[f"{key}/{endpoint}"]
            assert np.abs(sample(value) - expected).max() < 1e-9 * expected[0], endpoint


def test_the_golden_numbers_are_these(reference):
    golden = np.load(HERE.parent / "weights/timm_golden.npz")
    for key in golden.files:
        if key.endswith("/names"):
            assert golden[key].tolist() == reference[1][key].tolist()
        else:
            np.testing.assert_allclose(golden[key], reference[1][key], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["legacy_xception", "inception_v3"])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_timm_loads_what_we_write(tmp_path, name, num_classes):
    """timm reads the file itself and strictly; what it writes then has the same bits."""
    network = network_for_timm(name, num_classes)
    save_timm(tmp_path / "ours.safetensors", network)
    command = [PEERS, "timm_strict.py", name, num_classes, tmp_path / "ours.safetensors", tmp_path / "back.safetensors"]
    subprocess.run(list(map(str, command)), cwd=HERE, check=True)
    ours, back = (safetensors.numpy.load_file(tmp_path / f"{each}.safetensors") for each in ("ours", "back"))
    assert ours.keys() == back.keys()
    for key, value in ours.items():
        assert value.dtype == back[key].dtype, key
        np.testing.assert_array_equal(value, back[key], err_msg=key)
