"""Measures what enters the activation between the two convolutions of each separable layer: dead channels and scale.

A channel is dead if its value is at most zero at every place of every image: a ReLU then outputs zero, and no gradient
reaches the convolution in front of it. Networks without an activation there are measured in the same place.

A cell measures its network twice, at its initial state and at its end, on the same images of the development split, in
batches and with the batch statistics of BatchNorm, as a training step does. Training itself is not changed or slowed:
the initial state is computed again from the seed, and the last one is read from the checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xception_jax.config import ExperimentConfig
from xception_jax.data.datasets import open_dataset
from xception_jax.data.pipeline import EvaluationBatches
from xception_jax.files import write_atomically
from xception_jax.models import create_model
from xception_jax.models.modules import BEFORE_ACTIVATION
from xception_jax.study.cells import ACTIVATIONS
from xception_jax.training.experiment import make_experiment
from xception_jax.training.initial_weights import first_state
from xception_jax.training.restore import open_run
from xception_jax.weights.keras_layers import natural

IMAGES = 512  # at least; whole batches are read


def write_activations(workdir: Path) -> None:
    """Measures the network of a finished run, and writes the result to its work directory.

    A result that is there already is kept.
    """
    path = workdir / ACTIVATIONS
    if path.exists():
        return
    run = open_run(str(workdir))
    first = first_state(make_experiment(run.config), lambda line: None).all_variables()
    variables_of = {moment: list(each.values())[-1] for moment, each in (("start", first), ("end", run.variables))}
    images = _images(run.config)
    model = create_model(run.config.model)
    found = {
        moment: measure_activations(model, jax.device_get(variables), images)
        for moment, variables in variables_of.items()
    }
    write_atomically(path, json.dumps({"images": sum(map(len, images)), "step": run.step} | found) + "\n")


def measure_activations(model: nn.Module, variables: Mapping[str, Any], batches: list[np.ndarray]) -> list[dict]:
    """Measures all separable layers of a network, in the order of the forward pass.

    Args:
      model: a network; its separable layers show their intermediate values.
      variables: variables of the network.
      batches: images [b, h, w, 3].

    Returns:
      For each layer its name, the side of its map, its channels, the share of dead channels, and the root mean square
      over all channels.
    """
    measure = jax.jit(functools.partial(_measure, model))
    parts = [jax.device_get(measure(variables, images)) for images in batches]
    layers = []
    for name in sorted(parts[0], key=natural):
        largest = np.max([part[name]["largest"] for part in parts], axis=0)
        square = np.average([part[name]["square"] for part in parts], axis=0, weights=list(map(len, batches)))
        layers.append(
            {
                "layer": name,
                "map": int(parts[0][name]["map"]),
                "channels": len(largest),
                "dead": float(np.mean(largest <= 0)),
                "rms": float(np.sqrt(square)),
            }
        )
    return layers


def _measure(model: nn.Module, variables: Mapping[str, Any], images: jax.Array) -> dict[str, dict[str, jax.Array]]:
    _, updated = model.apply(
        variables,
        images,
        train=True,
        mutable=["batch_stats", "intermediates"],
        rngs={"dropout": jax.random.key(0)},
    )
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(updated.get("intermediates", {})):
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if names[-1] == BEFORE_ACTIVATION:
            value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
            found["/".join(names[:-1])] = {
                "map": jnp.asarray(value.shape[1]),
                "largest": value.max((0, 1, 2)),
                "square": jnp.square(value).mean(),
            }
    return found


def _images(config: ExperimentConfig) -> list[np.ndarray]:
    """Returns the first images of the development split, in batches of the training step's size."""
    size = min(config.batch_size, IMAGES) if isinstance(config.model.batch_norm.statistics, str) else config.batch_size
    source = open_dataset(config.data, config.data.eval_split)
    batches = EvaluationBatches(config.data, source, batch_size=min(size, len(source)))
    kept: list[np.ndarray] = []
    with contextlib.closing(iter(batches)) as loaded:
        for batch in loaded:
            if batch["mask"].all():
                kept.append(np.array(batch["image"]))  # buffers are used again
            if sum(map(len, kept)) >= IMAGES:
                break
    return kept
