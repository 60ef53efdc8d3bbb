"""Tests our own safetensors and the command `convert`."""

from __future__ import annotations

import hashlib
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from released import assert_same, config

from xception_jax.cli import convert as command
from xception_jax.command_line import Parser
from xception_jax.config import to_dict
from xception_jax.errors import BadDataError, ConfigError, InputMissingError, StorageError, UsageError, UserError
from xception_jax.models import create_model
from xception_jax.runs import open_network, without_classifier
from xception_jax.weights import Network, Preprocessing, load_network, save_network, tree

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


def convert(*arguments: object) -> int:
    parser = Parser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(map(str, arguments))))


@pytest.mark.parametrize(
    ("out", "options", "fields"),
    [
        ("x.weights.h5", [], {}),
        ("y.safetensors", ["--layout", "timm"], {"padding": "symmetric", "batch_norm": {"epsilon": 1e-5}}),
    ],
)
def test_to_another_layout_and_back_by_command(tmp_path, capsys, out, options, fields):
    model = config("xception", num_classes=3, **fields)
    rng = np.random.default_rng(0)
    leaves = {name: rng.random(shape, np.float32) for name, shape in tree.shapes(model).items()}
    names, run, path = tmp_path / "names.txt", tmp_path / "config.json", tmp_path / "x.safetensors"
    names.write_text("cat\ndog\nbird\n")
    run.write_text(json.dumps({"model": to_dict(model)}))
    save_network(path, network(model=model, variables=tree.unflatten(leaves)))
    there, back = tmp_path / out, tmp_path / "back.safetensors"
    assert convert(path, there, *options, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["num_classes"] == 3
    assert report["sha256"] == hashlib.sha256(there.read_bytes()).hexdigest()
    assert "layout cannot store preprocessing, class names, or" in printed.err
    assert convert(there, back, "--model", run, "--classes", names, "--size", 71) == 0
    assert "preprocessing" in capsys.readouterr().out
    loaded = load_network(back)
    assert_same(loaded.variables, leaves)
    assert loaded.classes == ("cat", "dog", "bird")
    assert loaded.preprocessing.size == 71


@pytest.mark.slow
def test_a_run_is_converted(multilabel_run, tmp_path):
    """The Polyak average of a checkpoint, with its preprocessing and whether an image has several labels."""
    path = tmp_path / "x.safetensors"
    assert convert(multilabel_run, path, "--size", 96) == 0
    expected, loaded = open_network(str(multilabel_run)), load_network(path)
    assert_same(loaded.variables, tree.flatten(expected.variables))
    assert not loaded.variables["params"]["head"]["predictions"]["kernel"].any()  # as the average, and nothing else
    assert loaded.model == expected.model
    assert loaded.multi_label
    assert loaded.preprocessing.size == 96
    assert convert(multilabel_run, path, "--step", 7, "--no-head") == 0
    assert "head" not in load_network(path).variables["params"]
    with pytest.raises(InputMissingError):
        convert(multilabel_run, path, "--step", 8)
    with pytest.raises(UsageError, match="describes its network itself"):
        convert(multilabel_run, path, "--model", "xception")
    for arguments in (["y.safetensors", "--layout", "timm"], ["y.weights.h5"]):
        with pytest.raises(ConfigError, match="width_multiplier"):
            convert(multilabel_run, tmp_path / arguments[0], *arguments[1:])
        assert not (tmp_path / arguments[0]).exists()


def test_two_names_of_one_output(tmp_path, capsys):
    model = config("xception", width_multiplier=0.1, middle_blocks=2, num_classes=1)
    variables = tree.unflatten({name: np.ones(shape, np.float32) for name, shape in tree.shapes(model).items()})
    save_network(tmp_path / "x.safetensors", network(model=model, variables=variables, classes=None))
    (tmp_path / "names.json").write_text('{"fake": 0, "real": 1}')
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--classes", tmp_path / "names.json")
    assert load_network(tmp_path / "y.safetensors").classes == ("fake", "real")
    (tmp_path / "name.txt").write_text("real\n")
    convert(tmp_path / "x.safetensors", tmp_path / "z.safetensors", "--classes", tmp_path / "name.txt")
    assert load_network(tmp_path / "z.safetensors").classes == ("not real", "real")


def test_our_own_head_is_left_out_or_required(path, tmp_path):
    bare = tmp_path / "bare.safetensors"
    assert convert(path, bare, "--no-head") == 0
    loaded = load_network(bare)
    assert "head" not in loaded.variables["params"]
    assert loaded.classes is None
    with pytest.raises(BadDataError, match="no classifier"):
        convert(bare, tmp_path / "y.safetensors", "--head")


def test_the_scaling_of_pixels_can_be_given(path, tmp_path):
    assert convert(path, tmp_path / "y.safetensors", "--mean", 0, "--std", 1, 2, 4) == 0
    view = load_network(tmp_path / "y.safetensors").preprocessing
    assert (view.mean, view.std) == ((0.0, 0.0, 0.0), (1.0, 2.0, 4.0))


@pytest.mark.parametrize("field", [{"preprocessing": Preprocessing(5000)}, {"preprocessing": Preprocessing(71, 0.05)}])
def test_nothing_is_written_that_could_not_be_read(tmp_path, field):
    with pytest.raises(BadDataError, match="preprocessing that no weight file may have"):
        save_network(tmp_path / "x.safetensors", network(**field))
    assert not (tmp_path / "x.safetensors").exists()


def test_an_auxiliary_head_has_the_size_of_its_images(tmp_path):
    """It is as large as a map, so it fits images of one size. Without it, the network takes any."""
    model = config("inception_v3", width_multiplier=0.05, aux_head=True, num_classes=3)
    leaves = {name: np.ones(shape, np.float32) for name, shape in tree.shapes(model).items()}
    kernel = leaves["params/aux_1/kernel"]
    leaves["params/aux_1/kernel"] = np.ones((1, 1, *kernel.shape[2:]), np.float32)  # of a run with smaller images
    smaller = network(model=model, variables=tree.unflatten(leaves), preprocessing=Preprocessing(107))
    save_network(tmp_path / "x.safetensors", smaller)
    loaded = load_network(tmp_path / "x.safetensors")
    for side in (75, 107, 139):
        shape = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        logits, _ = jax.eval_shape(create_model(loaded.model).apply, loaded.variables, shape)
        assert logits.shape == (1, 3)
    leaves["params/aux_1/kernel"] = np.ones((1, 1, 2, 2), np.float32)
    wrong = network(model=model, variables=tree.unflatten(leaves))
    with pytest.raises(BadDataError, match="aux_1/kernel"):
        save_network(tmp_path / "y.safetensors", wrong)


def test_a_network_without_a_classifier_is_built_without_its_classes(path, tmp_path):
    """A file can claim any number of them where no tensor shows how many there are."""
    assert convert(path, tmp_path / "bare.safetensors", "--no-head") == 0
    whole = without_classifier(load_network(tmp_path / "bare.safetensors"))
    assert whole.variables["params"]["head"]["predictions"]["kernel"].shape[1] == 1


def test_a_damaged_file_ends_the_command_with_65(path, tmp_path, run_python):
    path.write_bytes(path.read_bytes()[:100_000])
    ended = run_python("-m", "xception_jax", "convert", path, tmp_path / "y.safetensors")
    assert (ended.returncode, ended.stdout) == (65, "")
    assert ended.stderr.startswith("error: the weight file is damaged")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["x.safetensors", "x.onnx"], 64),
        (["x.safetensors", "y.weights.h5", "--layout", "timm"], 64),
        (["x.safetensors", "y.safetensors", "--layout", "timm"], 78),
        (["x.safetensors", "y.weights.h5"], 78),
        (["x.safetensors", "y.safetensors", "--step", "3"], 64),
        (["none.h5", "x.safetensors"], 66),
        (["x.safetensors", "y.safetensors", "--model", "resnet"], 66),
        (["x.safetensors", "y.safetensors", "--classes", "none.txt"], 66),
        (["x.safetensors", "y.safetensors", "--classes", "imagenet"], 65),
        (["x.safetensors", "y.safetensors", "--classes", "x.safetensors"], 65),
        (["x.safetensors", "y.safetensors", "--size", "0"], 64),
        (["x.safetensors", "y.safetensors", "--mean", "0", "1"], 64),
        (["x.safetensors", "y.safetensors", "--mean", "nan"], 64),
        (["x.safetensors", "y.safetensors", "--std", "0"], 64),
        (["x.safetensors", "y.safetensors", "--std", "1e-300"], 64),
        (["x.safetensors", "y.safetensors", "--mean", "1e300"], 64),
        (["x.safetensors", "none/y.safetensors"], 66),
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


def test_a_name_may_begin_with_a_bracket(path):
    names = path.with_name("names.txt")
    names.write_text("[background]\ndog\n")
    assert command._read_names(names) == ["[background]", "dog"]
    with pytest.raises(BadDataError):
        command._read_names(names.rename(path.with_name("names.json")))


def test_a_file_is_not_converted_onto_itself(path):
    save_network(path, network())
    before = path.read_bytes()
    with pytest.raises(UsageError, match="would overwrite an input"):
        convert(path, path, "--no-head")
    assert path.read_bytes() == before


def test_names_that_are_a_tensor_and_a_group_are_refused(path):
    save_network(path, network())
    with safetensors.safe_open(path, "numpy") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["params/head"] = np.zeros(1, np.float32)
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(BadDataError):
        load_network(path)
