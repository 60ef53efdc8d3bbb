"""Defines the training state, which checkpoints store and training steps update."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from xception_jax.parallel import state_sharding


class TrainState(struct.PyTreeNode):
    """Everything that a training step reads and writes. The position in the data depends only on `step`.

    Attributes:
      step: number of steps so far, int32.
      params: trainable parameters.
      batch_stats: running averages of BatchNorm.
      opt_state: state of the optimizer.
      ema: Polyak averages {'params', 'batch_stats'}, or None if disabled.
      bad_steps: number of consecutive non-finite steps, int32.
      skipped_steps: number of steps without an update, int32: non-finite steps, and steps skipped by a recovery.
    """

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema: dict | None
    bad_steps: jax.Array
    skipped_steps: jax.Array

    @property
    def updates(self) -> jax.Array:
        """Number of parameter updates so far, which is the position in the learning-rate schedule."""
        return self.step - self.skipped_steps

    def all_variables(self) -> dict[str, dict]:
        """Returns the variables for `model.apply` by metric prefix: `''`, and `'ema_'` for the Polyak average."""
        averaged = {} if self.ema is None else {"ema_": self.ema}
        return {"": {"params": self.params, "batch_stats": self.batch_stats}} | averaged

    @property
    def eval_variables(self) -> dict:
        """The variables that are evaluated and exported: the Polyak average if there is one, else the latest ones."""
        return {"params": self.params, "batch_stats": self.batch_stats} if self.ema is None else self.ema


# Folded into the key of the seed. Initialization uses the key of the seed itself.
DROPOUT = 1

StateInit = Callable[[np.ndarray | jax.Array], TrainState]


def make_state_init(
    model: nn.Module, optimizer: optax.GradientTransformation, *, image_size: int, ema: bool
) -> StateInit:
    """Returns a function that creates the initial state, to be jitted with the shardings of `abstract_state`.

    Its argument is `seed_bits(seed)`, so that all seeds share one compiled program.
    """

    def init(bits: np.ndarray | jax.Array) -> TrainState:
        key = jax.random.wrap_key_data(jnp.asarray(bits))
        images = jnp.zeros((1, image_size, image_size, 3))
        variables = model.init({"params": key}, images, train=False)
        params, batch_stats = variables["params"], variables["batch_stats"]
        zero = jnp.zeros((), jnp.int32)
        averages = {"params": params, "batch_stats": batch_stats} if ema else None
        return TrainState(zero, params, batch_stats, optimizer.init(params), averages, zero, zero)

    return init


def seed_bits(seed: int, purpose: int | None = None) -> np.ndarray:
    """Returns the data of the PRNG key of a seed, with `purpose` folded in, as a host array."""
    key = jax.random.key(seed)
    return np.asarray(jax.random.key_data(key if purpose is None else jax.random.fold_in(key, purpose)))


def abstract_state(init: StateInit, mesh: Mesh) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state that `init` creates, without computing it."""
    shapes = jax.eval_shape(lambda: init(jax.random.key_data(jax.random.key(0))))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, shapes),
    )
