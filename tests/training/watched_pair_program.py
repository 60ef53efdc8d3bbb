"""One of two watched processes that add numbers together. Arguments: coordinator, number, work directory.

Process 1 is busy with a save for longer than the watchdog of process 0 waits, and process 0 waits for it.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xception_jax.config import DistributedConfig, WatchdogConfig
from xception_jax.logs.console import Throughput
from xception_jax.logs.goodput import SAVING, STEPS, Stopwatch
from xception_jax.processes import connected
from xception_jax.training.run_directory import RunDirectory
from xception_jax.training.watchdog import Watchdog

LIMIT = 3

coordinator, number, workdir = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
with connected(DistributedConfig("on", coordinator, 2, number, 60, heartbeat=600), str(workdir)):
    sharding = NamedSharding(Mesh(jax.devices(), "all"), PartitionSpec("all"))
    ones = jax.make_array_from_process_local_data(sharding, jnp.ones(1))
    add = jax.jit(jnp.sum)
    stopwatch, throughput = Stopwatch(time.monotonic()), Throughput(1)
    watchdog = Watchdog(WatchdogConfig(20, LIMIT), stopwatch, throughput, RunDirectory(str(workdir), workdir))
    with watchdog, stopwatch.during(STEPS):
        for step in range(100_000):
            if (step, number) == (5, 1):
                with stopwatch.during(SAVING):
                    time.sleep(2.5 * LIMIT)
            assert float(add(ones)) == 2
            throughput.mark(step)
            stopwatch.step_ended(step)
            if step == 8:
                print("working", flush=True)
            time.sleep(0.05)
