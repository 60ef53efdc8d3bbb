"""The process of one contestant: python -m benchmarks.worker CONTESTANT WORK, where WORK is JSON.

It takes a first step and writes a line of JSON: parameters, versions, cpu (seconds of processor time), peak_memory
(bytes). Then it waits: a line {"seconds": s} on standard input makes it work for about s seconds, and write how many
steps it took in how many seconds. It ends when standard input does. What libraries print goes to standard error.
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
    """Takes an untimed step, then others until `seconds` have passed, at least one.

    While a process waits, a virtual machine may give the memory that it has freed back to its host. To get it again is
    work that is not the contestant's: the untimed step does it.

    Returns steps, the seconds that they took, and cpu: seconds of processor time, of the untimed step too.
    """
    cpu = processor_time()
    step()
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start < seconds:
        step()
        steps += 1
    return {"steps": steps, "seconds": time.perf_counter() - start, "cpu": processor_time() - cpu}


def processor_time() -> float:
    """Returns the seconds that all cores have worked for this process and the compilers that it ran."""
    return sum(os.times()[:4])


def main() -> None:
    """Takes the first step, then works whenever it is asked to."""
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
