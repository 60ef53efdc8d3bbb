"""Compares timm's networks with golden values in timm_golden.npz, which tests/peers computes with timm itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from released import assert_same, config, narrow
from skimage import data

from tests.peers.timm_weights import part, sample, tensor
from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.models import create_model
from xception_jax.runs import open_network
from xception_jax.weights import Preprocessing, load_network, load_timm, tree
from xception_jax.weights.timm import timm_names

GOLDEN = np.load(Path(__file__).with_name("timm_golden.npz"))
# timm counts padding in pools, so that sides should be even somewhere; these are small for the sake of time.
SIZES = {"legacy_xception": 96, "inception_v3": 96}

SMALL = narrow(num_classes=3, middle_blocks=2, padding="symmetric", batch_norm={"epsilon": 1e-5})
RNG = np.random.default_rng(0)
LEAVES = {name: RNG.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in tree.shapes(SMALL).items()}
BACKBONE_LEAVES = {name: leaf for name, leaf in LEAVES.items() if not name.startswith(tree.HEAD)}
TENSORS = {
    timm_names(SMALL)[name]: leaf.transpose((3, 2, 0, 1) if leaf.ndim == 4 else None) for name, leaf in LEAVES.items()
}


@pytest.fixture
def small(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def write(path: Path, name: str) -> None:
    """Writes deterministic weights that depend on timm's names, so a wrong name gives other values than in timm."""
    fields = {"aux_head": True} if name == "inception_v3" else {}
    model = config(name.removeprefix("legacy_"), batch_norm={"scale": True}, **fields)
    tensors, names = {}, timm_names(model)
    for leaf, shape in tree.shapes(model).items():
        key = names[leaf]
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


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_logits_and_feature_maps_of_a_photograph(files, capsys, name):
    network = load_network(files[name])
    if name == "inception_v3":
        assert "left out: AuxLogits.*" in capsys.readouterr().err
        assert network.preprocessing == Preprocessing(crop=0.875, interpolation="antialiased_bicubic")
    else:
        assert network.preprocessing == Preprocessing(crop=0.8975, interpolation="antialiased_bicubic")
    with jax.enable_x64(True):
        apply = jax.jit(create_model(network.model.replace(dtype="float64")).apply)
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
    with pytest.raises(BadDataError) as caught:
        load_timm(path, model.replace(batch_norm=model.batch_norm.replace(scale=False)))
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


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "model.backbone."])
def test_what_stands_before_all_names_is_left_out(small, prefix):
    write_tensors(small, {prefix + name: value for name, value in TENSORS.items()})
    assert_same(load_timm(small, SMALL), LEAVES)
    with pytest.raises(BadDataError, match="num_classes=3"):  # the network that is inferred is as wide as timm's
        load_network(small)


def test_two_networks_are_not_chosen_between(small):
    write_tensors(small, TENSORS | {f"ema.{name}": value for name, value in TENSORS.items()})
    with pytest.raises(BadDataError, match=r"more than once: \*, ema\.\*"):
        load_timm(small, SMALL)


def renamed(prefix: str, head: str) -> dict[str, np.ndarray]:
    """Returns the tensors with other names of the classifier."""
    return {prefix + re.sub(r"^fc\b", head, name): value for name, value in TENSORS.items()}


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("", "last_linear"),  # Cadene's pretrained-models
        ("model.", "last_linear"),  # FaceForensics++
        ("model.", "last_linear.1"),  # the same with dropout
        ("module.model.", "fc.1"),
        ("backbone.", "last_linear"),  # DeepfakeBench
        ("net.", "fc"),
    ],
)
def test_related_projects_call_the_classifier_something_else(small, capsys, prefix, head):
    write_tensors(small, renamed(prefix, head))
    assert_same(load_timm(small, SMALL, head=True), LEAVES)
    assert capsys.readouterr().err == ""
    network = load_network(small, SMALL)
    assert_same(network.variables, LEAVES)
    if head.startswith("last_linear") or head == "fc.1":
        assert network.preprocessing == Preprocessing(299, 1.0, "bicubic")
        assert "does not specify an image size; assuming 299" in capsys.readouterr().err
        assert load_network(small, SMALL, size=256).preprocessing.size == 256


def test_pointwise_kernels_without_their_sides_of_1(small):
    """xception-b5690688 has them."""
    flat = {name: value.squeeze((2, 3)) if "pointwise" in name else value for name, value in TENSORS.items()}
    assert sum(value.ndim == 2 for value in flat.values()) == 16 + 1  # and the classifier
    write_tensors(small, flat)
    assert_same(load_timm(small, SMALL), LEAVES)


def test_a_file_of_deepfakebench_needs_no_model(file, tmp_path, capsys):
    tensors = {f"backbone.{name}": value for name, value in safetensors.numpy.load_file(file).items()}
    tensors |= {f"backbone.last_linear.{leaf}": tensors.pop(f"backbone.fc.{leaf}")[:2] for leaf in ("weight", "bias")}
    tensors["backbone.adjust_channel.0.weight"] = np.ones((512, 2048, 1, 1), np.float32)
    tensors |= {f"backbone.adjust_channel.1.{leaf}": np.ones(512, np.float32) for leaf in ("weight", "running_var")}
    write_tensors(tmp_path / "x.safetensors", tensors)
    network = load_network(tmp_path / "x.safetensors", size=256)
    assert network.model == config("xception", padding="symmetric", batch_norm={"epsilon": 1e-5}, num_classes=2)
    kernel = network.variables["params"]["head"]["predictions"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors["backbone.last_linear.weight"].T)
    assert network.preprocessing == Preprocessing(256, 1.0, "bicubic")
    told = capsys.readouterr().err
    assert told.startswith("note: left out: backbone.adjust_channel.*, a layer of DeepfakeBench")
    assert len(told.splitlines()) == 1


HEADS = {
    "none": {},
    "of other classes": {"fc.weight": (5, 205), "fc.bias": (5,)},
    "in a row": {"fc.0.weight": (8, 205), "fc.0.bias": (8,), "fc.2.weight": (3, 8), "fc.2.bias": (3,)},
    "outside": {"classifier.weight": (3, 205), "classifier.bias": (3,)},
    "two": dict.fromkeys(("fc.weight", "last_linear.weight"), (3, 205)) | {"fc.bias": (3,), "last_linear.bias": (3,)},
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_not_one_layer_that_fits_is_left_out(small, capsys, head):
    prefix = "backbone." if head == "outside" else ""
    tensors = {prefix + name: value for name, value in TENSORS.items() if not name.startswith("fc.")}
    write_tensors(small, tensors | {name: np.ones(shape, np.float32) for name, shape in HEADS[head].items()})
    assert_same(load_timm(small, SMALL), BACKBONE_LEAVES)
    told = capsys.readouterr().err
    if head == "none":
        assert not told
    else:
        assert f"left out: {min(HEADS[head])}, " in told
        assert "the model's classifier is" in told
    assert_same(load_timm(small, SMALL, head=False), BACKBONE_LEAVES)
    with pytest.raises(BadDataError, match="the head does not fit"):
        load_timm(small, SMALL, head=True)


def test_a_head_that_fits_is_taken_or_left_out(small, capsys):
    write_tensors(small, TENSORS)
    assert_same(load_timm(small, SMALL, head=True), LEAVES)
    assert_same(load_timm(small, SMALL, head=False), BACKBONE_LEAVES)
    assert capsys.readouterr().err == "note: left out: fc.bias, fc.weight\n"
    assert "head" not in load_network(small, SMALL, head=False).variables["params"]


def test_the_hubs_description_beside_the_file_is_read(small, capsys):
    write_tensors(small, TENSORS)
    described = {"input_size": [3, 331, 331], "crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6]}
    config_json = small.with_name("config.json")
    content = {"pretrained_cfg": described | {"std": [0.1, 0.2, 0.3]}, "label_names": ["cat", "dog", "bird"]}
    config_json.write_text(json.dumps(content))
    network = load_network(small, SMALL)
    assert network.preprocessing == Preprocessing(331, 0.9, "antialiased_bilinear", (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
    assert network.classes == ("cat", "dog", "bird")
    assert load_network(small, SMALL, head=False).classes is None
    assert capsys.readouterr().err == "note: left out: fc.bias, fc.weight\n"
    config_json.write_text('{"pretrained_cfg": 3}')
    assert load_network(small, SMALL).preprocessing.crop == 0.8975
    config_json.write_text(json.dumps(content))
    with pytest.raises(InputMissingError) as caught:
        open_network(str(small.parent))
    assert str(small) in caught.value.fix


def test_descriptions_of_other_versions_of_timm(small):
    write_tensors(small, TENSORS)
    config_json, names = small.with_name("config.json"), ["cat", "dog", "bird"]
    flat = {"architecture": "xception", "crop_pct": 0.9, "labels": names}
    by_number = {"pretrained_cfg": {"crop_pct": 0.9, "label_names": {"0": "cat", "1": "dog", "2": "bird"}}}
    for content in (flat, by_number):
        config_json.write_text(json.dumps(content))
        network = load_network(small, SMALL)
        assert (network.preprocessing.crop, network.classes) == (0.9, ("cat", "dog", "bird"))
    for content in (flat | {"global_pool": "max"}, {"pretrained_cfg": {"global_pool": "avgmax"}}):
        config_json.write_text(json.dumps(content))
        with pytest.raises(BadDataError, match="pooling, not average pooling"):
            load_network(small, SMALL)
        assert load_network(small, SMALL, head=False).preprocessing.size == 299


def test_what_of_the_description_is_not_supported_is_told(small, capsys):
    write_tensors(small, TENSORS)
    described = {
        "interpolation": "lanczos",
        "crop_mode": "squash",
        "crop_pct": 0.95,
        "mean": 3,
        "input_size": [3, 9, 8],
    }
    content = {"pretrained_cfg": described, "label_names": ["cat"]}
    small.with_name("config.json").write_text(json.dumps(content))
    network = load_network(small, SMALL)
    assert network.preprocessing == Preprocessing(299, 0.95, "antialiased_bicubic")
    assert network.classes is None
    told = capsys.readouterr().err
    for name in ("interpolation 'lanczos'", "crop_mode 'squash'", "mean 3", "input_size [3, 9, 8]"):
        assert f"{name} in config.json is not supported" in told
    assert "config.json names 1 classes, the classifier has 3" in told


@pytest.mark.parametrize(("names", "classes"), [(["cat"], ("not cat", "cat")), (["dog", "cat"], ("dog", "cat"))])
def test_one_logit_has_the_names_of_two_classes(small, names, classes):
    single = SMALL.replace(num_classes=1)
    write_tensors(small, {name: tensor[:1] if name.startswith("fc.") else tensor for name, tensor in TENSORS.items()})
    small.with_name("config.json").write_text(json.dumps({"pretrained_cfg": {}, "label_names": names}))
    network = load_network(small, single)
    assert (network.classes, network.num_classes) == (classes, 2)


def test_the_bias_of_one_logit_beside_a_prefixed_network_is_no_state_of_training(small):
    single = {name: tensor[:1] if name.startswith("fc.") else tensor for name, tensor in TENSORS.items()}
    write_tensors(small, {n if n.startswith("fc.") else f"backbone.{n}": tensor for n, tensor in single.items()})
    with pytest.raises(BadDataError, match=r"fc\.bias \(1,\), fc\.weight"):  # both are named, neither is dropped
        load_network(small, SMALL.replace(num_classes=1), head=True)


def test_the_state_of_training_beside_a_network_is_ignored(small, capsys):
    state = {"optimizer.state.0.exp_avg": np.ones(3, np.float32), "epoch": np.array(3)}
    write_tensors(small, {f"module.{name}": tensor for name, tensor in TENSORS.items()} | state)
    network = load_network(small, SMALL, head=True)
    assert "head" in network.variables["params"]
    assert "left out" not in capsys.readouterr().err


def test_a_classifier_without_classes_is_the_fault_of_the_file(small):
    write_tensors(small, {name: tensor[:0] if name.startswith("fc.") else tensor for name, tensor in TENSORS.items()})
    with pytest.raises(BadDataError, match="has no classes"):
        load_network(small)


@pytest.mark.parametrize("key", ["architecture", "pretrained_cfg"])
def test_the_description_of_another_network_is_not_used(small, capsys, key):
    write_tensors(small, TENSORS)
    described = {"crop_pct": 0.9, "mean": [0.4, 0.5, 0.6]}
    for name, crop in (("vit_base_patch16_224", 0.8975), ("legacy_xception", 0.9)):
        content = {"pretrained_cfg": described, "architecture": name}
        if key == "pretrained_cfg":
            content = {"pretrained_cfg": described | {"architecture": name}}
        small.with_name("config.json").write_text(json.dumps(content))
        assert load_network(small, SMALL).preprocessing.crop == crop
    told = "config.json is not used, because it describes 'vit_base_patch16_224', not xception"
    assert capsys.readouterr().err.count(told) == 1


def test_a_classifier_with_a_name_of_its_own_is_left_out_on_request(small, capsys):
    others = {"logits.weight": np.ones((3, 205), np.float32), "logits.bias": np.ones(3, np.float32)}
    write_tensors(small, {name: value for name, value in TENSORS.items() if not name.startswith("fc.")} | others)
    with pytest.raises(BadDataError, match="not part of the network: logits") as caught:
        load_network(small, SMALL)
    assert "--no-head" in caught.value.fix
    assert_same(load_timm(small, SMALL, head=False), BACKBONE_LEAVES)
    assert "left out: logits.bias, logits.weight" in capsys.readouterr().err
