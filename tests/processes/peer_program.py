"""One of several processes, which adds numbers with the others until it is stopped. Arguments: fields of the config."""

import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xception_jax.config import DistributedConfig
from xception_jax.processes import connected

coordinator, count, number, timeout, heartbeat = sys.argv[1:]
config = DistributedConfig("on", coordinator, int(count), int(number), int(timeout), int(heartbeat))
with connected(config, "the work directory"):
    sharding = NamedSharding(Mesh(jax.devices(), "all"), PartitionSpec("all"))
    ones = jax.make_array_from_process_local_data(sharding, jnp.ones(1))
    add = jax.jit(jnp.sum)
    for step in range(1000):
        assert float(add(ones)) == int(count)
        if step == 3:
            print("working", flush=True)
        time.sleep(0.1)
