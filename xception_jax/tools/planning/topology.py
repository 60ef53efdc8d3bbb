"""Parses topologies such as v5e:16x16 or h100:8, and makes the devices that a program is compiled for."""

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
    """Chips of one kind and their connections.

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
        """Returns the number of chips."""
        return math.prod(self.shape)

    @property
    def is_tpu(self) -> bool:
        """Returns whether the chips are TPUs, which libtpu compiles for."""
        return self.chip.axes > 0

    @property
    def bandwidth(self) -> float:
        """Returns the bytes per second that one chip sends to the others, over all links that the slice can use.

        An axis with linked ends has two usable links. A shorter axis has one, because the chips at its ends have no
        other. In three dimensions, the ends are linked if all sides are long enough. GPUs on several nodes are limited
        by the network.
        """
        if not self.is_tpu:
            return self.chip.network_bandwidth if self.size > NODE else self.chip.links * self.chip.link_bandwidth
        wraps = [side % self.chip.wrap == 0 for side in self.shape]
        if len(wraps) > 2:
            wraps = [all(wraps)] * len(wraps)
        links = sum(1 + wrap for side, wrap in zip(self.shape, wraps, strict=True) if side > 1)
        return links * self.chip.link_bandwidth

    def devices(self) -> list[Any]:
        """Returns devices that programs can be compiled for, but not run on.

        Call `prepare_environment` before JAX is first used.

        Raises:
          InputMissingError: libtpu is not installed.
          UsageError: libtpu does not know the slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            import jax

            raise InputMissingError(
                "libtpu is not installed; it compiles for TPUs on any x86 machine with Linux",
                "the Python environment",
                f"pip install 'jax[tpu]=={jax.__version__}', best in a separate environment",
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
        except Exception as error:  # JaxRuntimeError; other versions of libtpu raise others
            reason = str(error).splitlines()[0]
            what = f"libtpu does not know this slice: {reason}"
            raise UsageError(what, f"--topology={self.name}", _EXAMPLES) from None


_EXAMPLES = "name one such as v5e:16x16, v6e:8x8, v4:4x4x4, v5p:4x4x4, a100:8, h100:8"


def parse_topology(name: str) -> Topology:
    """Returns the topology with a name such as 'v5e:16x16'.

    Raises:
      UsageError: the chip is unknown, or is not available in this shape.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(match[1]) if match else None
    if match is None or chip is None:
        raise UsageError(f"there is no topology {name!r}", "--topology", _EXAMPLES)
    shape = tuple(map(int, match[2].split("x")))
    shapes, fits = _SHAPES[chip.axes]
    if len(shape) != max(1, chip.axes) or not fits(shape):
        raise UsageError(f"{match[1]} is available in {shapes}, not in {match[2]}", f"--topology={name}", _EXAMPLES)
    return Topology(name, chip, shape)


# By number of axes: the available shapes in words, and a predicate. Sources: see chips.py.
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
    """Prevents libtpu from searching for TPUs and JAX from starting them. Call it before JAX is first used."""
    environment.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",  # otherwise libtpu queries the metadata server of the cloud and waits for an answer
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",  # any value: libtpu only complains if it is missing
        TPU_WORKER_HOSTNAMES="localhost",
        XCEPTION_JAX_CPU_KERNELS="0",  # the CPU branch is traced but not compiled
    )
