"""Fine-tuning: what stays, what moves and how far, and where a run starts."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.models.random_weights import random_variables
from xception_jax.config import default_config, from_json, override, resolve, to_json
from xception_jax.data.prepare.fashion_mnist import fashion_mnist_subset
from xception_jax.errors import BadDataError, ConfigError, InputMissingError
from xception_jax.models import create_model
from xception_jax.training.finetuning import check_patterns
from xception_jax.training.initial_weights import _for_our_images, complete_config
from xception_jax.training.optimizers import make_optimizer, make_schedule
from xception_jax.training.state import DROPOUT, make_state_init, seed_bits
from xception_jax.training.step import make_train_step
from xception_jax.training.workdir import open_workdir
from xception_jax.weights import Network, Preprocessing, load_network, save_network

FROZEN = "^block[1-4]_"


TINY = {
    "model.num_classes": 5,
    "model.width_multiplier": 0.05,
    "model.middle_blocks": 0,
    "model.stem": "small",
    "model.dropout_rate": 0.0,
    "data.image_size": 16,
    "batch_size": 8,
    "optimizer.weight_decay": 0.01,
    "schedule.name": "constant",
    "schedule.learning_rate": 0.1,
}


def tiny_config(**fields):
    return override(resolve(default_config()), TINY | fields)


@functools.cache
def after_steps(saved_config: str, steps: int = 2):
    """Returns the states before and after some steps, and a function of images to logits in training."""
    config = from_json(saved_config)
    model = create_model(config.model)
    schedule = make_schedule(config, num_examples=100)
    optimizer = make_optimizer(config.optimizer, schedule)
    init = make_state_init(model, optimizer, image_size=16, ema=config.ema.decay > 0)
    first = jax.jit(init)(seed_bits(0))
    # As trained weights have them: statistics that are not those of the batch.
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + rng.uniform(0, 0.1, leaf.shape).astype(np.float32), first.batch_stats)
    first = first.replace(batch_stats=moved)
    first = first.replace(ema={"params": first.params, "batch_stats": first.batch_stats})
    step = jax.jit(make_train_step(model, optimizer, schedule, config))
    state = first
    for number in range(steps):
        rng = np.random.default_rng(number)
        batch = {
            "image": jnp.asarray(rng.normal(size=(8, 16, 16, 3)), jnp.float32),
            "label": jnp.asarray(rng.integers(0, 5, 8), jnp.int32),
        }
        state, metrics = step(state, batch, seed_bits(0, DROPOUT))
    return first, state, metrics


def leaves(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}


PART_OF_A_NORM = "^block1_|kernel$|block2_.*scale$"


@pytest.mark.parametrize(
    ("fields", "rest"),
    [
        ({"optimizer.frozen": FROZEN, "optimizer.clip_norm": 0.5}, FROZEN),
        # A norm of which a part is trained has its statistics move.
        (
            {
                "optimizer.frozen": PART_OF_A_NORM,
                "optimizer.name": "rmsprop",
                "optimizer.multipliers": (("^head/", 10.0),),
                "accumulation_steps": 2,
            },
            "^block1_",
        ),
    ],
    ids=["sgd", "rmsprop"],
)
def test_what_is_frozen_keeps_every_bit_and_the_rest_moves(fields, rest):
    first, last, _ = after_steps(to_json(tiny_config(**fields)))
    frozen = fields["optimizer.frozen"]
    pairs = {
        "params": (first.params, last.params, frozen),
        "batch_stats": (first.batch_stats, last.batch_stats, rest),
        "ema params": (first.ema["params"], last.ema["params"], frozen),
        "ema statistics": (first.ema["batch_stats"], last.ema["batch_stats"], rest),
    }
    for kind, (before, after, still) in pairs.items():
        before, after = leaves(before), leaves(after)
        assert before.keys() == after.keys()
        for name in before:
            assert np.array_equal(before[name], after[name]) == bool(re.search(still, name)), (kind, name)
    # The optimiser has no state for them.
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(last.opt_state)
    ]
    assert len(names) > 10
    parameter = re.compile(r"(block\d_|head/).*")
    assert not [name for name in names if (match := parameter.search(name)) and re.search(frozen, match[0])]


def test_frozen_layers_run_as_in_inference():
    """With every BatchNorm frozen, the loss of a step is that of the network in inference."""
    config = tiny_config(**{"optimizer.frozen": "^(?!head/)", "loss.label_smoothing": 0.0})
    first, _, metrics = after_steps(to_json(config), steps=1)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(8, 16, 16, 3)), jnp.float32)
    labels = rng.integers(0, 5, 8)
    variables = {"params": first.params, "batch_stats": first.batch_stats}
    logits, _ = jax.jit(create_model(config.model).apply)(variables, images)
    expected = -jax.nn.log_softmax(logits)[np.arange(8), labels].mean()
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_a_multiplier_is_a_factor_of_the_learning_rate(optimizer):
    """Of the first pattern that is found; exactly, for a power of two."""
    base = {"optimizer.name": optimizer, "optimizer.weight_decay": 0.0}
    more = {"optimizer.multipliers": (("head/.*kernel$", 4.0), ("^head/", 0.5), ("head|_bn/", 2.0))}
    params = {"head": {"kernel": np.ones(3), "bias": np.ones(3)}, "a_bn": {"scale": np.ones(3)}, "a": np.ones(3)}
    factors = {"head/kernel": 4.0, "head/bias": 0.5, "a_bn/scale": 2.0, "a": 1.0}

    def updates(fields):
        config = tiny_config(**fields)
        transformation = make_optimizer(config.optimizer, make_schedule(config, 100))
        state = transformation.init(jax.tree.map(jnp.asarray, params))
        for step in range(3):
            grads = jax.tree.map(lambda leaf, step=step: jnp.sin(jnp.asarray(leaf) + step), params)
            update, state = transformation.update(grads, state, params)
        return leaves(update)

    plain, multiplied = updates(base), updates(base | more)
    for name, factor in factors.items():
        np.testing.assert_array_equal(multiplied[name], np.float32(factor) * plain[name])
        assert np.all(plain[name] != 0)


def test_without_patterns_the_state_is_what_it_was():
    """Checkpoints of earlier runs fit."""
    config = tiny_config()
    params = {"conv": {"kernel": jnp.ones(3)}}
    state = make_optimizer(config.optimizer, make_schedule(config, 100)).init(params)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert names == ["[1][0].trace['conv']['kernel']", "[1][1].count"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer.frozen": "blok"}, "'blok' matches none of the"),
        ({"optimizer.frozen": "."}, "nothing is left to train"),
        ({"optimizer.multipliers": (("haed", 10.0),)}, "'haed' matches none of the parameters"),
        ({"optimizer.multipliers": (("head", 10.0), ("^head/", 2.0))}, r"'\^head/' matches none .* earlier pattern"),
        ({"optimizer.decayed": "kernels$"}, r"'kernels\$' matches no parameter that is trained"),
        ({"optimizer.frozen": "^head", "optimizer.decayed": "^head/"}, "nothing would decay"),
        ({"optimizer.frozen": "^head", "optimizer.multipliers": (("head", 10.0),)}, "'head' matches none .* trained"),
    ],
)
def test_a_pattern_without_effect_is_refused(fields, words):
    config = tiny_config(**fields)
    params = jax.eval_shape(create_model(config.model).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    with pytest.raises(ConfigError, match=words) as error:
        check_patterns(config.optimizer, params)
    assert error.value.where in {f"config.{name}" for name in fields}


def test_only_biases_are_trained_with_the_default_decay():
    config = tiny_config(**{"optimizer.frozen": "kernel$", "optimizer.weight_decay": 1e-4})
    params = jax.eval_shape(create_model(config.model).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    check_patterns(config.optimizer, params)


@pytest.mark.parametrize("value", ["head=2", [("(", 1.0)], [("head", 0)], [("head", "x")], [("head",)], [(1, 2.0)]])
def test_multipliers_that_are_none(value):
    with pytest.raises(ConfigError, match="multipliers"):
        resolve({"optimizer": {"multipliers": value}})


@pytest.mark.parametrize("name", ["xception", "inception_v3", "inception_v3_2016"])
def test_weights_for_other_images_are_adapted(name):
    size, fewer = (71, {"middle_blocks": 0}) if name == "xception" else (75, {})
    model = create_model({"name": name, "num_classes": 3, "width_multiplier": 0.05, **fewer})
    variables = jax.tree.map(np.asarray, random_variables(model, jnp.zeros((1, size, size, 3))))
    preprocessing = Preprocessing(size=size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    network = Network(model.config, variables, preprocessing, None, "", "")
    pixels = np.random.default_rng(0).uniform(size=(2, size, size, 3)).astype(np.float32)
    theirs = (pixels - np.float32(preprocessing.mean)) / np.float32(preprocessing.std)
    early = "block1" if name == "xception" else "mixed0"
    apply = jax.jit(lambda variables, images: model.apply(variables, images)[1][early])
    expected = apply(variables, theirs)
    np.testing.assert_allclose(apply(_for_our_images(network), 2 * pixels - 1), expected, atol=2e-5)
    assert np.abs(apply(variables, 2 * pixels - 1) - expected).max() > 1e-2


# --- the whole program -----------------------------------------------------------------------------------------------

SMALL = {"width_multiplier": 0.05, "middle_blocks": 0, "num_classes": 4}
WITH_HIDDEN_LAYER = {"num_classes": 10, "fc_layers": 1, "fc_width": 8}
ARGUMENTS = [
    "train.py",
    "--config=configs/finetune.py:fashion_mnist",
    "--config.evaluation.heat_maps=0",
    "--config.data.train_split=train[:128]",
    "--config.data.eval_split=",
    "--config.data.test_split=test[:50]",
    "--config.batch_size=32",
    "--config.schedule.warmup=0 steps",
    "--config.evaluation.batch_size=52",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the small network, with four other classes."""
    model = create_model({"dropout_rate": 0.3, **SMALL})
    variables = random_variables(model, jnp.zeros((1, 32, 32, 3)))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_network(path, Network(model.config, jax.tree.map(np.asarray, variables), Preprocessing(size=32), None, "", ""))
    return path


@pytest.mark.slow
def test_a_run_starts_from_the_file_and_resumes_from_itself(weights, run_python, tmp_path):
    """On four devices, with the parameters in two shares."""
    moved, workdir, exported = (tmp_path / name for name in ("weights.safetensors", "run", "tuned.safetensors"))
    moved.write_bytes(weights.read_bytes())
    arguments = [*ARGUMENTS, f"--config.init.weights={moved}", f"--workdir={workdir}", "--config.mesh.fsdp=2"]
    arguments += ["--config.duration=3 steps", "--config.checkpoint.every=2 steps"]
    process = run_python(*arguments, devices=4)
    assert process.returncode == 0, process.stderr
    assert load_network(weights).sha256 in process.stderr
    assert "new: params/head/predictions/bias, params/head/predictions/kernel" in process.stderr

    process = run_python("-m", "xception_jax", "export", workdir, exported, "--format=safetensors", "--no_check")
    assert process.returncode == 0, process.stderr
    before, after = load_network(weights), load_network(exported)
    for kind in ("params", "batch_stats"):
        old, new = leaves(before.variables[kind]), leaves(after.variables[kind])
        for name in old:
            if name.startswith("head/predictions"):
                assert new[name].shape[-1] == 10
            elif re.search(FROZEN, name) or name.endswith(("kernel", "mean", "var")):
                assert np.array_equal(old[name], new[name]) == bool(re.search(FROZEN, name)), name

    moved.unlink()  # The start is past: only the checkpoint is read.
    shutil.rmtree(workdir / "checkpoints" / "3")
    process = run_python(*arguments, devices=4)
    assert process.returncode == 0, process.stderr
    assert "resumed at 2" in process.stderr
    assert "starts from" not in process.stderr

    config = from_json((workdir / "config.json").read_text())
    assert config.init.weights == str(moved)
    for name, value in (("init.weights", "another"), ("optimizer.frozen", "^block1_")):
        changed = override(config, {name: value})
        with pytest.raises(ConfigError, match="another experiment") as error, open_workdir(workdir, changed):
            pass
        assert name in str(error.value)


@pytest.fixture(scope="module")
def start(shared_environment):
    """Returns a function: what `first_state` makes of a file, for ten classes behind a fully connected layer."""
    from configs.finetune import get_config
    from xception_jax.training.experiment import make_experiment
    from xception_jax.training.initial_weights import first_state

    fields = {f"model.{name}": value for name, value in (SMALL | WITH_HIDDEN_LAYER).items()}
    fields["data.data_dir"] = shared_environment["TFDS_DATA_DIR"]
    config = override(resolve(get_config("fashion_mnist")), fields)
    experiment = make_experiment(config)  # with one compiled `init` for all

    def start(path, **fields):
        config = override(experiment.config, {"init.weights": str(path), **fields})
        lines = []
        return first_state(dataclasses.replace(experiment, config=config), lines.append), *lines

    return start


def test_the_weights_say_which_network_it_is(weights, tmp_path, shared_environment, monkeypatch):
    from configs.finetune import get_config

    data = {"data.data_dir": shared_environment["TFDS_DATA_DIR"], "init.weights": str(weights)}
    config = override(resolve(get_config("fashion_mnist")), data)
    whole, network = complete_config(config, tmp_path / "none")
    file = load_network(weights)
    # Dropout concerns only training, and the dataset has ten classes.
    assert whole.model == file.model.replace(num_classes=10, dropout_rate=0.0, batch_norm=config.model.batch_norm)
    assert network.sha256 == file.sha256
    again, _ = complete_config(whole, tmp_path / "none")
    assert again == whole
    monkeypatch.setenv("HOME", str(weights.parent))
    assert (
        complete_config(override(config, {"init.weights": f"~/{weights.name}"}), tmp_path / "none")[0].model
        == whole.model
    )
    given = override(config, {"model.num_classes": 3, "model.fc_layers": 1, "model.fc_width": 8})
    assert complete_config(given, tmp_path)[0].model.replace(num_classes=10, fc_layers=0, fc_width=4096) == whole.model
    for fields in (
        {"model.width_multiplier": 0.25},
        {"model.padding": "symmetric"},
        {"model.name": "inception_v3", "data.image_size": 75},
    ):
        with pytest.raises(ConfigError, match="does not match the network in the file"):
            complete_config(override(config, fields), tmp_path)
    nothing = override(config, {"init.weights": ""})
    assert complete_config(nothing, tmp_path) == (nothing, None)


def test_a_note_names_another_image_size_than_that_of_the_weights(weights, tmp_path, shared_environment, capsys):
    from configs.finetune import get_config

    data = {"data.data_dir": shared_environment["TFDS_DATA_DIR"], "init.weights": str(weights)}
    config = override(resolve(get_config("fashion_mnist")), data)
    complete_config(config, tmp_path)
    assert "pixels" not in capsys.readouterr().err
    complete_config(override(config, {"data.image_size": 64}), tmp_path)
    assert "the weights are for images of 32 pixels; using 64" in capsys.readouterr().err


def test_another_initialization_is_not_another_network(start, weights):
    kernels = [
        start(weights, **{"model.initialization": name})[0].params["block1_conv1"]["kernel"]
        for name in ("glorot", "variance_preserving")
    ]
    np.testing.assert_array_equal(*kernels)


def test_files_of_other_networks_are_refused(start, weights, tmp_path):
    with pytest.raises(ConfigError, match="padding differ") as error:
        start(weights, **{"model.padding": "symmetric"})
    assert "--config.model.padding=same" in error.value.fix
    with pytest.raises(ConfigError, match=r"batch_norm.epsilon"):
        start(weights, **{"model.batch_norm.epsilon": 1e-5})
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadDataError):
        start(damaged)
    with pytest.raises(InputMissingError):
        start(tmp_path / "none.safetensors")


def test_which_parts_of_the_head_are_new(start, weights, tmp_path):
    state, line = start(weights)
    for name in ("fc1/kernel", "fc1/bias", "predictions/kernel", "predictions/bias"):
        assert f"params/head/{name}" in line
    network = load_network(weights)
    for average in (state, state.replace(**state.ema)):
        jax.tree.map(np.testing.assert_array_equal, average.batch_stats, network.variables["batch_stats"])
        ours = {name: leaf for name, leaf in average.params.items() if name != "head"}
        jax.tree.map(
            np.testing.assert_array_equal,
            ours,
            {name: leaf for name, leaf in network.variables["params"].items() if name != "head"},
        )
    params = network.variables["params"]
    del params["head"]
    save_network(tmp_path / "headless.safetensors", network)
    assert start(tmp_path / "headless.safetensors")[1].partition("new: ")[2] == line.partition("new: ")[2]

    # A whole head, of as many classes: of the same ones, of unknown ones, of others.
    width = state.params["head"]["fc1"]["kernel"].shape[0]
    ones = {"fc1": (width, 8), "predictions": (8, 10)}
    params["head"] = {
        name: {"kernel": np.ones(shape, np.float32), "bias": np.ones(shape[1], np.float32)}
        for name, shape in ones.items()
    }
    network = dataclasses.replace(network, model=network.model.replace(**WITH_HIDDEN_LAYER))
    own = tuple(fashion_mnist_subset().features["label"].names)
    for classes, kept in ((own, True), (None, True), (own[::-1], False)):
        save_network(tmp_path / "ten.safetensors", dataclasses.replace(network, classes=classes))
        state, line = start(tmp_path / "ten.safetensors")
        assert np.array_equal(state.params["head"]["predictions"]["bias"], np.ones(10)) == kept, classes
        assert np.array_equal(state.params["head"]["fc1"]["bias"], np.ones(8))
        assert ("new:" in line) != kept
