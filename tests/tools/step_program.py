"""Compiles training steps of a small Xception for eight devices, and prints what they communicate as JSON.

The arguments are JSON objects of config fields, one for each step.
"""

import dataclasses
import json
import sys

import jax

from xception_jax.config import default_config, resolve
from xception_jax.data.sources import SyntheticSource
from xception_jax.parallel import make_mesh
from xception_jax.tools.planning.hlo import collectives
from xception_jax.training.experiment import build_experiment

assert jax.device_count() == 8
for fields in map(json.loads, sys.argv[1:]):
    config = default_config()
    config.model.update(num_classes=1000, width_multiplier=0.25, middle_blocks=0, stem="small", residual=False)
    config.data.image_size = 16
    config.batch_size, config.ema.decay = 16, 0.0
    config.update_from_flattened_dict(fields)
    config = resolve(config)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        experiment = build_experiment(config, {"train": SyntheticSource(1000, "train")}, mesh)
        step = experiment.compile_step()
    hlo = step.as_text()
    found = collectives(hlo, mesh.size)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(experiment.abstract))
    batch_bytes = config.batch_size // mesh.size * (4 * 3 * config.data.image_size**2 + 4)
    print(
        json.dumps(
            {
                "collectives": [dataclasses.asdict(one) | {"count": count} for one, count in found.items()],
                "state_bytes": state_bytes,
                "state_bytes_a_device": step.memory_analysis().argument_size_in_bytes - batch_bytes,
                "largest_parameter_bytes": max(4 * leaf.size for leaf in jax.tree.leaves(experiment.abstract.params)),
                "parameter_bytes": 4 * experiment.cost.parameters,
            }
        )
    )
