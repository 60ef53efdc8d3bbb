"""Builds the device mesh, and shards batches over all of its axes and parameters over `fsdp`."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xception_jax.config import MeshConfig
from xception_jax.errors import OUT_OF_DEVICE_MEMORY, ConfigError, DeviceMemoryError

AXES = ("data", "fsdp")
T = TypeVar("T")

DeviceBatch = dict[str, jax.Array]  # a global batch, sharded over the devices


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh (data, fsdp) of all devices. `data` spans TPU slices or GPU nodes if there are several.

    On GPUs, `fsdp` may be larger than the number of devices of a process, because there may be one process per GPU.

    The axes are Auto, because `nn.Dropout` cannot be traced with Explicit axes, the default of JAX.

    Args:
      mesh: `config.mesh`.
      devices: the devices of the mesh, by default all devices. May be devices to compile for that are not attached.

    Raises:
      ConfigError: the mesh does not fit the number of devices, or `fsdp` does not fit in a slice.
    """
    devices, fsdp = jax.devices() if devices is None else devices, mesh.fsdp
    data = size_of_data_axis(mesh, len(devices))
    check_slices(fsdp, devices)
    on_gpus = devices[0].platform == "gpu"
    islands = jax.process_count() if on_gpus else len({getattr(device, "slice_index", 0) for device in devices})
    if islands > 1 and data % islands == 0:
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // islands, fsdp), (islands, 1), devices, process_is_granule=on_gpus
        )
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return jax.make_mesh((data, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def size_of_data_axis(mesh: MeshConfig, devices: int) -> int:
    """Returns how many devices are along the batch.

    Raises:
      ConfigError: the mesh does not fit the number of devices.
    """
    data = devices // mesh.fsdp if mesh.data == -1 else mesh.data
    if data * mesh.fsdp != devices or data < 1:
        raise ConfigError(
            f"a mesh of data={mesh.data} x fsdp={mesh.fsdp} does not fit {devices} devices",
            "config.mesh",
            f"set data to -1 and fsdp to a divisor of {devices}, or make their product {devices}",
        )
    return data


def check_slices(fsdp: int, devices: Sequence[Any]) -> None:
    """Raises ConfigError if an axis of `fsdp` devices would reach from one slice into another.

    Each step would then gather the parameters over the network between the slices, which is slow.

    Args:
      fsdp: `config.mesh.fsdp`.
      devices: all devices. Those of TPUs have a `slice_index`.
    """
    sizes = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    fitting = math.gcd(*sizes.values())
    if len(sizes) == 1 or fitting % fsdp == 0:
        return
    nearest = min((size for size in range(1, fitting + 1) if fitting % size == 0), key=lambda size: abs(size - fsdp))
    raise ConfigError(
        f"fsdp={fsdp} does not fit in a slice: there are {len(sizes)} slices with {fitting} devices each",
        "config.mesh.fsdp",
        f"set it to the nearest value that fits, {nearest}",
    )


def check_batch(name: str, batch_size: int, devices: int, parts: int = 1) -> None:
    """Raises ConfigError unless batch_size is divisible by devices * parts."""
    unit = devices * parts
    if batch_size % unit:
        nearest = max(unit, round(batch_size / unit) * unit)
        raise ConfigError(
            f"{name}={batch_size} is not divisible by {devices} devices"
            + (f" x {parts} microbatches" if parts > 1 else ""),
            name,
            f"set it to the nearest valid size, {nearest}",
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, whose first axis is sharded over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """Returns the sharding of each leaf: over `fsdp` along its largest divisible axis, otherwise replicated."""
    fsdp = mesh.shape["fsdp"]

    def leaf_sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        divisible = [(size, axis) for axis, size in enumerate(leaf.shape) if size % fsdp == 0 and size >= fsdp]
        if fsdp == 1 or not divisible:
            return NamedSharding(mesh, PartitionSpec())
        axis = max(divisible)[1]
        return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))

    return jax.tree.map(leaf_sharding, tree)


def gathered(tree: T) -> T:
    """Gathers sharded parameters on every device of the ambient mesh before they are used.

    Without this constraint, XLA may move activations between devices, which are larger than the parameters.
    """
    if jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def to_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Builds a global batch from the local batches of all processes."""
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}


def whole(leaf: Any) -> np.ndarray:
    """Returns an array on the host. If it is sharded over processes, this is a collective that all must call."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        replicated = leaf.is_fully_replicated
        leaf = leaf.addressable_data(0) if replicated else multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


@contextlib.contextmanager
def device_memory_errors(what: str, where: str, fix: str) -> Iterator[None]:
    """Raises a DeviceMemoryError if something does not fit into the memory of a device.

    Args:
      what: the computation, such as 'the training step'.
      where: the fields that decide its size, with their values.
      fix: what the user can do.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if OUT_OF_DEVICE_MEMORY not in str(error):
            raise
        raise DeviceMemoryError(f"{what} does not fit into the memory of a device", where, fix) from error


def bytes_from_primary(content: bytes) -> bytes:
    """Returns the bytes of process 0 on every process. A collective."""
    if jax.process_count() == 1:
        return content
    count = from_primary(len(content))
    buffer = np.zeros(max(count, 1), np.uint8)
    if jax.process_index() == 0:
        buffer[:count] = np.frombuffer(content, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer)))[:count]


def from_primary(value: int) -> int:
    """Returns the value of process 0, such as a step or a length, on every process. A collective."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else value
