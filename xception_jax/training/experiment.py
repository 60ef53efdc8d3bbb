"""Builds model, optimizer, data, mesh and compiled training step from a config."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xception_jax.config import ExperimentConfig, duration_in_steps
from xception_jax.config.fields import MAX_INTEGER
from xception_jax.data.datasets import open_dataset, overlap
from xception_jax.data.sources import Source, SourceInfo, check_labels
from xception_jax.errors import ConfigError
from xception_jax.models import create_model
from xception_jax.models.cost import Cost, count_cost
from xception_jax.parallel import batch_sharding, check_batch, device_memory_errors, make_mesh
from xception_jax.training.finetuning import check_patterns
from xception_jax.training.losses import class_weights
from xception_jax.training.optimizers import make_optimizer, make_schedule
from xception_jax.training.state import TrainState, abstract_state, make_state_init, seed_bits
from xception_jax.training.step import make_train_step

_SPLITS = {"train": "train_split", "dev": "eval_split", "test": "test_split"}  # fields of `config.data`


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved config and everything built from it. Constant during a run.

    Attributes:
      config: the resolved config.
      mesh: mesh of all devices.
      sources: data by split: 'train', and 'dev' and 'test' if the config names them.
      model: the network.
      optimizer: the optimizer.
      schedule: learning rate as a function of the number of updates.
      cost: parameters and multiply-adds of the network.
      abstract: shapes, dtypes and shardings of the state.
      init: returns the initial state, sharded.
      input_shape: shape of one input of the network, an image or its features.
    """

    config: ExperimentConfig
    mesh: Mesh
    sources: dict[str, Source]
    model: nn.Module
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    cost: Cost
    abstract: TrainState
    init: Callable[[], TrainState]
    input_shape: tuple[int, ...]

    def steps(self, duration: str) -> int:
        """Converts a duration, such as '2 epochs', to steps."""
        return duration_in_steps(duration, self.config.batch_size, len(self.sources["train"]))

    def every(self, duration: str) -> int:
        """Converts the interval between two events to steps, at least 1."""
        return max(1, self.steps(duration))

    def replicate(self, value: np.ndarray | np.generic) -> jax.Array:
        """Copies a host value to every device of the mesh."""
        return jax.device_put(value, NamedSharding(self.mesh, PartitionSpec()))

    @property
    def data(self) -> SourceInfo:
        """Description of the training data."""
        return self.sources["train"].info

    @functools.cached_property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.steps(self.config.duration)

    def compile_step(self) -> jax.stages.Compiled:
        """Compiles the training step for the mesh: (state, batch, key_bits) -> (state, metrics). It donates the state.

        Raises:
          DeviceMemoryError: the step does not fit into the memory of a device.
        """
        step = make_train_step(
            self.model,
            self.optimizer,
            self.schedule,
            self.config,
            class_weights(self.config, self.sources["train"]),
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated))
        bits = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))  # a plan's devices compute nothing
        key_bits = jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=replicated)
        options: dict[str, str | bool] = {}
        if self.config.profile and self.mesh.devices.flat[0].platform == "gpu":
            options = {"xla_gpu_enable_command_buffer": ""}  # traces of CUDA graphs do not name the operation
        with step_memory_errors(self.config):
            return jitted.lower(self.abstract, self.abstract_batch(), key_bits).compile(compiler_options=options)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes, dtypes and sharding of a global batch."""
        config, sharding = self.config, batch_sharding(self.mesh)
        multi_label = config.loss.multi_label
        label_shape = (config.batch_size, config.model.num_classes) if multi_label else (config.batch_size,)
        return {
            "image": jax.ShapeDtypeStruct((config.batch_size, *self.input_shape), jnp.float32, sharding=sharding),
            "label": jax.ShapeDtypeStruct(label_shape, jnp.float32 if multi_label else jnp.int32, sharding=sharding),
        }


def step_memory_errors(config: ExperimentConfig) -> contextlib.AbstractContextManager[None]:
    """Raises a DeviceMemoryError if the training step does not fit into the memory of a device."""
    return device_memory_errors(
        "the training step",
        f"batch_size={config.batch_size}, image_size={config.data.image_size}, dtype={config.model.dtype}",
        "lower config.batch_size, raise config.accumulation_steps, or set config.model.dtype='bfloat16'",
    )


def make_experiment(config: ExperimentConfig) -> Experiment:
    """Opens the data and builds everything except the compiled step.

    Args:
      config: a resolved config.

    Raises:
      ConfigError: the config does not fit the data or the devices.
      InputMissingError: the data are missing.
      BadDataError: the data are damaged.
    """
    splits = {name: getattr(config.data, field) for name, field in _SPLITS.items()}
    sources = {name: open_dataset(config.data, split) for name, split in splits.items() if split}
    check_data(config, sources)
    mesh = make_mesh(config.mesh)
    if len(sources) > 1:
        check_batch("config.evaluation.batch_size", config.evaluation.batch_size, mesh.size)
    return build_experiment(config, sources, mesh)


def build_experiment(config: ExperimentConfig, sources: dict[str, Source], mesh: Mesh) -> Experiment:
    """Builds an experiment on opened data. The mesh may consist of devices to compile for that are not attached.

    Raises:
      ConfigError: the batch cannot be divided among the devices, or a pattern of the optimizer has no effect.
    """
    check_batch("config.batch_size", config.batch_size, mesh.size, config.accumulation_steps)
    model = create_model(config.model)
    schedule = make_schedule(config, len(sources["train"]))
    optimizer = make_optimizer(config.optimizer, schedule)
    init = make_state_init(model, optimizer, image_size=config.data.image_size, ema=config.ema.decay > 0)
    abstract = abstract_state(init, mesh)
    check_patterns(config.optimizer, abstract.params)
    _check_duration(config, len(sources["train"]))
    seeded = jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))
    return Experiment(
        config=config,
        mesh=mesh,
        sources=sources,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        cost=count_cost(model, config.data.image_size),
        abstract=abstract,
        init=lambda: seeded(seed_bits(config.seed)),  # lazy, because the devices of the mesh may not be attached
        input_shape=(config.data.image_size, config.data.image_size, 3),
    )


def _check_duration(config: ExperimentConfig, num_examples: int) -> None:
    """Raises ConfigError if the run would end before its first step, or after more steps than an int32 can count."""
    steps = duration_in_steps(config.duration, config.batch_size, num_examples)
    if steps > MAX_INTEGER:
        what = f"config.duration='{config.duration}' is {steps:,} steps"
        raise ConfigError(what, "config.duration", f"set it to at most {MAX_INTEGER:,} steps")
    if steps == 0:
        raise ConfigError(
            f"config.duration='{config.duration}' is less than one step of {config.batch_size:,} images: "
            f"an epoch has {num_examples:,}",
            "config.duration",
            f"lower config.batch_size to at most {num_examples:,}, or set a longer config.duration",
        )


def check_data(config: ExperimentConfig, sources: dict[str, Any]) -> None:
    """Checks that the splits are disjoint, and that network, loss and data agree about the classes.

    Raises:
      ConfigError: two splits share images, or the number of classes or the kind of labels differs.
      BadDataError: a label is out of range.
    """
    info = sources["train"].info
    loss = "sigmoid" if info.multi_label else "softmax"
    if config.loss.name != loss:
        labels = "any number of labels" if info.multi_label else "one label"
        raise ConfigError(
            f"config.loss.name is {config.loss.name!r}, but images of {info.name} have {labels} each",
            "config.loss.name",
            f"set it to {loss!r}" + ("" if info.multi_label else "; with one logit, it is the sigmoid loss"),
        )
    if info.num_classes < 2 and not info.multi_label:
        what = f"{info.name} has a single class, {info.class_names[0] if info.class_names else ''}"
        raise ConfigError(what, "config.data.name", "add images of another class: there is nothing to tell apart")
    if info.num_classes != config.num_classes:
        one = ", or to 1 for a single logit" if info.num_classes == 2 and not info.multi_label else ""
        raise ConfigError(
            f"config.model.num_classes is {config.model.num_classes}, but {info.name} has {info.num_classes} classes",
            "config.model.num_classes",
            f"set it to {info.num_classes}{one}",
        )
    _check_balance(config, info)
    for a, b in itertools.combinations(sources, 2):
        other = sources[b].info.split
        if overlap(sources[a], other):
            field = f"config.data.{_SPLITS[b]}"
            raise ConfigError(
                f"the splits config.data.{_SPLITS[a]}={sources[a].info.split} and {field}={other} share images",
                field,
                "use disjoint splits such as train[:98%] and train[98%:], or '' to do without this one",
            )
    for source in sources.values():
        check_labels(source, jax.process_index(), jax.process_count())  # each process checks a part


def _check_balance(config: ExperimentConfig, info: SourceInfo) -> None:
    """Raises ConfigError if the classes of the data cannot be weighted or balanced as the config says."""
    weights = config.loss.class_weights
    if info.multi_label and (weights or config.data.sampling == "balanced"):
        where = "config.loss.class_weights" if weights else "config.data.sampling"
        what = f"images of {info.name} have any number of labels, so that classes cannot be balanced"
        raise ConfigError(what, where, "leave it at its default")
    if isinstance(weights, tuple) and len(weights) != info.num_classes:
        what = f"there are {len(weights)} weights, but {info.name} has {info.num_classes} classes"
        raise ConfigError(
            what, "config.loss.class_weights", f"set one weight for each of {', '.join(info.class_names[:10])}"
        )
