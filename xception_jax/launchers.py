"""Reads the environment variables with which launchers say that they started several processes. Needs no JAX."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping

from xception_jax.config import DistributedConfig

SKYPILOT_PORT = 8476


def _counts_several(value: str) -> bool:
    return value.isdigit() and int(value) > 1


def _lists_several(value: str) -> bool:
    return "," in value


SIGNS: dict[str, Callable[[str], bool]] = {
    "SLURM_NTASKS": _counts_several,
    "OMPI_COMM_WORLD_SIZE": _counts_several,
    "PMI_SIZE": _counts_several,
    "MEGASCALE_NUM_SLICES": _counts_several,
    "JAX_NUM_PROCESSES": _counts_several,
    "SKYPILOT_NUM_NODES": _counts_several,
    "TPU_WORKER_HOSTNAMES": _lists_several,
    "TPU_PROCESS_ADDRESSES": _lists_several,
    "JAX_COORDINATOR_ADDRESS": bool,
}
"""Whether the value of an environment variable says that there are several processes."""


def several_processes(environment: Mapping[str, str]) -> str:
    """Returns the environment variable, with its value, that says that there are several processes, or ''."""
    return next((f"{name}={environment[name]}" for name, says in SIGNS.items() if says(environment.get(name, ""))), "")


def may_have_peers(distributed: DistributedConfig, environment: Mapping[str, str], *, on_tpu: bool) -> bool:
    """Returns whether this process may be one of several of the same run.

    Args:
      distributed: `config.distributed`.
      environment: the environment variables.
      on_tpu: whether there may be TPUs. The hosts of a slice find each other without a variable.
    """
    if distributed.start == "off":
        return False
    return bool(distributed.coordinator or several_processes(environment)) or on_tpu


def from_environment(environment: Mapping[str, str]) -> dict[str, str | int]:
    """Returns arguments of `jax.distributed.initialize` that JAX does not read from the environment itself."""
    if addresses := environment.get("SKYPILOT_NODE_IPS", "").split():
        return {
            "coordinator_address": f"{addresses[0]}:{SKYPILOT_PORT}",
            "num_processes": len(addresses),
            "process_id": int(environment["SKYPILOT_NODE_RANK"]),
        }
    names = {
        "num_processes": ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"),  # JAX does not detect Open MPI 5
        "process_id": ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK"),
    }
    if "JAX_COORDINATOR_ADDRESS" not in environment:
        return {}
    found = {key: next((environment[n] for n in options if environment.get(n)), "") for key, options in names.items()}
    return {key: int(value) for key, value in found.items() if value}


def gpus_of_task(environment: Mapping[str, str], devices: str = "/dev/nvidia[0-9]*") -> list[int] | None:
    """Returns the GPUs of a task of Slurm or Open MPI that is the only one on its node: all of them.

    JAX would take one GPU for each task. Returns None where JAX's own choice is right, or the user has made one.

    Args:
      environment: the environment variables.
      devices: pattern of the devices of this node, which count where no variable does.
    """
    nodes = environment.get("SLURM_STEP_NUM_NODES", "")
    alone = bool(nodes) and environment.get("SLURM_STEP_NUM_TASKS") == nodes
    if environment.get("JAX_LOCAL_DEVICE_IDS") or not (alone or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    on_node = environment.get("SLURM_GPUS_ON_NODE", "") if alone else str(len(glob.glob(devices)))
    count = len(visible.split(",")) if visible else int(on_node) if on_node.isdigit() else 0
    return list(range(count)) if count > 1 else None
