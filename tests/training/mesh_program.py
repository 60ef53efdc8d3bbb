"""Takes three steps of a short network on some devices; prints the losses and what one of them holds as JSON.

The arguments are pairs: a number of devices, and a JSON object of config fields. In float64, because a network of so
few channels makes of a rounding error in float32 another loss in the second digit after two steps.
"""

import json
import sys

import jax
import numpy as np

from tests.training.test_step import Short, make_batch, tiny_config
from xception_jax.parallel import batch_sharding, make_mesh, to_devices
from xception_jax.training.optimizers import make_optimizer, make_schedule
from xception_jax.training.state import DROPOUT, abstract_state, make_state_init, seed_bits
from xception_jax.training.step import make_train_step

jax.config.update("jax_enable_x64", True)
for count, fields in zip(map(int, sys.argv[1::2]), map(json.loads, sys.argv[2::2]), strict=True):
    config = tiny_config(batch_size=16, **{"model.dtype": "float64"} | fields)
    mesh = make_mesh(config.mesh, jax.devices()[:count])
    with jax.set_mesh(mesh):
        model = Short(config.model)
        schedule = make_schedule(config, 100)
        optimizer = make_optimizer(config.optimizer, schedule)
        init = make_state_init(model, optimizer, image_size=16, ema=True)
        abstract = abstract_state(init, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(init, out_shardings=shardings)(seed_bits(0))
        step = jax.jit(make_train_step(model, optimizer, schedule, config), out_shardings=(shardings, None))
        losses = []
        for number in range(3):
            batch = {name: np.asarray(part) for name, part in make_batch(config, number).items()}
            state, metrics = step(state, to_devices(batch, batch_sharding(mesh)), seed_bits(0, DROPOUT))
            losses.append(float(metrics["loss"]))
        fsdp = mesh.shape["fsdp"]
        leaves = jax.tree.leaves(state)
        divided = [leaf for leaf in leaves if any(n % fsdp == 0 for n in leaf.shape)]
        whole = [leaf.shape for leaf in divided if leaf.addressable_shards[0].data.size * fsdp != leaf.size]
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
        print(json.dumps({"losses": losses, "bytes": held, "divided": len(divided), "whole": whole}))
