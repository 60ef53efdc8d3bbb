"""Measures how time and memory of our training step grow along one axis, in a separate process for each point."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from benchmarks.cases import SMALL, XCEPTION
from benchmarks.rounds import Worker, WorkerError

_TRAIN = XCEPTION | {"kind": "train"}

# By axis: the work at each value.
AXES: dict[str, dict[Any, dict[str, Any]]] = {
    "batch": {n: _TRAIN | {"size": 71, "batch": n} for n in (1, 2, 4, 8, 16, 32, 64)},
    "size": {n: _TRAIN | {"size": n, "batch": 2} for n in (71, 107, 149, 224, 299, 384, 512)},
    "segments": {n: SMALL | {"model": {"segments": n}} for n in (1, 2, 4, 8, 16, "depthwise")},
    "devices": {n: SMALL | {"devices": n} for n in (1, 2, 4, 8)},
}


def measure_growth(seconds: float, say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Returns the points of each axis: value, seconds per step, memory (GB). Failed points are reported and skipped."""
    points: dict[str, list[dict[str, Any]]] = {}
    for axis, works in AXES.items():
        points[axis] = []
        for value, work in works.items():
            flags = f"--xla_force_host_platform_device_count={work.get('devices', 1)}"
            try:
                with Worker("ours", work, sys.executable, {"XLA_FLAGS": flags}) as worker:
                    worker.first_step()
                    block = worker.work(seconds)
            except WorkerError as error:
                say(f"  {axis} {value} FAILED: {error}")
                continue
            point = {"seconds": block["seconds"] / block["steps"], "memory": block["peak_memory"] / 1e9}
            say(f"  {axis} {value}: {point['seconds']:.3g} s per step, {point['memory']:.3g} GB")
            points[axis].append({"value": value} | point)
    return points
