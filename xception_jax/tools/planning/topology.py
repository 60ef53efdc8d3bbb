"""A topology by its name, such as v5e:16x16 or h100:8, and the devices that stand for it in a program."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, MutableMapping
from typing import Any

from xception_jax.errors import InputMissingError, UsageError
from xception_jax.tools.planning.chips import CHIPS, NODE, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind and how they are connected.

    Attributes:
      name: such as 'v5e:16x16'.
      chip: its data sheet.
      shape: chips along each axis of the torus; one number for GPUs.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu can compile for it."""
        return self.chip.axes > 0

    @property
    def bandwidth(self) -> float:
        """Bytes a second that one chip sends to the others, over all links that such a slice can use.

        An axis whose ends are linked counts two links, a shorter one a single link: its end chips have no other. GPUs
        on several nodes are as fast as their network.
        """
        if not self.is_tpu:
            return self.chip.network_bandwidth if self.size > NODE else self.chip.links * self.chip.link_bandwidth
        links = sum(2 if side % self.chip.wrap == 0 else 1 for side in self.shape if side > 1)
        return links * self.chip.link_bandwidth

    def devices(self) -> list[Any]:
        """Returns devices that programs can be compiled for, but not run on.

        `prepare_environment` must have been called before JAX was first used.

        Raises:
          InputMissingError: libtpu is not installed.
          UsageError: there is no such slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            import jax

            raise InputMissingError(
                "libtpu is not installed: it compiles for TPUs, on any x86 machine with Linux",
                "the Python environment",
                f"pip install 'jax[tpu]=={jax.__version__}', or -r requirements-plan.txt in an environment of its own",
            )
        from jax.experimental import topologies

        kinds: dict[str, Any] = {}
        if self.chip is CHIPS["v4"]:
            kinds["chip_config_name"] = "megacore"  # without it each of a chip's two cores is a device
        sides = (*self.shape, 1, 1)[:3]
        hosts = (math.gcd(sides[0], 2), math.gcd(sides[1], 2), 1)
        try:
            return topologies.get_topology_desc(
                platform="tpu", topology_name=self.name, chips_per_host_bounds=hosts, **kinds
            ).devices
        except Exception as error:  # JaxRuntimeError, or whatever a libtpu of another version raises
            reason = str(error).splitlines()[0]
            raise UsageError(f"libtpu knows no such slice: {reason}", f"--topology={self.name}", _EXAMPLES) from None


_EXAMPLES = "name one such as v5e:16x16, v6e:8x8, v4:4x4x4, v5p:4x4x4, a100:8, h100:8"


def parse_topology(name: str) -> Topology:
    """Returns the topology of a name.

    Raises:
      UsageError: no such chip, or not a shape that it comes in.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(match[1]) if match else None
    if match is None or chip is None:
        raise UsageError(f"there is no topology {name!r}", "--topology", _EXAMPLES)
    shape = tuple(map(int, match[2].split("x")))
    shapes, fits = _SHAPES[chip.axes]
    if len(shape) != max(1, chip.axes) or not fits(shape):
        raise UsageError(f"{match[1]} comes in {shapes}, not {match[2]}", f"--topology={name}", _EXAMPLES)
    return Topology(name, chip, shape)


# By axes of the torus: the shapes of slices in words, and whether there is such a one; see the sources of the chips.
_SHAPES: dict[int, tuple[str, Callable[[tuple[int, ...]], bool]]] = {
    0: ("any number of chips from 1", lambda shape: shape[0] > 0),
    2: (
        "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 and 16x16",
        lambda shape: shape in {(1, 1)} | {(a, b) for a in (2, 4, 8, 16) for b in (a, 2 * a) if b <= 16},
    ),
    3: (
        "2x2x1, 2x2x2, 2x2x4, 2x4x4 and multiples of four such as 4x4x8",
        lambda shape: (
            shape in {(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)} or all(side and side % 4 == 0 for side in shape)
        ),
    ),
}


def prepare_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keeps libtpu from looking for a TPU, and JAX from starting one. To be called before JAX is first used."""
    environment.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",  # it asks the cloud's metadata server otherwise, and waits for an answer
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",  # any: it only complains if there is none
        TPU_WORKER_HOSTNAMES="localhost",
        XCEPTION_JAX_CPU_KERNELS="0",  # what a CPU would run is traced and dropped
    )
