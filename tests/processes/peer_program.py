"""One of several processes, which adds numbers with the others until it is stopped. Arguments: fields of the config.

SIGUSR1 makes it abort, as a failed check of a library does. SIGUSR2 lets a file server fail.
"""

import errno
import os
import signal
import sys

from xception_jax.process import run_program


def main() -> None:
    import time

    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from xception_jax.config import DistributedConfig
    from xception_jax.processes import connected

    coordinator, count, number, timeout, heartbeat = sys.argv[1:]
    config = DistributedConfig(
        "on" if coordinator else "off", coordinator, *map(int, (count, number, timeout, heartbeat))
    )
    with connected(config, "the work directory"):
        sharding = NamedSharding(Mesh(jax.devices(), "all"), PartitionSpec("all"))
        ones = jax.make_array_from_process_local_data(sharding, jnp.ones(1))
        add = jax.jit(jnp.sum)
        for step in range(1000):
            if disk_fails:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "images")
            assert float(add(ones)) == int(count)
            if step == 3:
                print("working", flush=True)
            time.sleep(0.1)


disk_fails: list[int] = []
signal.signal(signal.SIGUSR1, lambda *_: os.abort())
signal.signal(signal.SIGUSR2, lambda signum, _: disk_fails.append(signum))
run_program(main, resumable=True)
