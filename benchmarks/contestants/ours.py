"""Runs xception_jax: `compile_inference`, the training step of `training/`, and the batches of `data/`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import fashion_mnist
from xception_jax.config import ExperimentConfig, default_config, resolve
from xception_jax.data.images import Preprocessing
from xception_jax.export.inference import compile_inference
from xception_jax.models import create_model
from xception_jax.parallel import batch_sharding, make_mesh, to_devices
from xception_jax.training.optimizers import make_optimizer, make_schedule
from xception_jax.training.state import DROPOUT, abstract_state, make_state_init, seed_bits
from xception_jax.training.step import make_train_step
from xception_jax.weights.network import Network


def prepare(work: dict, options: dict):
    """Returns (step, parameters)."""
    return {"train": _train, "infer": _infer, "input": _input}[work["kind"]](work)


def _config(work: dict) -> ExperimentConfig:
    """Returns the config of a case, without averages, weight decay, dropout and smoothing, like the peers."""
    if work["network"] == "small":
        config = fashion_mnist.get_config()
    else:
        config = default_config()
        config.model.name = work["network"]
    config.model.update(work.get("model", {}))
    config.model.dropout_rate = 0.0
    config.data.image_size, config.batch_size = work["size"], work["batch"]
    config.optimizer.weight_decay = config.ema.decay = config.loss.label_smoothing = 0.0
    config.schedule.name, config.schedule.warmup, config.schedule.learning_rate = "constant", "0 steps", 0.01
    return resolve(config)


def _batch(work: dict, num_classes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (work["batch"], work["size"], work["size"], 3)).astype(np.float32)
    return {"image": image, "label": rng.integers(num_classes, size=work["batch"], dtype=np.int32)}


def _size(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _train(work: dict):
    config = _config(work)
    model, schedule = create_model(config.model), make_schedule(config, 10_000)
    optimizer = make_optimizer(config.optimizer, schedule)
    mesh = make_mesh(config.mesh)
    init = make_state_init(model, optimizer, image_size=work["size"], ema=False)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, mesh))
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=shardings)(seed_bits(0))
        train_step = jax.jit(
            make_train_step(model, optimizer, schedule, config), donate_argnums=0, out_shardings=(shardings, None)
        )
    dropout = jax.device_put(seed_bits(0, DROPOUT))
    batch = to_devices(_batch(work, config.model.num_classes), batch_sharding(mesh))

    def step():
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, batch, dropout)
        jax.block_until_ready((state, metrics))

    return step, _size(state.params)


def _infer(work: dict):
    config = _config(work)
    images = jnp.asarray(_batch(work, 1)["image"])
    init = functools.partial(create_model(config.model).init, train=False)
    variables = jax.device_get(jax.jit(init)(jax.random.key(0), images[:1]))
    network = Network(config.model, variables, Preprocessing(size=work["size"]), None, "random", "")
    infer = compile_inference(network)
    return lambda: infer(images).block_until_ready(), _size(variables["params"])


class _Files:
    """The JPEG files of a directory, kept in memory, repeated to a source of `EXAMPLES` examples."""

    EXAMPLES = 10_000

    def __init__(self, directory: str):
        from xception_jax.data.sources import SourceInfo

        self._images = [path.read_bytes() for path in sorted(Path(directory).glob("*.jpg"))]
        self.info = SourceInfo("files", "all", 10, tuple("0123456789"), False, "", self.EXAMPLES)

    def __len__(self) -> int:
        return self.EXAMPLES

    def __getitem__(self, index: int) -> dict:
        return {"image": self._images[index % len(self._images)], "label": index % 10, "index": index}

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        return [self[index] for index in indices]

    def column(self, name: str) -> None:
        return None


def _input(work: dict):
    from xception_jax.data.pipeline import train_batches

    config = default_config()
    config.data.image_size, config.data.threads = work["size"], work["cores"]
    config.data.color_distortion = False
    batches = train_batches(
        resolve(config).data, _Files(work["directory"]), batch_size=work["batch"], seed=0, start_step=0
    )
    return lambda: next(batches), None
