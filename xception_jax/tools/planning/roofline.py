"""How long a training step takes at best and at worst, from what it must compute, move and send.

A roofline (Williams et al. 2009): a step takes as long as the slowest of arithmetic, memory and communication. Both
ends of the interval assume that each of the three runs at the speed of the data sheet; what is uncertain is how often
an activation travels to memory, and whether communication is hidden behind computing.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn

from xception_jax.models.layers import BatchNorm, Conv
from xception_jax.models.trace import trace_layers
from xception_jax.tools.planning.hlo import Collective
from xception_jax.tools.planning.topology import Topology

_HOP_SECONDS = 1e-6  # https://jax-ml.github.io/scaling-book/sharding: about a microsecond for each hop
_SWITCH_SECONDS = 10e-6  # a small NCCL all-reduce within a node takes 10 to 20 microseconds


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Activations of one image, in values (not bytes).

    Attributes:
      read, written: by convolutions and dense layers in the forward pass.
      normalised: by BatchNorm.
      batch_norms: BatchNorm layers.
    """

    read: int
    written: int
    normalised: int
    batch_norms: int

    @property
    def fused(self) -> int:
        """Values that a training step moves when everything else happens on the way in or out of a convolution.

        Forward each convolution reads its input and writes its output. Backward it reads its input and its output's
        gradient, once for both of its gradients, and writes its input's gradient.
        """
        return 3 * self.read + 2 * self.written

    @property
    def unfused(self) -> int:
        """The same when the two gradients of a convolution, and each pass of BatchNorm, go to memory on their own.

        BatchNorm forward: sums (1), normalise (2); backward: sums (2), gradient (3). Pooling, sums of residuals and
        activations are taken as part of their neighbours.
        """
        return self.fused + self.written + 8 * self.normalised


def count_traffic(model: nn.Module, image_size: int) -> Traffic:
    """Traces a forward pass on one image, without computing it."""
    read, written, normalised = [], [], []

    def visit(layer, inputs, output):
        if isinstance(layer, Conv | nn.Dense):
            read.append(inputs.size)
            written.append(output.size)
        elif isinstance(layer, BatchNorm):
            normalised.append(output.size)

    trace_layers(model, image_size, visit)
    return Traffic(sum(read), sum(written), sum(normalised), len(normalised))


def communication_seconds(topology: Topology, collectives: dict[Collective, int]) -> float:
    """Returns the time of all collectives of a step, one after the other: hops, then bytes over all links."""
    if topology.is_tpu:
        latency = _HOP_SECONDS * sum(side for side in topology.shape if side > 1)
    else:
        latency = _SWITCH_SECONDS * math.ceil(math.log(max(topology.size, 2), 8))
    return sum(count * (latency + one.bytes_sent / topology.bandwidth) for one, count in collectives.items())


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one chip; each pair is (least, most).

    Attributes:
      compute: arithmetic at the peak of the chip.
      memory: activations, parameters and optimiser state to and from memory.
      communication: hidden behind computing as far as that lasts, or not at all.
    """

    compute: float
    memory: tuple[float, float]
    communication: float

    @property
    def interval(self) -> tuple[float, float]:
        """(least, most) seconds of the step."""
        least, most = (max(self.compute, memory) for memory in self.memory)
        return max(least, self.communication), most + self.communication


def step_time(
    topology: Topology, *, flops: float, memory: tuple[float, float], collectives: dict[Collective, int], dtype: str
) -> StepTime:
    """Returns the time of a step.

    Args:
      topology: where it runs.
      flops: of one chip and step.
      memory: (least, most) bytes that a chip moves in a step.
      collectives: of a step, and how often each takes place.
      dtype: of the computation.
    """
    chip = topology.chip
    peak = chip.peak_flops * (1.0 if dtype == "bfloat16" else chip.float32_share)
    least, most = (num_bytes / chip.hbm_bandwidth for num_bytes in memory)
    return StepTime(flops / peak, (least, most), communication_seconds(topology, collectives))
