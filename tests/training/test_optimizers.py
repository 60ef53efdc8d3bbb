import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xception_jax.config import default_config, override, resolve
from xception_jax.training.losses import sigmoid_loss, softmax_loss
from xception_jax.training.optimizers import make_optimizer, make_schedule

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


def trajectory(config, steps=5):
    """Returns the parameters after each step under `gradients`."""
    optimizer = make_optimizer(config.optimizer, make_schedule(config, num_examples=config.batch_size * 2))
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, history = optimizer.init(params), []
    for step in range(steps):
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradients(step)), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        history.append(params)
    return history


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


def test_clipping_comes_before_decay():
    fields = {"optimizer.clip_norm": 1e-3, "optimizer.weight_decay": 0.0, "optimizer.momentum": 0.0}
    config = config_with(**AT_ONE, **fields)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, trajectory(config, 1)[0], PARAMS)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(moved)))
    assert norm == pytest.approx(1e-3, rel=1e-3)


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
    assert float(softmax_loss(jnp.asarray(logits), jnp.asarray(labels), 0.1)) == pytest.approx(expected, rel=1e-5)

    several = (rng.random((4, 5)) < 0.4).astype(np.float32)
    targets = several * 0.8 + 0.1
    probabilities = 1 / (1 + np.exp(-logits))
    expected = -(targets * np.log(probabilities) + (1 - targets) * np.log(1 - probabilities)).sum(-1).mean()
    assert float(sigmoid_loss(jnp.asarray(logits), jnp.asarray(several), 0.2)) == pytest.approx(expected, rel=1e-5)
