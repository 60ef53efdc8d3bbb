"""Trains with each optimizer on a state in two shares, saves, restores and goes on; prints what became of it as JSON.

The argument is a directory for the checkpoints.
"""

import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from tests.training.test_step import make_batch, tiny_config
from xception_jax.config import ModelConfig
from xception_jax.models.layers import Head, norm_of
from xception_jax.parallel import batch_sharding, make_mesh, to_devices
from xception_jax.training.checkpoint import Checkpoints
from xception_jax.training.fingerprint import state_fingerprint
from xception_jax.training.optimizers import OPTIMIZERS, make_optimizer, make_schedule
from xception_jax.training.state import DROPOUT, abstract_state, make_state_init, seed_bits
from xception_jax.training.step import make_train_step

FIELDS = {"model.num_classes": 5, "model.fc_layers": 1, "model.fc_width": 8, "data.image_size": 8, "mesh.fsdp": 2}


class Tiny(nn.Module):
    """A normalisation and a classifier with a hidden layer, compiled in no time."""

    config: ModelConfig

    @nn.compact
    def __call__(self, images, train=False):
        x = norm_of(self.config)(name="norm")(images, train)
        return Head(self.config, name="head")(x, train)[0], {}


def shards(opt_state) -> dict:
    """Counts the leaves that are in shares, and lists those that could be and are not."""
    leaves = [leaf for leaf in jax.tree.leaves(opt_state) if any(size % 2 == 0 for size in leaf.shape)]
    in_two = [leaf.addressable_shards[0].data.size * 2 == leaf.size for leaf in leaves]
    return {"sharded": sum(in_two), "whole": [leaf.shape for leaf, two in zip(leaves, in_two, strict=True) if not two]}


assert jax.device_count() == 2
results = {}
for name in OPTIMIZERS:
    config = tiny_config(**FIELDS, **{"optimizer.name": name, "optimizer.weight_decay": 0.01})
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        schedule = make_schedule(config, 100)
        model, optimizer = Tiny(config.model), make_optimizer(config.optimizer, schedule)
        init = make_state_init(model, optimizer, image_size=4, ema=True)
        abstract = abstract_state(init, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        step = jax.jit(make_train_step(model, optimizer, schedule, config), out_shardings=(shardings, None))

        def train(state, numbers, config=config, step=step, mesh=mesh):
            for number in numbers:
                batch = {name: np.asarray(part) for name, part in make_batch(config, number).items()}
                state, _ = step(state, to_devices(batch, batch_sharding(mesh)), seed_bits(0, DROPOUT))
            return state

        saved = train(jax.jit(init, out_shardings=shardings)(seed_bits(0)), range(2))
        with Checkpoints(Path(sys.argv[1]) / name, report=lambda line: None) as checkpoints:
            checkpoints.save(2, saved)
            restored = checkpoints.restore(2, abstract)
        results[name] = {
            "trained": shards(saved.opt_state),
            "restored": shards(restored.opt_state),
            "saved": state_fingerprint(saved),
            "uninterrupted": state_fingerprint(train(saved, range(2, 4))),
            "resumed": state_fingerprint(train(restored, range(2, 4))),
        }
print(json.dumps(results))
