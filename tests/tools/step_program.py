"""Compiles training steps of a small Xception for eight devices, and prints what they communicate as JSON.

The arguments are JSON objects of config fields, one for each step.
"""

import dataclasses
import json
import sys

import jax

from xception_jax.config import default_config, override, resolve
from xception_jax.data.synthetic import SyntheticSource
from xception_jax.parallel import make_mesh
from xception_jax.tools.planning.hlo import collectives
from xception_jax.training.experiment import build_experiment
from xception_jax.training.state import DROPOUT, seed_bits

SMALL = {
    "model.width_multiplier": 0.25,
    "model.middle_blocks": 0,
    "model.stem": "small",
    "model.residual": False,
    "data.image_size": 16,
    "batch_size": 16,
    "ema.decay": 0.0,
}

assert jax.device_count() == 8
for fields in map(json.loads, sys.argv[1:]):
    config = override(resolve(default_config()), SMALL | fields)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        experiment = build_experiment(config, {"train": SyntheticSource(1000, "train")}, mesh)
        step = experiment.compile_step()
    hlo = step.as_text()
    found = collectives(hlo, mesh.size)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(experiment.abstract))
    batch_bytes = config.batch_size // mesh.size * (4 * 3 * config.data.image_size**2 + 4)
    key_bytes = seed_bits(0, DROPOUT).nbytes
    print(
        json.dumps(
            {
                "collectives": [dataclasses.asdict(one) | {"count": count} for one, count in found.items()],
                "state_bytes": state_bytes,
                "state_bytes_a_device": step.memory_analysis().argument_size_in_bytes - batch_bytes - key_bytes,
                "largest_parameter_bytes": max(4 * leaf.size for leaf in jax.tree.leaves(experiment.abstract.params)),
                "parameter_bytes": 4 * experiment.cost.parameters,
            }
        )
    )
