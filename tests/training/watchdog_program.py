"""A main thread that is stuck in C, watched by a watchdog. Arguments: the work directory, and what it does first."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from xception_jax.config import WatchdogConfig
from xception_jax.logs.console import Throughput
from xception_jax.logs.goodput import EVALUATION, INPUT, SAVING, STEPS, Stopwatch
from xception_jax.training.run_directory import RunDirectory
from xception_jax.training.watchdog import Watchdog

LIMIT = 2

workdir, moment = Path(sys.argv[1]), sys.argv[2]
stopwatch, throughput = Stopwatch(time.monotonic()), Throughput(1)
with Watchdog(WatchdogConfig(factor=20, min_seconds=LIMIT), stopwatch, throughput, RunDirectory(str(workdir), workdir)):
    time.sleep(1.5 * LIMIT)  # compiling
    with stopwatch.during(STEPS):
        for step in range(0 if moment == "first" else 3):
            time.sleep(0.05)
            throughput.mark(step)
            stopwatch.step_ended(step)
        for activity in (EVALUATION, SAVING):
            with stopwatch.during(activity):
                time.sleep(1.5 * LIMIT)
        if moment == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
            print("goes on", flush=True)
        with stopwatch.during(INPUT):
            print("stuck", flush=True)
            # PyDLL keeps the global lock during the call, CDLL releases it.
            (ctypes.PyDLL if moment == "holding" else ctypes.CDLL)(None).sleep(600)
