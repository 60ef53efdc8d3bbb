"""Tests our own safetensors and the command `convert`."""

from __future__ import annotations

import argparse
import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy
from released import assert_same, config

from xception_jax.cli import convert as command
from xception_jax.config import to_dict
from xception_jax.errors import BadDataError, ConfigError, StorageError, UsageError, UserError
from xception_jax.weights import Network, Preprocessing, load_network, save_keras, save_network, tree

# A tenth of the width, two middle blocks: 300,000 parameters.
MODEL = config("xception", width_multiplier=0.1, middle_blocks=2, num_classes=3)
PREPROCESSING = Preprocessing(71, 1.0, "antialiased_bicubic", (0.5, 0.25, 0.125), (0.1, 0.2, 0.3))


def network(**fields) -> Network:
    rng = np.random.default_rng(0)
    leaves = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in tree.shapes(MODEL).items()}
    given = {"model": MODEL, "variables": tree.unflatten(leaves), "preprocessing": PREPROCESSING}
    return Network(**given | {"classes": ("<cat>", "dög", "a\nb"), "source": "here", "sha256": "0"} | fields)


@pytest.fixture
def path(tmp_path):
    save_network(tmp_path / "x.safetensors", network())
    return tmp_path / "x.safetensors"


def test_all_comes_back(path):
    loaded = load_network(path)
    assert_same(loaded.variables, tree.flatten(network().variables))
    assert loaded.model == MODEL
    assert loaded.preprocessing == PREPROCESSING
    assert loaded.classes == ("<cat>", "dög", "a\nb")
    assert loaded.source == str(path)
    assert not loaded.multi_label
    save_network(path, network(multi_label=True))
    assert load_network(path).multi_label


def test_the_same_network_gives_the_same_bytes(path, tmp_path):
    save_network(tmp_path / "again.safetensors", network())
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_names_are_those_of_the_network(path):
    tensors = safetensors.numpy.load_file(path)
    assert tensors["params/block5_sepconv1/spatial/kernel"].shape == (3, 3, 1, 73)
    assert tensors["batch_stats/block2_shortcut_bn/var"].shape == (13,)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_types_stay_as_they_are(tmp_path, dtype):
    leaves = {name: value.astype(dtype) for name, value in tree.flatten(network().variables).items()}
    save_network(tmp_path / "x.safetensors", network(variables=tree.unflatten(leaves)))
    assert_same(load_network(tmp_path / "x.safetensors").variables, leaves)


def test_one_flipped_bit_is_noticed(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadDataError, match="a tensor has changed since the file was written"):
        load_network(path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "xception", "num_classes": 4}},
        {"model": {"name": "resnet"}},
        {"model": 3},
        {"classes": ["a"]},
        {"preprocessing": {"size": 0}},
        {"preprocessing": {"interpolation": "nearest"}},
        {"preprocessing": {"mean": [0, 0]}},
        {"preprocessing": {"unknown": 1}},
    ],
)
def test_a_description_that_does_not_fit_is_refused(path, change):
    with safetensors.safe_open(path, "numpy") as file:
        description = json.loads(file.metadata()["xception_jax"]) | change
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, {"xception_jax": json.dumps(description)})
    with pytest.raises(BadDataError):
        load_network(path)


def test_values_that_are_not_numbers_are_refused(tmp_path):
    variables = network().variables
    variables["params"]["block5_sepconv1_bn"]["scale"][3] = np.nan
    with pytest.raises(BadDataError, match="params/block5_sepconv1_bn/scale"):
        save_network(tmp_path / "x.safetensors", network(variables=variables))
    assert not (tmp_path / "x.safetensors").exists()


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        save_network(tmp_path / "none" / "x.safetensors", network())


def test_another_model_is_not_silently_ignored(path):
    assert load_network(path, MODEL).model == MODEL
    with pytest.raises(UsageError, match="middle_blocks"):
        load_network(path, config("xception"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"padding": "symmetric"}, "padding"),
        ({"batch_norm": {"epsilon": 1e-5}}, "batch_norm.epsilon"),
        ({"intermediate_activation": "relu"}, "intermediate_activation"),
        ({"segments": 4}, "segments"),
        ({"group_width": 1}, "group_width"),
    ],
)
def test_what_keras_would_compute_otherwise_is_not_written_for_it(tmp_path, fields, named):
    model = config("xception", width_multiplier=0.1, middle_blocks=2, num_classes=3, **fields)
    with pytest.raises(ConfigError) as caught:
        save_keras(tmp_path / "x.weights.h5", network(model=model))
    assert caught.value.where == f"config.model.{named}"


def convert(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(map(str, arguments))))


def test_to_keras_and_back_by_command(path, tmp_path, capsys):
    names, run = tmp_path / "names.txt", tmp_path / "config.json"
    names.write_text("cat\ndog\nbird\n")
    run.write_text(json.dumps({"model": to_dict(MODEL)}))
    keras_path, back = tmp_path / "x.weights.h5", tmp_path / "back.safetensors"
    assert convert(path, keras_path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_classes"] == 3
    assert report["sha256"] == hashlib.sha256(keras_path.read_bytes()).hexdigest()
    assert convert(keras_path, back, "--model", run, "--classes", names, "--size", 71) == 0
    assert "preprocessing" in capsys.readouterr().out
    loaded = load_network(back)
    assert_same(loaded.variables, tree.flatten(network().variables))
    assert loaded.classes == ("cat", "dog", "bird")
    assert loaded.preprocessing.size == 71


def test_a_damaged_file_ends_the_command_with_65(path, tmp_path, run_python):
    path.write_bytes(path.read_bytes()[:100_000])
    ended = run_python("-m", "xception_jax", "convert", path, tmp_path / "y.safetensors")
    assert (ended.returncode, ended.stdout) == (65, "")
    assert ended.stderr.startswith("error: the weight file is damaged")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["x.safetensors", "x.onnx"], 64),
        (["none.h5", "x.safetensors"], 66),
        (["x.safetensors", "y.safetensors", "--model", "resnet"], 66),
        (["x.safetensors", "y.safetensors", "--classes", "none.txt"], 66),
        (["x.safetensors", "y.safetensors", "--classes", "imagenet"], 65),
        (["x.safetensors", "y.safetensors", "--classes", "x.safetensors"], 65),
        (["x.safetensors", "y.safetensors", "--size", "0"], 64),
        (["x.safetensors", "none/y.safetensors"], 74),
    ],
)
def test_arguments_that_make_no_sense(path, monkeypatch, arguments, code):
    monkeypatch.chdir(path.parent)
    with pytest.raises(UserError) as caught:
        convert(*arguments)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\n\nbird",
        '["cat", "dog", "bird"]',
        '{"2": "bird", "0": ["n1", "cat"], "1": ["n2", "dog"]}',
        '{"bird": 2, "cat": 0, "dog": 1}',
    ],
)
def test_forms_of_class_names(path, text):
    names = path.with_name("names")
    names.write_text(text)
    assert command._read_names(names) == ["cat", "dog", "bird"]
