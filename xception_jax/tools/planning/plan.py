"""What a config will need on chips that nobody owns yet: its training step is compiled for them, and read."""

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
from xception_jax.data.prepare.datasets import open_dataset
from xception_jax.data.sources import Source, SyntheticSource
from xception_jax.errors import DeviceMemoryError, InputMissingError, UsageError
from xception_jax.models import create_model
from xception_jax.models.cost import count_cost
from xception_jax.parallel import check_batch, make_mesh
from xception_jax.tools.planning.hlo import Collective, arrays_in_memory, collectives
from xception_jax.tools.planning.roofline import StepTime, Traffic, count_traffic, step_time
from xception_jax.tools.planning.topology import Topology
from xception_jax.training.experiment import build_experiment

# Images in the training split, for planning where the dataset is not: the figures of the TFDS catalogue.
_TRAIN_EXAMPLES = {"imagenet2012": 1_281_167, "open_images_v4": 1_743_042, "fashion_mnist": 60_000}
# On one core (Xeon, 2.8 GHz): read a record, decode a JPEG of 500 x 375, crop and resize it.
_INPUT_SECONDS = 2.2e-3
_TRIES = 8  # of the search for the largest batch: each takes minutes
_MASTER_COPIES = 3  # float32 arrays of a parameter's size: weight, momentum, gradient


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip while a step runs.

    Attributes:
      arguments: state and batch.
      temporaries: activations above all.
      output: the new state; `alias` of it takes the place of the old one.
      program: the step itself.
    """

    arguments: int
    temporaries: int
    output: int
    alias: int
    program: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.arguments + self.temporaries + self.output - self.alias + self.program


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of the step that it has compiled, for one chip.

    Attributes:
      memory: that it needs.
      flops: by XLA's count, which takes in padding.
      bytes_accessed: by XLA's count: what every fusion reads and writes, as if nothing stayed on the chip in between.
      collectives: and how often each takes place in a step.
      float32_activations: bytes of float32 arrays with a value for each pixel of some layer that are written to memory.
      seconds: that compiling took.
    """

    memory: Memory
    flops: float
    bytes_accessed: float
    collectives: Counter[Collective]
    float32_activations: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training run needs on a topology.

    Attributes:
      topology, config: as given.
      epoch_examples: images in an epoch.
      steps: of the whole run.
      flops: of one step on one chip, counted from the layers: 6 for each multiply-add of the forward pass.
      compiled: None where there is no compiler for the topology here.
      time: of a step.
    """

    topology: Topology
    config: ExperimentConfig
    epoch_examples: int
    steps: int
    flops: float
    compiled: Compiled | None
    time: StepTime

    @property
    def batch_per_chip(self) -> int:
        """Images in a step, on each chip."""
        return self.config.batch_size // self.topology.size

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON takes it; seconds, bytes, and pairs of (least, most)."""
        seconds = self.time.interval
        chips, chip = self.topology.size, self.topology.chip
        run = [self.steps * value / 3600 for value in seconds]
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
            "flops_per_chip": self.flops,
            "seconds": {
                "step": seconds,
                "compute": self.time.compute,
                "memory": self.time.memory,
                "communication": self.time.communication,
            },
            "images_per_second": [self.config.batch_size / value for value in reversed(seconds)],
            "cores_for_input": [_INPUT_SECONDS * self.config.batch_size / value for value in reversed(seconds)],
            "mfu": [self.flops / chip.peak_flops / value for value in reversed(seconds)],
            "hours": run,
            "chip_hours": [value * chips for value in run],
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
    """Returns the images a chip that fill the memory, if temporaries grow in proportion."""
    # Activations so small that they stay on the chip are no temporaries; the batch is among the arguments.
    growing = memory.temporaries or memory.arguments
    return batch_per_chip + (hbm_bytes - memory.total) * batch_per_chip // growing


def make_plan(config: ExperimentConfig, topology: Topology, *, examples: int | None = None) -> Plan:
    """Compiles the training step of a config for a topology (TPU), or counts what it needs (GPU).

    Args:
      config: a whole resolved config.
      topology: of chips that need not be here.
      examples: in an epoch, where the dataset is not here.

    Raises:
      ConfigError: batch or mesh do not fit the topology.
      DeviceMemoryError: the step does not fit into the memory of the chips.
      InputMissingError: libtpu is missing, or the size of the dataset is not known.
      UsageError: libtpu knows no such topology.
    """
    check_batch("batch_size", config.batch_size, topology.size, config.accumulation_steps)
    devices = topology.devices() if topology.is_tpu else []
    num_examples = examples or _epoch_examples(config)
    model = create_model(config.model)
    cost = count_cost(model, config.data.image_size)
    traffic = count_traffic(model, config.data.image_size)
    per_chip = config.batch_size // topology.size
    width = np.dtype(jax.numpy.dtype(config.model.dtype)).itemsize
    # The optimiser reads and writes weights and momentum, reads the gradient; averages come on top.
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
    return Plan(topology, config, num_examples, steps, flops, compiled, time_of_step)


def _epoch_examples(config: ExperimentConfig) -> int:
    """Returns the size of the training split, from the dataset if it is here, else from what is known of it."""
    data = config.data
    try:
        return len(open_dataset(data, data.train_split))
    except InputMissingError:
        name = re.split("[/:]", data.name)[0]
        if name not in _TRAIN_EXAMPLES:
            raise InputMissingError(
                f"the dataset {data.name} is not here, so the length of an epoch is not known",
                "config.data",
                "add --examples=N, the number of training images, or set config.data.data_dir",
            ) from None
    files = tfds.core.ShardedFileTemplate(data_dir=Path(), dataset_name=name, split="train", filetype_suffix="tfrecord")
    info = tfds.core.SplitInfo(
        name="train", shard_lengths=[_TRAIN_EXAMPLES[name]], num_bytes=0, filename_template=files
    )
    return tfds.core.splits.SplitDict([info])[data.train_split].num_examples


def _compile(
    config: ExperimentConfig, topology: Topology, devices: Sequence[jax.Device], num_examples: int
) -> Compiled:
    mesh = make_mesh(config.mesh, devices)
    # The step does not depend on what the images are.
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
    pixels = images * 100  # the last layers have 10 x 10
    return Compiled(
        memory=Memory(
            analysis.argument_size_in_bytes,
            analysis.temp_size_in_bytes,
            analysis.output_size_in_bytes,
            analysis.alias_size_in_bytes,
            analysis.generated_code_size_in_bytes,
        ),
        flops=costs["flops"],
        bytes_accessed=costs["bytes accessed"],
        collectives=collectives(hlo, topology.size),
        float32_activations=sum(
            4 * int(np.prod(shape)) * count
            for shape, count in arrays_in_memory(hlo, "f32").items()
            if len(shape) >= 4 and images in shape[:2] and np.prod(shape) >= pixels * 128
        ),
        seconds=seconds,
    )


def _too_large(error: DeviceMemoryError, config: ExperimentConfig, topology: Topology) -> DeviceMemoryError:
    # libtpu: 'the total memory required for HLO temporaries (27.97G) exceeds available HBM (15.75G)'
    sizes = re.findall(r"\b\d+\.\d+[KMGT]\b", str(error.__cause__))
    needs = f": {sizes[0]} of {sizes[1]}" if len(sizes) > 1 else ""
    return DeviceMemoryError(
        f"the training step does not fit into the memory of a {topology.chip.name}{needs}",
        f"{config.batch_size // topology.size} images a chip, dtype={config.model.dtype}",
        f"lower config.batch_size ({config.batch_size}), raise config.accumulation_steps, or search with --fit",
    )


def _expected_collectives(config: ExperimentConfig, topology: Topology, cost, traffic: Traffic) -> Counter[Collective]:
    """Returns what data parallelism needs: a sum of all gradients, and of BatchNorm's statistics if they are global."""
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
    config: ExperimentConfig, topology: Topology, *, examples: int | None = None, report: Callable[[str], None] = print
) -> Plan:
    """Returns the plan for the most images a chip that fit, in multiples of eight; compiles up to `_TRIES` times.

    Args:
      config, topology, examples: as for `make_plan`; the search starts near the batch of the config.
      report: takes a line for each try.

    Raises:
      DeviceMemoryError: nothing that was tried fits.
      UsageError: for GPUs, whose memory is not known here.
    """
    if not topology.is_tpu:
        raise UsageError("what fits is found by compiling, for TPUs only", f"--topology={topology.name}", "leave --fit")
    unit = 8 * config.accumulation_steps
    batch = max(unit, config.batch_size // topology.size // unit * unit)
    best: Plan | None = None
    failure: DeviceMemoryError | None = None
    limit = math.inf
    for _ in range(_TRIES):
        tried = config.replace(batch_size=batch * topology.size)
        try:
            plan = make_plan(tried, topology, examples=examples)
            assert plan.compiled is not None
            best, memory = plan, plan.compiled.memory
            report(f"{batch} images a chip fit: {memory.total / 2**30:.2f} GiB")
            # By half at least: short of memory, the compiler computes activations anew instead of keeping them.
            following = max(_batch_that_fits(batch, memory, topology.chip.hbm_bytes), batch * 3 // 2)
        except DeviceMemoryError as error:
            failure, limit = error, batch
            report(f"{batch} images a chip do not fit")
            following = ((best.batch_per_chip if best else 0) + batch) // 2
        batch = int(min(following, limit - unit)) // unit * unit
        if batch <= (best.batch_per_chip if best else 0):
            break
    else:
        report(f"more may fit: {batch} images a chip were not tried, after {_TRIES} compilations")
    if best is None:
        assert failure is not None
        raise failure
    return best
