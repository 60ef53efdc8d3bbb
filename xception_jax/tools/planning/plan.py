"""Plans a training run: compiles its step for TPUs that you do not have, and reads memory and communication off it."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

from xception_jax.config import ExperimentConfig, duration_in_steps
from xception_jax.data.datasets import open_dataset
from xception_jax.data.sources import Source
from xception_jax.data.synthetic import SyntheticSource
from xception_jax.errors import ConfigError, DeviceMemoryError, InputMissingError, UsageError
from xception_jax.models import create_model
from xception_jax.models.cost import COSTS, Cost, count_cost
from xception_jax.parallel import check_batch, make_mesh, size_of_data_axis
from xception_jax.tools.planning import around
from xception_jax.tools.planning.hlo import Collective, arrays_in_memory, collectives
from xception_jax.tools.planning.hosts import hosts_of
from xception_jax.tools.planning.roofline import StepTime, Traffic, count_traffic, step_time
from xception_jax.tools.planning.topology import Topology
from xception_jax.training.experiment import build_experiment

# Images in the training split according to the TFDS catalogue, for planning without the dataset.
_TRAIN_EXAMPLES = {"imagenet2012": 1_281_167, "open_images_v4": 1_743_042, "fashion_mnist": 60_000}
_TRIES = 8  # compilations in the search for the largest batch; each takes minutes
_MASTER_COPIES = 3  # float32 arrays of the size of a parameter: weight, momentum, gradient


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip while a step runs.

    Attributes:
      arguments: state and batch.
      temporaries: mostly activations.
      output: the new state.
      alias: the part of the output that reuses the memory of arguments.
      program: the compiled step.
    """

    arguments: int
    temporaries: int
    output: int
    alias: int
    program: int

    @property
    def total(self) -> int:
        """Returns the total, in which aliased memory counts once."""
        return self.arguments + self.temporaries + self.output - self.alias + self.program


@dataclasses.dataclass(frozen=True)
class Compiled:
    """XLA's analysis of the compiled step, for one chip.

    Attributes:
      memory: required memory.
      flops: counted by XLA, including padding, times the microbatches.
      bytes_accessed: counted by XLA: all that fusions read and write, as if nothing stayed on the chip between them;
        times the microbatches, which counts the update of the weights too often.
      collectives: with their counts in one step.
      float32_activations: bytes of activations that are written to memory in float32.
      seconds: compilation time.
    """

    memory: Memory
    flops: float
    bytes_accessed: float
    collectives: Counter[Collective]
    float32_activations: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of a training run on a topology.

    Attributes:
      topology, config: as given.
      epoch_examples: images in an epoch.
      steps: number of steps of the whole run.
      flops: FLOP of one step on one chip, counted from the layers: 6 per multiply-add of the forward pass.
      compiled: None for GPUs, which are not compiled for.
      time: time of one step.
      cost: cost of the network, for one image.
      state_bytes: size of the training state.
      least_memory: bytes that the activations and the state take at least on a chip.
      bandwidth: bytes per second that one host writes to storage.
    """

    topology: Topology
    config: ExperimentConfig
    epoch_examples: int
    steps: int
    flops: float
    compiled: Compiled | None
    time: StepTime
    cost: Cost
    state_bytes: int
    least_memory: float
    bandwidth: float

    @property
    def batch_per_chip(self) -> int:
        """Returns the images per chip and step."""
        return self.config.batch_size // self.topology.size

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data. Times are in seconds, sizes in bytes; pairs are (least, most)."""
        seconds = self.time.interval
        chips, chip = self.topology.size, self.topology.chip
        run = [self.steps * value / 3600 for value in seconds]
        speeds = [self.config.batch_size / value for value in reversed(seconds)]
        hosts = hosts_of(self.topology)
        checkpoint = around.checkpoint(self.state_bytes, self.bandwidth)
        stop = [value + checkpoint["seconds"] for value in seconds]
        result = {
            "config": self.config.name,
            "topology": self.topology.name,
            "chip": dataclasses.asdict(chip),
            "chips": chips,
            "batch_size": self.config.batch_size,
            "batch_per_chip": self.batch_per_chip,
            "statistics": self.config.model.batch_norm.statistics,
            "dtype": self.config.model.dtype,
            "epoch_examples": self.epoch_examples,
            "steps": self.steps,
            **{name: getattr(self.cost, name) for name in COSTS},
            "flops_per_chip": self.flops,
            "least_memory": self.least_memory,
            "seconds": {
                "step": seconds,
                "compute": self.time.compute,
                "memory": self.time.memory,
                "communication": self.time.communication,
            },
            "images_per_second": speeds,
            "hosts": dataclasses.asdict(hosts) | {"cores": hosts.cores},
            "images_per_core": around.IMAGES_PER_CORE,
            "cores_for_input": [speed / around.IMAGES_PER_CORE for speed in speeds],
            "checkpoint": checkpoint,
            "stop_seconds": stop,
            "first_step": dataclasses.asdict(around.first_step(self.compiled.seconds if self.compiled else None)),
            "mfu": [self.flops / chip.peak_flops / value for value in reversed(seconds)],
            "hours": run,
            "chip_hours": [value * chips for value in run],
            "warnings": around.warnings(
                self.config,
                self.topology,
                hosts,
                memory=self.compiled.memory.total if self.compiled else self.least_memory,
                memory_is_compiled=self.compiled is not None,
                images_per_second=speeds[0],
                stop_seconds=stop[1],
            ),
        }
        if self.compiled:
            compiled = self.compiled
            result["compiled"] = {
                "memory": dataclasses.asdict(compiled.memory) | {"total": compiled.memory.total, "hbm": chip.hbm_bytes},
                "batch_that_fits": _batch_that_fits(self.batch_per_chip, compiled.memory, chip.hbm_bytes),
                "flops": compiled.flops,
                "bytes_accessed": compiled.bytes_accessed,
                "float32_activation_bytes": compiled.float32_activations,
                "seconds_to_compile": compiled.seconds,
                "collectives": [
                    dataclasses.asdict(one) | {"count": count, "bytes_sent": one.bytes_sent}
                    for one, count in _by_bytes(compiled.collectives)
                ],
            }
        return result


def _by_bytes(found: Counter[Collective]) -> list[tuple[Collective, int]]:
    return sorted(found.items(), key=lambda pair: -pair[0].bytes_sent * pair[1])


def _batch_that_fits(batch_per_chip: int, memory: Memory, hbm_bytes: int) -> int:
    """Returns the images per chip that fill the memory, if temporaries grow in proportion."""
    # Small activations stay on the chip and do not count as temporaries. Then only the batch, an argument, grows.
    growing = memory.temporaries or memory.arguments
    return batch_per_chip + (hbm_bytes - memory.total) * batch_per_chip // growing


def make_plan(
    config: ExperimentConfig,
    topology: Topology,
    *,
    examples: int | None = None,
    bandwidth: float = around.DEFAULT_BANDWIDTH,
) -> Plan:
    """Compiles the training step of a config for a topology (TPU), or counts its needs from the layers (GPU).

    Args:
      config: the config.
      topology: the chips; they need not be present.
      examples: images in an epoch; required if neither the dataset nor its size is known.
      bandwidth: bytes per second that one host writes to storage.

    Raises:
      ConfigError: the batch or the mesh does not fit the topology.
      DeviceMemoryError: the step does not fit into the memory of the chips.
      InputMissingError: libtpu is missing, or the size of the dataset is not known.
      UsageError: libtpu does not know the topology.
    """
    check_batch("config.batch_size", config.batch_size, topology.size, config.accumulation_steps)
    size_of_data_axis(config.mesh, topology.size)
    devices = topology.devices() if topology.is_tpu else []
    num_examples = examples or _epoch_examples(config)
    model = create_model(config.model)
    cost = count_cost(model, config.data.image_size)
    traffic = count_traffic(model, config.data.image_size)
    per_chip = config.batch_size // topology.size
    width = np.dtype(jax.numpy.dtype(config.model.dtype)).itemsize
    # The optimizer reads and writes weights and momentum, and reads gradients. Polyak averages add to that.
    update = 2 * 4 * cost.parameters * (_MASTER_COPIES + (config.ema.decay > 0)) / config.mesh.fsdp
    least, most = (width * per_chip * values + update for values in (traffic.fused, traffic.unfused))
    flops = 6.0 * cost.multiply_adds * per_chip
    compiled = None
    if devices:
        compiled = _compile(config, topology, devices, num_examples)
        most = max(least, compiled.bytes_accessed)
    time_of_step = step_time(
        topology,
        flops=max(flops, compiled.flops if compiled else 0.0),
        memory=(least, most),
        collectives=compiled.collectives if compiled else _expected_collectives(config, topology, cost, traffic),
        dtype=config.model.dtype,
    )
    steps = duration_in_steps(config.duration, config.batch_size, num_examples)
    num_bytes = around.state_bytes(config, num_examples)
    activations = width * per_chip // config.accumulation_steps * traffic.written  # kept for the backward pass
    return Plan(
        topology,
        config,
        num_examples,
        steps,
        flops,
        compiled,
        time_of_step,
        cost,
        num_bytes,
        num_bytes / config.mesh.fsdp + activations,
        bandwidth,
    )


def _epoch_examples(config: ExperimentConfig) -> int:
    """Returns the size of the training split, from the dataset if it is present, else from the table above."""
    data = config.data
    try:
        return len(open_dataset(data, data.train_split))
    except InputMissingError:
        name = re.split("[/:]", data.name)[0]
        if name not in _TRAIN_EXAMPLES:
            raise InputMissingError(
                f"the dataset {data.name} is missing, so the length of an epoch is unknown",
                "config.data",
                "add --examples=N, the number of training images, or set config.data.data_dir",
            ) from None
    files = tfds.core.ShardedFileTemplate(data_dir=Path(), dataset_name=name, split="train", filetype_suffix="tfrecord")
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=[_TRAIN_EXAMPLES[name]], num_bytes=0, filename_template=files
    )
    try:
        return tfds.core.splits.SplitDict([info])[data.train_split].num_examples
    except (ValueError, KeyError, AssertionError):
        raise ConfigError(
            f"the size of the split {data.train_split!r} of {name} is unknown without the dataset",
            "config.data.train_split",
            "correct it, or add --examples=N, the number of training images",
        ) from None


def _compile(
    config: ExperimentConfig, topology: Topology, devices: Sequence[jax.Device], num_examples: int
) -> Compiled:
    """Compiles the training step and reads XLA's analysis of it."""
    mesh = make_mesh(config.mesh, devices)
    # The content of the images does not matter.
    sources: dict[str, Source] = {"train": SyntheticSource(num_examples, config.data.train_split)}
    with jax.set_mesh(mesh):
        experiment = build_experiment(config, sources, mesh)
        start = time.monotonic()
        try:
            step = experiment.compile_step()
        except DeviceMemoryError as error:
            raise _too_large(error, config, topology) from error.__cause__
        seconds = time.monotonic() - start
    analysis: Any = step.memory_analysis()
    costs: Any = step.cost_analysis()
    hlo = step.as_text() or ""
    images = config.batch_size // topology.size // config.accumulation_steps
    smallest = images * 100 * 128  # values of an activation: the last layers have 10 x 10 pixels
    return Compiled(
        memory=Memory(
            analysis.argument_size_in_bytes,
            analysis.temp_size_in_bytes,
            analysis.output_size_in_bytes,
            analysis.alias_size_in_bytes,
            analysis.generated_code_size_in_bytes,
        ),
        flops=costs["flops"] * config.accumulation_steps,  # XLA counts the body of a loop once
        bytes_accessed=costs["bytes accessed"] * config.accumulation_steps,
        collectives=collectives(hlo, topology.size),
        float32_activations=sum(
            4 * int(np.prod(shape)) * count
            for shape, count in arrays_in_memory(hlo, "f32").items()
            if len(shape) >= 4 and images in shape[:2] and np.prod(shape) >= smallest
        ),
        seconds=seconds,
    )


def _too_large(error: DeviceMemoryError, config: ExperimentConfig, topology: Topology) -> DeviceMemoryError:
    """Returns the error for a step that does not fit, with the sizes that the compiler reports."""
    # libtpu: 'the total memory required for HLO temporaries (27.97G) exceeds available HBM (15.75G)'
    sizes = re.findall(r"\b\d+\.\d+[KMGT]\b", str(error.__cause__))
    needs = f": {sizes[0]} of {sizes[1]}" if len(sizes) > 1 else ""
    return DeviceMemoryError(
        f"the training step does not fit into the memory of a {topology.chip.name}{needs}",
        f"{config.batch_size // topology.size} images per chip, dtype={config.model.dtype}",
        f"lower config.batch_size ({config.batch_size}), raise config.accumulation_steps, or search with --fit",
    )


def _expected_collectives(
    config: ExperimentConfig, topology: Topology, cost: Cost, traffic: Traffic
) -> Counter[Collective]:
    """Returns the collectives of data parallelism: sums of all gradients, and of BatchNorm statistics if global."""
    devices = topology.size
    found: Counter[Collective] = Counter()
    if devices > 1:
        found[Collective("all-reduce", "-", "backward", 4 * cost.parameters, 1, devices)] += 1
        if config.model.batch_norm.statistics == "global":
            sums = 4 * cost.statistics // traffic.batch_norms
            found[Collective("all-reduce", "BatchNorm", "forward", sums, 2, devices)] += traffic.batch_norms
            found[Collective("all-reduce", "BatchNorm", "backward", sums, 2, devices)] += traffic.batch_norms
    return found


def find_largest_batch(
    config: ExperimentConfig,
    topology: Topology,
    *,
    examples: int | None = None,
    bandwidth: float = around.DEFAULT_BANDWIDTH,
    report: Callable[[str], None] = print,
) -> Plan:
    """Returns the plan for the largest batch that fits, in multiples of eight images per chip.

    Compiles up to `_TRIES` times.

    Args:
      config, topology, examples, bandwidth: as for `make_plan`. The search starts near the batch of the config.
      report: called with one line per compilation.

    Raises:
      DeviceMemoryError: no batch that was tried fits.
      UsageError: the topology has GPUs, which are not compiled for.
    """
    if not topology.is_tpu:
        raise UsageError("--fit works for TPUs only", f"--topology={topology.name}", "remove --fit")
    unit = 8 * config.accumulation_steps
    batch = max(unit, config.batch_size // topology.size // unit * unit)
    best: Plan | None = None
    failure: DeviceMemoryError | None = None
    limit = math.inf
    for _ in range(_TRIES):
        tried = config.replace(batch_size=batch * topology.size)
        try:
            plan = make_plan(tried, topology, examples=examples, bandwidth=bandwidth)
            assert plan.compiled is not None
            best, memory = plan, plan.compiled.memory
            report(f"{batch} images per chip fit: {memory.total / 2**30:.2f} GiB")
            # At least half more: when memory is short, the compiler recomputes activations instead of keeping them.
            following = max(_batch_that_fits(batch, memory, topology.chip.hbm_bytes), batch * 3 // 2)
        except DeviceMemoryError as error:
            failure, limit = error, batch
            report(f"{batch} images per chip do not fit")
            following = ((best.batch_per_chip if best else 0) + batch) // 2
        batch = int(min(following, limit - unit)) // unit * unit
        if batch <= (best.batch_per_chip if best else 0):
            break
    else:
        report(f"more may fit; stopped after {_TRIES} compilations, before {batch} images per chip")
    if best is None:
        assert failure is not None
        raise failure
    return best
