"""Describes the hosts of a slice, and how to start a run on them with the files of launch/."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence

from xception_jax.tools.planning.chips import NODE
from xception_jax.tools.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a slice.

    Attributes:
      count: number of hosts.
      chips: number of chips of each host.
      vcpus: virtual CPUs of each host. Two of them share a core.
      machine: where the figure comes from.
    """

    count: int
    chips: int
    vcpus: int
    machine: str

    @property
    def cores(self) -> int:
        """Returns the CPU cores of all hosts together."""
        return self.count * self.vcpus // 2


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a cloud offers a chip.

    Attributes:
      vcpus: virtual CPUs by chips of a host.
      machine: machine types, with `{chips}` for the chips of a host.
      accelerator: accelerator type of a Cloud TPU VM, with `{chips}` or `{cores}` of the slice.
      runtime: its runtime version.
      node: label of a node in Google Kubernetes Engine.
    """

    vcpus: dict[int, int]
    machine: str
    accelerator: str = ""
    runtime: str = ""
    node: str = ""


# By the name of a chip. Sources: https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e;
# https://docs.cloud.google.com/compute/docs/gpus
_KINDS = {
    "v4": _Kind({4: 240}, "ct4p-hightpu-{chips}t", "v4-{cores}", "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": _Kind(
        {1: 24, 4: 112, 8: 224},
        "ct5lp-hightpu-{chips}t",
        "v5litepod-{chips}",
        "v2-alpha-tpuv5-lite",
        "tpu-v5-lite-podslice",
    ),
    "v5p": _Kind({4: 208}, "ct5p-hightpu-{chips}t", "v5p-{cores}", "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": _Kind({1: 44, 4: 180, 8: 180}, "ct6e-standard-{chips}t", "v6e-{chips}", "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "a100": _Kind({NODE: 96}, "a2-ultragpu-{chips}g"),
    "h100": _Kind({NODE: 208}, "a3-highgpu-{chips}g"),
}
_SKYPILOT = {"a100": "A100-80GB", "h100": "H100"}
_CHIPS_OF_A_HOST = 4  # in a TPU slice with several hosts


def hosts_of(topology: Topology) -> Hosts:
    """Returns the hosts of a slice. A part of a node with GPUs is taken to have its share of the CPUs."""
    kind, size = _KINDS[_chip(topology)], topology.size
    if topology.is_tpu:
        chips = size if size in kind.vcpus else _CHIPS_OF_A_HOST
        return Hosts(size // chips, chips, kind.vcpus[chips], kind.machine.format(chips=chips))
    count = next(count for count in range(-(-size // NODE), size + 1) if size % count == 0)
    chips = size // count
    return Hosts(count, chips, kind.vcpus[NODE] * chips // NODE, kind.machine.format(chips=NODE))


def launch_commands(topology: Topology, config: str, overrides: Sequence[str]) -> list[str]:
    """Returns the ways to start a run with the files of launch/, one per line.

    Args:
      topology: the chips.
      config: name of the config.
      overrides: `--config.FIELD=VALUE`.
    """
    kind, hosts = _KINDS[_chip(topology)], hosts_of(topology)
    fields = shlex.join(overrides)
    config = shlex.quote(config)
    if topology.is_tpu:
        accelerator = kind.accelerator.format(chips=topology.size, cores=2 * topology.size)
        shape = topology.name.partition(":")[2]
        commands = [
            f"ZONE=ZONE TYPE={accelerator} RUNTIME={kind.runtime} CONFIG={config} WORKDIR=gs://BUCKET/RUN "
            f"bash launch/tpu_vm.sh {fields}",
            f"kubectl apply --filename=launch/jobset.yaml  # with {kind.node}, {shape}, parallelism: {hosts.count}, "
            f"google.com/tpu: {hosts.chips}, --config={config} {fields}",
        ]
    elif hosts.count == 1:
        commands = [f"CONFIG={config} WORKDIR=DIRECTORY bash launch/one_node.sh {fields}"]
    else:
        slurm = f"--nodes={hosts.count} --gpus-per-node={hosts.chips}"
        gpus = f"{_SKYPILOT[_chip(topology)]}:{hosts.chips}"
        sky = f"--num-nodes={hosts.count} --gpus={gpus} --env=CONFIG={config}"
        sky_fields = f"--env={shlex.quote(f'ARGS={fields}')}" if fields else ""
        commands = [
            f"CONFIG={config} WORKDIR=SHARED_DIRECTORY sbatch {slurm} launch/slurm.sh {fields}",
            f"sky jobs launch launch/skypilot.yaml {sky} --env=WORKDIR=gs://BUCKET/RUN "
            f"--env=DATA_SOURCE=gs://BUCKET/DATA {sky_fields}",
        ]
    return [command.strip() for command in commands]


def _chip(topology: Topology) -> str:
    return topology.name.partition(":")[0]
