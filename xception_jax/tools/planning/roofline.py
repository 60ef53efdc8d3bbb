"""Estimates the shortest and longest time of a training step from its arithmetic, memory traffic and communication.

This is a roofline model (Williams et al. 2009): a step takes as long as the slowest of the three. All three are assumed
to run at the speed of the data sheet. The interval covers two unknowns: how often activations go to memory, and whether
communication overlaps with computation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn

from xception_jax.models.layers import BatchNorm, Conv
from xception_jax.models.trace import trace_layers
from xception_jax.tools.planning.hlo import Collective
from xception_jax.tools.planning.topology import Topology

_HOP_SECONDS = 1e-6  # https://jax-ml.github.io/scaling-book/sharding: about one microsecond per hop
_SWITCH_SECONDS = 10e-6  # a small NCCL all-reduce within a node takes 10 to 20 microseconds


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Activations of one image, in values (not bytes).

    Attributes:
      read: values that convolutions and dense layers read in the forward pass.
      written: values that they write.
      normalised: outputs of BatchNorm.
      batch_norms: number of BatchNorm layers.
    """

    read: int
    written: int
    normalised: int
    batch_norms: int

    @property
    def fused(self) -> int:
        """Returns the values that a training step moves if all other operations are fused into convolutions.

        In the forward pass each convolution reads its input and writes its output. In the backward pass it reads its
        input and the gradient of its output once, for both of its gradients, and writes the gradient of its input.
        """
        return 3 * self.read + 2 * self.written

    @property
    def unfused(self) -> int:
        """Returns the values that a training step moves if convolution gradients and BatchNorm are not fused.

        BatchNorm moves each value eight times: sums (1) and normalisation (2) forward, sums (2) and gradient (3)
        backward. Pooling, residual sums and activations are still assumed to be fused.
        """
        return self.fused + self.written + 8 * self.normalised


def count_traffic(model: nn.Module, image_size: int) -> Traffic:
    """Counts the activations of a forward pass on one image, without running it."""
    read, written, normalised = [], [], []

    def visit(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(layer, Conv | nn.Dense):
            read.append(inputs.size)
            written.append(output.size)
        elif isinstance(layer, BatchNorm):
            normalised.append(output.size)

    trace_layers(model, image_size, visit)
    return Traffic(sum(read), sum(written), sum(normalised), len(normalised))


def communication_seconds(topology: Topology, collectives: dict[Collective, int]) -> float:
    """Returns the time of all collectives of a step in sequence: latency of the hops, then bytes over all links."""
    if topology.is_tpu:
        latency = _HOP_SECONDS * sum(side for side in topology.shape if side > 1)
    else:
        latency = _SWITCH_SECONDS * math.ceil(math.log(max(topology.size, 2), 8))
    several = {one: count for one, count in collectives.items() if one.devices > 1}
    return sum(count * (latency + one.bytes_sent / topology.bandwidth) for one, count in several.items())


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one chip. Pairs are (least, most).

    Attributes:
      compute: arithmetic at the peak speed of the chip.
      memory: activations, parameters and optimizer state to and from memory.
      communication: with other chips.
    """

    compute: float
    memory: tuple[float, float]
    communication: float

    @property
    def interval(self) -> tuple[float, float]:
        """Returns (least, most) seconds of the step: with communication fully overlapped, and not overlapped at all."""
        least, most = (max(self.compute, memory) for memory in self.memory)
        return max(least, self.communication), most + self.communication


def step_time(
    topology: Topology, *, flops: float, memory: tuple[float, float], collectives: dict[Collective, int], dtype: str
) -> StepTime:
    """Returns the time of a step.

    Args:
      topology: the chips that it runs on.
      flops: floating-point operations of one chip in one step.
      memory: (least, most) bytes that one chip moves in one step.
      collectives: collectives of one step, with their counts.
      dtype: dtype of the computation.
    """
    chip = topology.chip
    peak = chip.peak_flops * (1.0 if dtype == "bfloat16" else chip.float32_share)
    least, most = (num_bytes / chip.hbm_bandwidth for num_bytes in memory)
    return StepTime(flops / peak, (least, most), communication_seconds(topology, collectives))
