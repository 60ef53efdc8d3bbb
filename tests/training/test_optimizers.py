"""Schedules and optimizers beside their formulas and beside optax's building blocks; losses beside their formulas."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import ROOT
from xception_jax.config import default_config, flatten, override, resolve
from xception_jax.training.losses import sigmoid_loss, softmax_loss
from xception_jax.training.optimizers import OPTIMIZERS, make_optimizer, make_schedule

PARAMS = {
    "conv": {"kernel": np.array([1.0, -2.0, 0.5])},
    "conv_bn": {"scale": np.array([1.0]), "bias": np.array([0.5])},
}
DEFAULTS = resolve(default_config())
HALVED = {  # every two steps of `trajectory`
    "schedule.learning_rate": 0.5,
    "schedule.decay_rate": 0.5,
    "schedule.decay_every": "1 epoch",
}
AT_ONE = {"schedule.name": "constant", "schedule.learning_rate": 1.0}


def config_with(**fields):
    return override(DEFAULTS, fields)


def gradients(step):
    return jax.tree.map(lambda leaf: np.sin(leaf + step), PARAMS)


def trajectory_of(optimizer: optax.GradientTransformation, steps: int) -> list:
    """Returns the parameters after each step under `gradients`."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, history = optimizer.init(params), []
    for step in range(steps):
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradients(step)), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        history.append(params)
    return history


def trajectory(config, steps=5):
    """Returns the parameters after each step of a config's optimizer under `gradients`."""
    schedule = make_schedule(config, num_examples=config.batch_size * 2)
    return trajectory_of(make_optimizer(config.optimizer, schedule), steps)


def test_staircase_of_the_paper():
    schedule = make_schedule(DEFAULTS, num_examples=1920 * 100)
    for step, epochs in ((0, 0), (199, 0), (200, 2), (399, 2), (400, 4), (16_900, 168)):
        assert float(schedule(step)) == pytest.approx(0.045 * 0.94 ** (epochs // 2), rel=1e-5)


def test_decay_by_samples():
    schedule = make_schedule(
        config_with(
            **{
                "batch_size": 2000,
                "schedule.learning_rate": 0.001,
                "schedule.decay_rate": 0.9,
                "schedule.decay_every": "3_000_000 examples",
            }
        ),
        num_examples=10,
    )
    assert float(schedule(1499)) == pytest.approx(0.001)
    assert float(schedule(1500)) == pytest.approx(0.0009)


@pytest.mark.parametrize("field", ["warmup", "decay_every"])
def test_a_schedule_can_be_longer_than_any_run(field):
    config = override(resolve({}), {f"schedule.{field}": "3e9 steps"})
    assert np.isfinite(make_schedule(config, 100)(5))


def test_cosine_with_warmup():
    fields = {"schedule.name": "cosine", "schedule.learning_rate": 2.0, "schedule.warmup": "20 steps"}
    schedule = make_schedule(config_with(duration="100 steps", **fields), num_examples=1)
    assert [float(schedule(step)) for step in (0, 10, 20)] == pytest.approx([0, 1, 2])
    assert float(schedule(60)) == pytest.approx(1.0)
    assert float(schedule(100)) == pytest.approx(0.0, abs=1e-6)


def test_sgd_with_momentum_and_coupled_decay_of_kernels_only():
    config = config_with(**HALVED, **{"optimizer.weight_decay": 0.1})
    params, velocity = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
    for step, ours in enumerate(trajectory(config)):
        grads = gradients(step)
        grads["conv"]["kernel"] = grads["conv"]["kernel"] + 0.1 * params["conv"]["kernel"]
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        rate = 0.5 * 0.5 ** (step // 2)
        params = jax.tree.map(lambda p, v, rate=rate: p - rate * v, params, velocity)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, params)


def test_rmsprop_is_tensorflows():
    """Mean square from one, epsilon inside the root, and the rate inside the momentum."""
    config = config_with(**HALVED, **{"optimizer.name": "rmsprop", "optimizer.weight_decay": 0.0})
    params = PARAMS
    mean_square, momentum = jax.tree.map(np.ones_like, PARAMS), jax.tree.map(np.zeros_like, PARAMS)
    for step, ours in enumerate(trajectory(config)):
        rate = 0.5 * 0.5 ** (step // 2)
        grads = gradients(step)
        mean_square = jax.tree.map(lambda s, g: 0.9 * s + 0.1 * g * g, mean_square, grads)
        momentum = jax.tree.map(
            lambda m, g, s, rate=rate: 0.9 * m + rate * g / np.sqrt(s + 1.0), momentum, grads, mean_square
        )
        params = jax.tree.map(lambda p, m: p - m, params, momentum)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, params)


# Other values than the defaults, for all fields that describe the arithmetic of some optimizer.
OTHER_VALUES = {
    "optimizer.weight_decay": 0.1,
    "optimizer.decayed": "_bn/",
    "optimizer.momentum": 0.8,
    "optimizer.nesterov": True,
    "optimizer.rmsprop_decay": 0.7,
    "optimizer.rmsprop_epsilon": 0.1,
    "optimizer.b1": 0.5,
    "optimizer.b2": 0.3,
    "optimizer.epsilon": 0.01,
}
DECAYED = {"conv": {"kernel": False}, "conv_bn": {"scale": True, "bias": True}}
MANY = 12  # steps, until Lion, which looks at signs, has met small gradients


def fields_of(name: str) -> list[str]:
    config = override(DEFAULTS, {"optimizer.name": name})
    return [field for field in flatten(config) if field.startswith("optimizer.") and field != "optimizer.name"]


def by_hand(name: str, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer with `OTHER_VALUES`, put together from optax's building blocks."""
    decay, descend = optax.add_decayed_weights(0.1, DECAYED), optax.scale_by_learning_rate(rate)
    momentum, adam = optax.trace(0.8, nesterov=True), optax.scale_by_adam(0.5, 0.3, 0.01)
    rms = optax.scale_by_rms(0.7, 0.1, initial_scale=1.0, eps_in_sqrt=True)
    return optax.chain(
        *{
            "sgd": (decay, momentum, descend),
            "rmsprop": (decay, rms, descend, momentum),
            "adam": (decay, adam, descend),
            "adamw": (adam, decay, descend),
            "lamb": (adam, decay, optax.scale_by_trust_ratio(), descend),
            "lion": (optax.scale_by_lion(0.5, 0.3), decay, descend),
        }[name]
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_its_building_blocks(name):
    """Bit by bit, with a rate that changes, and with a decay that spares some parameters."""
    fields = {field: value for field, value in OTHER_VALUES.items() if field in fields_of(name)}
    config = config_with(**HALVED, **fields, **{"optimizer.name": name})
    schedule = make_schedule(config, num_examples=config.batch_size * 2)
    for ours, theirs in zip(trajectory(config, MANY), trajectory_of(by_hand(name, schedule), MANY), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_field_of_an_optimizer_has_an_effect(name):
    others = OTHER_VALUES | {"optimizer.multipliers": (("bias$", 0.5),)}
    base = {"optimizer.name": name, "optimizer.weight_decay": 0.2, **AT_ONE}
    plain = trajectory(config_with(**base), MANY)[-1]
    # Clipping is tested below, and is a factor that Lion does not see; freezing is tested in test_finetuning.py.
    for field in set(fields_of(name)) - {"optimizer.clip_norm", "optimizer.frozen"}:
        moved = trajectory(config_with(**base | {field: others[field]}), MANY)[-1]
        same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(plain), strict=True)]
        assert not all(same), field


KERNEL = PARAMS["conv"]["kernel"]
L2 = 0.1 * KERNEL  # the gradient of weight decay
# A step without any gradient, at a weight decay of 0.1 and a learning rate of 0.5, from the formulas.
DECAY_ALONE = {
    # Coupled: the optimizer takes the decay for a gradient. Adam's first step always has the length of the rate.
    "sgd": -0.5 * L2,
    "rmsprop": -0.5 * L2 / np.sqrt(0.9 + 0.1 * L2**2 + 1.0),
    "adam": -0.5 * np.sign(KERNEL),
    # Decoupled: a share of the parameter, in proportion to the rate.
    "adamw": -0.5 * L2,
    "lion": -0.5 * L2,
    # LAMB scales the update to the norm of the parameter, here ten times as much.
    "lamb": -0.5 * KERNEL,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_coupled_or_decoupled(name):
    fields = {"optimizer.name": name, "optimizer.weight_decay": 0.1, **AT_ONE, "schedule.learning_rate": 0.5}
    config = config_with(**fields)
    optimizer = make_optimizer(config.optimizer, make_schedule(config, num_examples=1))
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["conv"]["kernel"], DECAY_ALONE[name], rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["conv_bn"]))


@pytest.fixture(scope="module")
def sharded(run_python, tmp_path_factory):
    """What `optimizer_program.py` says of each optimizer."""
    process = run_python(
        ROOT / "tests/training/optimizer_program.py", tmp_path_factory.mktemp("checkpoints"), devices=2
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_sharded_and_resumed_bit_by_bit(sharded, name):
    found = sharded[name]
    for state in ("trained", "restored"):
        # As many kernels and biases as are divisible, in each moment.
        assert found[state]["sharded"] == {"sgd": 3, "rmsprop": 6, "adam": 6, "adamw": 6, "lamb": 6, "lion": 3}[name]
        assert found[state]["whole"] == []
    assert found["resumed"] == found["uninterrupted"] != found["saved"]


def test_clipping_comes_before_decay():
    fields = {"optimizer.clip_norm": 1e-3, "optimizer.weight_decay": 0.1, "optimizer.momentum": 0.0}
    config = config_with(**AT_ONE | fields | {"schedule.learning_rate": 0.5})
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, trajectory(config, 1)[0], PARAMS)
    gradient = jax.tree.map(np.sin, PARAMS)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    for layer, leaf, decay in (("conv", "kernel", 0.1), ("conv_bn", "bias", 0.0)):
        expected = -0.5 * (1e-3 / norm * gradient[layer][leaf] + decay * PARAMS[layer][leaf])
        np.testing.assert_allclose(moved[layer][leaf], expected, rtol=1e-3, atol=1e-7)


def test_which_kernels_decay_is_an_option():
    fields = {"optimizer.weight_decay": 1.0, "optimizer.momentum": 0.0, "optimizer.decayed": "_bn/scale$"}
    params = trajectory(config_with(**AT_ONE, **fields), 1)[0]
    np.testing.assert_allclose(
        params["conv"]["kernel"], PARAMS["conv"]["kernel"] - np.sin(PARAMS["conv"]["kernel"]), 1e-6
    )
    np.testing.assert_allclose(params["conv_bn"]["scale"], 1.0 - np.sin(1.0) - 1.0, 1e-5)


def test_losses_against_their_formulas():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4, 5)).astype(np.float32), np.array([0, 4, 2, 2])
    targets = np.eye(5)[labels] * 0.9 + 0.1 / 5
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(targets * log_probabilities).sum(-1).mean()
    assert float(softmax_loss(jnp.asarray(logits), jnp.asarray(labels), 0.1).mean()) == pytest.approx(
        expected, rel=1e-5
    )

    one, labels = jnp.asarray(logits[:, :1]), np.array([0, 1, 1, 0])  # the sigmoid loss of class 1
    np.testing.assert_allclose(
        softmax_loss(one, jnp.asarray(labels), 0.1), sigmoid_loss(one, labels[:, None], 0.1), rtol=1e-6
    )

    several = (rng.random((4, 5)) < 0.4).astype(np.float32)
    targets = several * 0.8 + 0.1
    probabilities = 1 / (1 + np.exp(-logits))
    expected = -(targets * np.log(probabilities) + (1 - targets) * np.log(1 - probabilities)).sum(-1).mean()
    assert float(sigmoid_loss(jnp.asarray(logits), jnp.asarray(several), 0.2).mean()) == pytest.approx(
        expected, rel=1e-5
    )
