"""The state of a run: what a checkpoint holds and a step changes."""

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
    """Everything that a step reads and writes; the data order follows from `step` alone.

    Attributes:
      step: steps taken, int32; also the position in the data.
      params: trainable parameters.
      batch_stats: running averages of BatchNorm.
      opt_state: of the optimiser.
      ema: Polyak averages {'params', 'batch_stats'}, or None without them.
      bad_steps: non-finite steps in a row, int32.
      skipped_steps: steps without an update, int32: non-finite ones, and those that a recovery has passed over.
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
        """Updates of the parameters so far, the position in the schedule: skipped steps do not count."""
        return self.step - self.skipped_steps

    def all_variables(self) -> dict[str, dict]:
        """Returns what `model.apply` takes, by the prefix of its metrics: of this step, and Polyak-averaged."""
        averaged = {} if self.ema is None else {"ema_": self.ema}
        return {"": {"params": self.params, "batch_stats": self.batch_stats}} | averaged


# What keys are for, folded into the key of the seed. Initialisation uses that key itself.
DROPOUT = 1

StateInit = Callable[[np.ndarray | jax.Array], TrainState]


def make_state_init(
    model: nn.Module, optimizer: optax.GradientTransformation, *, image_size: int, ema: bool
) -> StateInit:
    """Returns a function that makes the first state, to be jitted with `abstract_state`'s shardings.

    It takes `seed_bits(seed)`, so that one program serves all seeds.
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
    """Returns the key of a seed, or that of one purpose, as numbers on the host: the same for every process."""
    key = jax.random.key(seed)
    return np.asarray(jax.random.key_data(key if purpose is None else jax.random.fold_in(key, purpose)))


def abstract_state(init: StateInit, mesh: Mesh) -> TrainState:
    """Returns shapes, dtypes and shardings of the state that `init` makes; nothing is computed."""
    shapes = jax.eval_shape(lambda: init(jax.random.key_data(jax.random.key(0))))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_sharding(mesh, shapes),
    )
