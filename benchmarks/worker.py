"""Runs one contestant: python -m benchmarks.worker CONTESTANT WORK, where WORK is JSON.

After the first step, it writes a line of JSON with parameters, versions, cpu (seconds of processor time) and
peak_memory (bytes). For each line {"seconds": s} on standard input, it works for about s seconds and writes a line with
steps, seconds, cpu and peak_memory. It ends when standard input ends. Output of libraries goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable

from benchmarks.cases import CONTESTANTS
from xception_jax.environment import installed_versions, peak_memory

PACKAGES = (
    "flax", "grain", "jax", "jaxlib", "keras", "opencv-python-headless", "simplejpeg", "tensorflow-cpu", "timm",
    "torch",
)  # fmt: skip


def work_for(step: Callable[[], object], seconds: float) -> dict[str, float]:
    """Runs an untimed step, then at least one step until `seconds` have passed.

    While a process waits, a virtual machine may return freed memory to its host. The untimed step requests it again, so
    that this does not count as work of the contestant.

    Returns steps, their seconds, and cpu: seconds of processor time, including the untimed step.
    """
    cpu = processor_time()
    step()
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start < seconds:
        step()
        steps += 1
    return {"steps": steps, "seconds": time.perf_counter() - start, "cpu": processor_time() - cpu}


def processor_time() -> float:
    """Returns the processor time in seconds of this process and its children, such as compilers."""
    return sum(os.times()[:4])


def main() -> None:
    """Runs the first step, then works on request."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields):
        print(json.dumps(fields), file=answers, flush=True)

    contestant = CONTESTANTS[sys.argv[1]]
    module = importlib.import_module(f"benchmarks.contestants.{contestant.module}")
    step, parameters = module.prepare(json.loads(sys.argv[2]), contestant.options)
    step()
    versions = {"python": sys.version.split()[0]} | installed_versions(PACKAGES)
    answer(parameters=parameters, versions=versions, cpu=processor_time(), peak_memory=peak_memory())
    for line in sys.stdin:
        block = work_for(step, json.loads(line)["seconds"])
        answer(**block, peak_memory=peak_memory())


if __name__ == "__main__":
    main()
