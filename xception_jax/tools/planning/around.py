"""Estimates start, input and checkpoints of a run, and warns if its batch does not suit a slice."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from xception_jax.config import ExperimentConfig
from xception_jax.models import create_model
from xception_jax.tools.planning.hosts import Hosts
from xception_jax.tools.planning.topology import Topology
from xception_jax.training.optimizers import make_optimizer, make_schedule
from xception_jax.training.state import make_state_init, seed_bits

# Two threads read, decode, crop and distort 1,020 images/s of 500 x 375 pixels (EPYC):
# docs/notebook/2026-11-27-cpu-kernels.md. Without distorted colours, 1,790 to 1,930.
IMAGES_PER_CORE = 510
# From the start of the program to the end of the first step on an H200, with all programs in the compilation cache and
# without: docs/howto/gpu.md.
CACHED_SECONDS, GPU_SECONDS = 38.0, 116.0
DEFAULT_BANDWIDTH = 100e6  # bytes per second that one host writes to storage

_SMALLEST_TPU_BATCH = 8  # a TPU pads smaller batches: https://docs.cloud.google.com/tpu/docs/performance-guide
_SMALLEST_STATISTICS = 16  # images; the paper trained with 32 on a GPU
_FULL = 0.95
_SPOT_SECONDS = 15  # on spot nodes of Google Kubernetes Engine


@dataclasses.dataclass(frozen=True)
class FirstStep:
    """Seconds from the start of the program to the end of the first step.

    Attributes:
      seconds: when everything has to be compiled.
      cached: when it is in the compilation cache.
    """

    seconds: float
    cached: float


def first_step(compilation: float | None) -> FirstStep:
    """Returns the time to the first step.

    Args:
      compilation: seconds that the compilation of the step took here; None if it was not compiled, as for GPUs.
    """
    return FirstStep(GPU_SECONDS if compilation is None else CACHED_SECONDS + compilation, CACHED_SECONDS)


def state_bytes(config: ExperimentConfig, num_examples: int) -> int:
    """Returns the bytes of the training state, which are those of a checkpoint, without computing it."""
    model = create_model(config.model)
    optimizer = make_optimizer(config.optimizer, make_schedule(config, num_examples))
    init = make_state_init(model, optimizer, image_size=config.data.image_size, ema=config.ema.decay > 0)
    leaves = jax.tree.leaves(jax.eval_shape(init, seed_bits(0)))
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def warnings(
    config: ExperimentConfig,
    topology: Topology,
    hosts: Hosts,
    *,
    memory: float,
    memory_is_compiled: bool,
    images_per_second: float,
    stop_seconds: float,
) -> list[str]:
    """Returns a sentence for each way in which the batch does not suit the slice.

    Args:
      config, topology, hosts: those of the run.
      memory: bytes that a step needs on a chip: what the compiler says, or at least what the activations take.
      memory_is_compiled: which of the two.
      images_per_second: at least.
      stop_seconds: at most.
    """
    found = []
    images = config.batch_size // topology.size // config.accumulation_steps
    if topology.is_tpu and images < _SMALLEST_TPU_BATCH:
        found.append(
            f"{images} images per chip and microbatch: a TPU pads them to {_SMALLEST_TPU_BATCH}. "
            "Use a smaller slice or a larger batch."
        )
    if config.model.batch_norm.statistics == "device" and images < _SMALLEST_STATISTICS:
        found.append(
            f"BatchNorm statistics of only {images} images: use a smaller slice, a larger batch or "
            "--config.model.batch_norm.statistics=global."
        )
    share = memory / topology.chip.hbm_bytes
    if memory_is_compiled and share > _FULL:
        found.append(f"The memory is {100 * share:.0f} % full. Other versions of the compiler may not fit the step in.")
    if not memory_is_compiled and share > 1:
        found.append(
            f"A step may not fit: activations and state take at least {memory / 2**30:.0f} GiB of "
            f"{topology.chip.hbm_bytes / 2**30:.0f} GiB. Lower the batch, or raise config.accumulation_steps."
        )
    needed = images_per_second / IMAGES_PER_CORE
    distorts_colors = config.data.augmentation == "inception" and config.data.color_distortion
    if config.data.threads and images_per_second > IMAGES_PER_CORE * config.data.threads * hosts.count:
        found.append(
            f"Input needs at least {needed / hosts.count:,.0f} decoding threads on each host: leave "
            f"config.data.threads ({config.data.threads}) at 0."
        )
    if needed > hosts.cores:
        found.append(
            f"Input needs at least {needed:,.0f} cores, and the hosts have {hosts.cores:,}: the chips will wait."
            + (" --config.data.color_distortion=false halves the need." if distorts_colors else "")
        )
    if stop_seconds > _SPOT_SECONDS:
        found.append(
            f"A step and a checkpoint take up to {stop_seconds:.0f} s. Spot machines may not grant that after SIGTERM: "
            "set --config.checkpoint.every to what you can afford to lose."
        )
    return found


def checkpoint(num_bytes: int, bandwidth: float) -> dict[str, Any]:
    """Returns size and time of a checkpoint as plain data. One host writes it."""
    return {"bytes": num_bytes, "bandwidth": bandwidth, "seconds": num_bytes / bandwidth}
