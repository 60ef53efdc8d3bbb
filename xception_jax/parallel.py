"""Processes, devices and shardings: the batch over all axes of the mesh, parameters over `fsdp`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xception_jax.config import DistributedConfig, MeshConfig
from xception_jax.errors import ConfigError

AXES = ("data", "fsdp")
T = TypeVar("T")

DeviceBatch = dict[str, jax.Array]  # a global batch, sharded over the devices

# Environment variables by which a cluster says that this process is one of several; jax then finds the others.
_CLUSTER = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES", "JAX_NUM_PROCESSES")


def start_distributed(distributed: DistributedConfig) -> None:
    """Joins the other processes of this run; a run that is alone stays alone.

    With `config.distributed.coordinator` the config says who takes part. Otherwise a TPU pod, Slurm or MPI does.
    """
    if distributed.coordinator:
        jax.distributed.initialize(distributed.coordinator, distributed.num_processes, distributed.process_id)
        return
    tasks = any(os.environ.get(name, "1") not in ("", "1") for name in _CLUSTER)
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if tasks or pod:
        jax.distributed.initialize()


def check_processes() -> None:
    """Raises ConfigError if this process is one of several that do not know of each other.

    On the hosts of a TPU slice JAX counts all of them, also where nothing has connected them.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"this is process {jax.process_index()} of {jax.process_count()}, but they are not connected",
            "config.distributed",
            "set config.distributed.coordinator=HOST:PORT, num_processes and process_id on every host",
        )


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh (data, fsdp) of all devices; on several TPU slices or GPU nodes, `data` goes across them.

    The axes are Auto: with the Explicit ones that jax makes by default, `nn.Dropout` does not trace.

    Args:
      mesh: `config.mesh`.
      devices: others than this machine's, to compile for.

    Raises:
      ConfigError: the mesh needs another number of devices than there are.
    """
    devices, fsdp = jax.devices() if devices is None else devices, mesh.fsdp
    data = len(devices) // fsdp if mesh.data == -1 else mesh.data
    if data * fsdp != len(devices) or data < 1:
        raise ConfigError(
            f"a mesh of data={mesh.data} x fsdp={fsdp} does not fit {len(devices)} devices",
            "config.mesh",
            f"set data to -1 and fsdp to a divisor of {len(devices)}, or make their product {len(devices)}",
        )
    on_gpus = devices[0].platform == "gpu"
    islands = jax.process_count() if on_gpus else len({getattr(device, "slice_index", 0) for device in devices})
    if islands > 1 and data % islands == 0:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // islands, fsdp), (islands, 1), devices, process_is_granule=on_gpus
        )
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_batch(name: str, batch_size: int, devices: int, parts: int = 1) -> None:
    """Raises ConfigError, naming the nearest that does, unless batch_size / parts is divisible by the devices."""
    unit = devices * parts
    if batch_size % unit:
        nearest = max(unit, round(batch_size / unit) * unit)
        raise ConfigError(
            f"config.{name}={batch_size} is not divisible by {devices} devices"
            + (f" x {parts} microbatches" if parts > 1 else ""),
            f"config.{name}",
            f"the nearest that is: {nearest}",
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of each leaf: over `fsdp` along the largest axis that it divides, else replicated."""
    fsdp = mesh.shape["fsdp"]

    def leaf_sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [(size, axis) for axis, size in enumerate(leaf.shape) if size % fsdp == 0 and size >= fsdp]
        if fsdp == 1 or not divisible:
            return NamedSharding(mesh, PartitionSpec())
        axis = max(divisible)[1]
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

    return jax.tree.map(leaf_sharding, tree)


def gathered(tree: T) -> T:
    """Gathers sharded parameters on each device of the ambient mesh, to compute with them.

    With a kernel that is sharded along its channels, XLA's partitioner would send activations around instead.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def to_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Returns the global batch, of which each process holds the part in `batch`."""
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}
