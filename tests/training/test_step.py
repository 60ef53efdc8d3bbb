import json
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT
from xception_jax import ops
from xception_jax.config import ModelConfig, default_config, from_json, override, resolve, to_json
from xception_jax.data.sources import SourceInfo
from xception_jax.errors import ConfigError
from xception_jax.models.layers import Conv, Head, norm_of
from xception_jax.models.modules import SeparableConv
from xception_jax.training.fingerprint import state_fingerprint
from xception_jax.training.losses import class_weights
from xception_jax.training.optimizers import make_optimizer, make_schedule
from xception_jax.training.state import DROPOUT, make_state_init, seed_bits
from xception_jax.training.step import make_train_step

# Most of the time here goes into compiling.


TINY = {
    "model.num_classes": 5,
    "model.dropout_rate": 0.0,
    "data.image_size": 16,
    "batch_size": 8,
    "schedule.name": "constant",
    "schedule.learning_rate": 0.1,
    "ema.decay": 0.9,
}


def tiny_config(**fields):
    return override(resolve(default_config()), TINY | fields)


class Short(nn.Module):
    """One of each layer of Xception: a step takes any network, and this one is compiled in a second.

    It has the classes, normalisation and arithmetic of its config; with `aux_head` a second classifier, as Inception V3
    has one.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, images, train=False):
        norm, dtype = norm_of(self.config), jnp.dtype(self.config.dtype)
        x = Conv(8, kernel_size=(3, 3), dtype=dtype, name="conv")(images)
        residual = x = nn.relu(norm(name="conv_bn")(x, train))
        x = SeparableConv(8, dtype=dtype, name="sepconv")(x)
        x = ops.max_pool(norm(name="sepconv_bn")(x, train) + residual, padding="SAME")
        logits, _ = Head(self.config, name="head")(x, train)
        if not getattr(self.config, "aux_head", False):
            return logits, {}
        return logits, {"aux_logits": Head(self.config.replace(dropout_rate=0.0), name="aux")(residual, train)[0]}


def make(config, state=None):
    """Returns the first state (or the given one) and the jitted step of a config; equal configs are compiled once."""
    init, jitted = _make(to_json(config))
    bits = seed_bits(config.seed, DROPOUT)
    return (init(seed_bits(config.seed)) if state is None else state), lambda state, batch: jitted(state, batch, bits)


@cache
def _make(saved_config):
    config = from_json(saved_config)
    model = Short(config.model)
    schedule = make_schedule(config, num_examples=100)
    optimizer = make_optimizer(config.optimizer, schedule)
    init = make_state_init(model, optimizer, image_size=config.data.image_size, ema=config.ema.decay > 0)
    step = make_train_step(model, optimizer, schedule, config)
    return jax.jit(init), jax.jit(step)


def make_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    size = config.data.image_size
    return {
        "image": jnp.asarray(rng.normal(size=(config.batch_size, size, size, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, config.model.num_classes, config.batch_size), jnp.int32),
    }


def without_counters(state):
    zero = jnp.int32(0)
    return state.replace(step=zero, bad_steps=zero, skipped_steps=zero)


@pytest.mark.smoke
def test_a_step_lowers_the_loss_and_moves_everything():
    config = tiny_config()
    state, step = make(config)
    batch = make_batch(config)
    before, losses = state, []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert int(state.step) == 8
    still = [
        jax.tree_util.keystr(path)
        for path, (old, new) in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: (a, b), (before.params, before.batch_stats), (state.params, state.batch_stats)),
            is_leaf=lambda leaf: isinstance(leaf, tuple) and not isinstance(leaf[0], dict),
        )
        if bool(jnp.all(old == new))
    ]
    assert still == []


@pytest.mark.smoke
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_bad_batch_leaves_every_bit_and_the_next_one_counts(poison):
    config = tiny_config()
    state, step = make(config)
    state, _ = step(state, make_batch(config))
    bad = make_batch(config)
    bad["image"] = bad["image"].at[0, 0, 0, 0].set(poison)

    after, metrics = step(state, bad)
    assert state_fingerprint(without_counters(after)) == state_fingerprint(without_counters(state))
    assert int(metrics["bad_steps"]) == int(metrics["skipped_steps"]) == 1
    assert int(after.step) == 2
    after, metrics = step(after, bad)
    assert int(metrics["bad_steps"]) == 2

    after, metrics = step(after, make_batch(config))
    assert (int(metrics["bad_steps"]), int(metrics["skipped_steps"])) == (0, 2)
    assert state_fingerprint(without_counters(after)) != state_fingerprint(without_counters(state))


@pytest.mark.smoke
def test_accumulated_gradients_are_those_of_the_whole_batch():
    microbatches = 2
    whole = tiny_config(**{"model.batch_norm.statistics": 8 // microbatches, "ema.decay": 0.0})
    state, step = make(whole)
    batch = make_batch(whole)
    # A microbatch takes every n-th image; as groups of consecutive images they see the same statistics.
    grouped = {name: jnp.concatenate([x[i::microbatches] for i in range(microbatches)]) for name, x in batch.items()}
    expected, expected_metrics = step(state, grouped)

    accumulated = tiny_config(accumulation_steps=microbatches, **{"ema.decay": 0.0})
    got, metrics = make(accumulated)[1](state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(expected_metrics["loss"]), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(expected_metrics["grad_norm"]), rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got.params, expected.params)


def test_microbatches_move_the_statistics_one_after_the_other():
    fields = {"ema.decay": 0.0, "model.dropout_rate": 0.0}
    config = tiny_config(accumulation_steps=2, **fields)
    state, step = make(config)
    batch = make_batch(config)
    found, _ = step(state, batch)
    # Two steps that leave the weights as they are.
    _, half_step = make(tiny_config(batch_size=4, **fields, **{"schedule.learning_rate": 1e-30}))
    expected = state
    for number in range(2):
        expected, _ = half_step(expected, {name: x[number::2] for name, x in batch.items()})
    same = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, found.batch_stats, expected.batch_stats)


def test_each_microbatch_drops_other_features():
    fields = {"model.dropout_rate": 0.5, "ema.decay": 0.0}
    state, step = make(tiny_config(accumulation_steps=2, **fields))
    batch = {name: x[:4] for name, x in make_batch(tiny_config()).items()}
    _, half_step = make(tiny_config(batch_size=4, **fields))
    loss = float(half_step(state, batch)[1]["loss"])
    twice = {name: jnp.repeat(x, 2, axis=0) for name, x in batch.items()}  # both microbatches are the same images
    assert float(step(state, twice)[1]["loss"]) != pytest.approx(loss, rel=1e-6)


@pytest.mark.smoke
@pytest.mark.parametrize("first", [0, 500])  # from 80 on, the decay is that of the config
def test_polyak_average_of_weights_and_statistics(first):
    config = tiny_config()
    state, step = make(config)
    state = state.replace(step=jnp.int32(first))
    average = {"params": state.params, "batch_stats": state.batch_stats}
    for number in range(first, first + 4):
        decay = min(0.9, (1 + number) / (10 + number))
        state, _ = step(state, make_batch(config, number))
        now = {"params": state.params, "batch_stats": state.batch_stats}
        average = jax.tree.map(lambda a, n, decay=decay: decay * a + (1 - decay) * n, average, now)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.ema, average)
    assert make(tiny_config(**{"ema.decay": 0.0}))[0].ema is None


@pytest.mark.smoke
def test_dropout_follows_from_seed_and_step():
    config = tiny_config(**{"model.dropout_rate": 0.5})
    state, step = make(config)
    batch = make_batch(config)
    loss = float(step(state, batch)[1]["loss"])
    assert float(step(state, batch)[1]["loss"]) == loss
    assert float(step(state.replace(step=jnp.int32(1)), batch)[1]["loss"]) != loss


def test_each_seed_has_a_dropout_key_of_its_own_and_all_share_one_program():
    config = tiny_config(**{"model.dropout_rate": 0.5})
    init, jitted = _make(to_json(config))
    state, batch = init(seed_bits(0)), make_batch(config)
    keys = [seed_bits(seed, DROPOUT) for seed in range(4)]
    losses = {float(jitted(state, batch, key)[1]["loss"]) for key in keys}
    assert len(losses) == 4
    assert jitted._cache_size() == 1
    # Not the key that another seed initialises with.
    assert not {tuple(key) for key in keys} & {tuple(seed_bits(seed)) for seed in range(8)}


def test_the_logged_learning_rate_is_the_applied_one_also_after_skipped_steps():
    fields = {"schedule.name": "constant", "schedule.warmup": "10 steps", "optimizer.momentum": 0.0}
    config = tiny_config(**fields, **{"optimizer.weight_decay": 0.0, "schedule.learning_rate": 1.0})
    state, step = make(config)
    bad = make_batch(config)
    bad["image"] = bad["image"].at[0, 0, 0, 0].set(np.nan)
    logged = []
    for batch in [make_batch(config), bad, bad, bad, make_batch(config, 1), make_batch(config, 2)]:
        before = state
        state, metrics = step(state, batch)
        logged.append(float(metrics["learning_rate"]))
    assert logged == pytest.approx([0.0, 0.1, 0.1, 0.1, 0.1, 0.2])
    # Without momentum the length of the update over that of the gradient is the rate that was applied.
    moved = jax.tree.map(jnp.subtract, state.params, before.params)
    length = float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(moved))))
    assert length / float(metrics["grad_norm"]) == pytest.approx(logged[-1], rel=1e-4)
    assert (int(state.step), int(state.updates)) == (6, 3)


def test_bfloat16_keeps_the_state_in_float32():
    config = tiny_config(**{"model.dtype": "bfloat16"})
    state, metrics = jax.eval_shape(make(config)[1], make(config)[0], make_batch(config))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state, state.ema))}
    assert dtypes <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert metrics["loss"].dtype == jnp.float32


def test_auxiliary_loss_is_minimized_and_not_logged():
    """The gradient is linear in its weight; `loss` is that of the classifier, which evaluation measures."""
    fields = {"model.name": "inception_v3", "model.aux_head": True, "data.image_size": 107}
    losses, moved = {}, {}
    for weight in (0.0, 0.4, 1.0):
        config = tiny_config(**fields, **{"loss.aux_weight": weight, "optimizer.name": "sgd"})
        state, step = make(config)
        new, metrics = step(state, make_batch(config))
        losses[weight] = float(metrics["loss"])
        before, after = (each.params["aux"]["predictions"]["bias"] for each in (state, new))
        moved[weight] = np.asarray(after) - np.asarray(before)
    assert losses[0.0] == losses[0.4] == losses[1.0]
    np.testing.assert_array_equal(moved[0.0], 0)
    np.testing.assert_allclose(moved[0.4], 0.4 * moved[1.0], rtol=1e-4)
    assert np.abs(moved[1.0]).max() > 0


def test_the_mesh_changes_neither_losses_nor_what_is_learned(run_python):
    fields = json.dumps({"mesh.fsdp": 4})
    process = run_python(ROOT / "tests/training/mesh_program.py", 1, "{}", 8, fields, devices=8)
    assert process.returncode == 0, process.stderr
    one, sharded = map(json.loads, process.stdout.splitlines())
    np.testing.assert_allclose(sharded["losses"], one["losses"], rtol=1e-9)
    # Parameters, optimiser state and averages are really divided wherever an axis can be.
    assert sharded["whole"] == []
    assert sharded["divided"] > 20
    assert sharded["bytes"] < one["bytes"]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_class_weights_weigh_the_gradient_and_not_the_logged_loss(accumulation_steps):
    """A weight of 2 for a class is the gradient of its images twice; equal weights are none."""
    config = tiny_config(accumulation_steps=accumulation_steps)
    state, plain = make(config)
    batch = make_batch(config)
    weights = np.ones(config.model.num_classes, np.float32)
    weights[int(batch["label"][0])] = 2.0

    def stepped(class_weights):
        schedule = make_schedule(config, num_examples=100)
        optimizer = make_optimizer(config.optimizer, schedule)
        step = make_train_step(Short(config.model), optimizer, schedule, config, class_weights)
        return jax.jit(step)(state, batch, seed_bits(config.seed, DROPOUT))

    (_, without), (_, ones), (_, weighted) = plain(state, batch), stepped(weights**0), stepped(weights)
    for metrics in (weighted, ones):
        assert float(metrics["loss"]) == pytest.approx(float(without["loss"]), rel=1e-6)
    assert "weighted_loss" not in without
    assert float(ones["weighted_loss"]) == pytest.approx(float(without["loss"]), rel=1e-6)
    assert float(ones["grad_norm"]) == pytest.approx(float(without["grad_norm"]), rel=1e-5)
    assert float(weighted["weighted_loss"]) > float(weighted["loss"])
    assert float(weighted["grad_norm"]) != pytest.approx(float(without["grad_norm"]), rel=1e-3)


def test_balanced_class_weights_make_classes_count_equally():
    class Labels:
        info = SourceInfo("labels", "train", 4, tuple("abcd"), False, "", 8)

        def column(self, name):
            return {"label": [0, 0, 0, 0, 0, 1, 1, 3]}[name]

        def __len__(self):
            return 8

    config = tiny_config(**{"loss.class_weights": "balanced"})
    weights = class_weights(config, Labels())
    np.testing.assert_allclose([5 * weights[0], 2 * weights[1], weights[3]], 8 / 3)
    assert class_weights(tiny_config(), Labels()) is None
    with pytest.raises(ConfigError, match="twice"):
        override(config, {"data.sampling": "balanced"})
