"""timm's networks: what it computes from weights that follow a rule is kept in timm_golden.npz; see tests/peers."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from released import assert_same, config
from skimage import data

from tests.peers.timm_weights import part, sample, tensor
from xception_jax.errors import BadDataError
from xception_jax.models import create_model
from xception_jax.weights import Preprocessing, load_network, load_timm, tree
from xception_jax.weights.timm import timm_name

GOLDEN = np.load(Path(__file__).with_name("timm_golden.npz"))
# timm counts padding in pools, so that sides should be even somewhere; these are small for the sake of time.
SIZES = {"legacy_xception": 96, "inception_v3": 96}


def write(path: Path, name: str) -> None:
    """Writes weights by the rule under timm's names: a wrong name gives other numbers than timm has."""
    fields = {"aux_head": True} if name == "inception_v3" else {}
    model = config(name.removeprefix("legacy_"), batch_norm={"scale": True}, **fields)
    tensors = {}
    for leaf, shape in tree.shapes(model).items():
        key = timm_name(leaf, model.name, 14)
        order = (3, 2, 0, 1) if len(shape) == 4 else tuple(reversed(range(len(shape))))
        tensors[key] = tensor(key, tuple(shape[i] for i in order))
        if key.endswith("running_mean"):
            tensors[key.replace("running_mean", "num_batches_tracked")] = np.array(3)
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("timm")
    for name in SIZES:
        write(directory / f"{name}.safetensors", name)
    return {name: directory / f"{name}.safetensors" for name in SIZES}


@pytest.fixture
def file(files) -> Path:
    return files["legacy_xception"]


@pytest.mark.parametrize("name", SIZES)
def test_logits_and_feature_maps_of_a_photograph(files, capsys, name):
    network = load_network(files[name])
    if name == "inception_v3":
        assert "left out: AuxLogits.*" in capsys.readouterr().err
        assert network.preprocessing == Preprocessing(crop=0.875, interpolation="antialiased_bicubic")
    else:
        assert network.preprocessing == Preprocessing(crop=0.8975, interpolation="antialiased_bicubic")
    network.model.dtype = "float64"
    with jax.enable_x64(True):
        apply = jax.jit(create_model(network.model).apply)
        images = part(data.astronaut(), SIZES[name])
        logits, endpoints = apply(jax.tree.map(np.float64, network.variables), images)
    key = f"{name}:{SIZES[name]}"
    reference = GOLDEN[f"{key}/logits"]
    assert np.abs(np.asarray(logits) - reference).max() < 1e-9 * np.abs(reference).max()
    golden = [endpoint for endpoint in endpoints if f"{key}/{endpoint}" in GOLDEN]
    assert len(golden) == {"legacy_xception": 14, "inception_v3": 11}[name]
    for endpoint in golden:
        reference = GOLDEN[f"{key}/{endpoint}"]
        assert np.abs(sample(endpoints[endpoint]) - reference).max() < 1e-9 * reference[0], endpoint


def test_the_auxiliary_head_is_read_where_the_model_has_one(files):
    path = files["inception_v3"]
    model = config("inception_v3", aux_head=True, padding="symmetric", batch_norm={"scale": True})
    params = load_timm(path, model)["params"]
    kernel = tensor("AuxLogits.conv1.conv.weight", (768, 128, 5, 5))
    np.testing.assert_array_equal(params["aux_1"]["kernel"], kernel.transpose(2, 3, 1, 0))
    model.batch_norm.scale = False
    with pytest.raises(BadDataError) as caught:
        load_timm(path, model)
    assert "scale=True" in caught.value.fix


def test_what_is_missing_or_left_over_is_named(file, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["block13.rep.1.conv1.weight"] = tensors.pop("block7.rep.4.pointwise.weight")
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(BadDataError) as caught:
        load_timm(path, config("xception", padding="symmetric", batch_norm={"epsilon": 1e-5}))
    assert "missing: block7.rep.4.pointwise.weight" in str(caught.value)
    assert "left over: block13.rep.1.conv1.weight" in str(caught.value)


def test_other_arithmetic_is_told(file, capsys):
    load_timm(file, config("xception"))
    told = capsys.readouterr().err
    assert "padding='symmetric', the model has 'same'" in told
    assert "epsilon=1e-05, the model has 0.001" in told
    load_timm(file, config("xception", padding="symmetric", batch_norm={"epsilon": 1e-5}))
    assert capsys.readouterr().err == ""


def test_without_a_classifier_and_from_several_devices(file, tmp_path):
    tensors = safetensors.numpy.load_file(file)
    path = tmp_path / "x.safetensors"
    cut = {f"module.{name}": value for name, value in tensors.items() if not name.startswith("fc.")}
    safetensors.numpy.save_file(cut, path)
    whole = tree.flatten(load_network(file).variables)
    assert_same(
        load_network(path).variables, {name: leaf for name, leaf in whole.items() if not name.startswith(tree.HEAD)}
    )


def test_the_hubs_description_beside_the_file_is_read(file, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file.read_bytes())
    described = '"input_size": [3, 331, 331], "crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6]'
    path.with_name("config.json").write_text(f'{{"pretrained_cfg": {{{described}, "std": [0.1, 0.2, 0.3]}}}}')
    expected = Preprocessing(331, 0.9, "antialiased_bilinear", (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    assert load_network(path).preprocessing == expected
    path.with_name("config.json").write_text('{"pretrained_cfg": 3}')
    assert load_network(path).preprocessing.crop == 0.8975
