"""Measures a case: each contestant has its own process, and they take turns while the others wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cases import CONTESTANTS, Case

ROOT = Path(__file__).parent.parent
# Not inherited: a cache could have programs of an earlier process, and each contestant sets the other variables.
_NOT_INHERITED = ("JAX_COMPILATION_CACHE_DIR", "GLIBC_TUNABLES", "XLA_FLAGS")


class WorkerError(Exception):
    """A contestant failed. The message is the end of its log."""


class Worker:
    """The process of a contestant, started by the constructor. Use it as a context manager.

    Args:
      name: name of the contestant.
      work: the work of the case.
      python: the interpreter that runs the contestant.
      environment: additional environment variables.
    """

    def __init__(self, name: str, work: dict[str, Any], python: str, environment: dict[str, str] | None = None):
        self._scratch = tempfile.TemporaryDirectory()
        self._log = Path(self._scratch.name, "log")
        variables = CONTESTANTS[name].environment | (environment or {})
        variables = {key: value.format(scratch=self._scratch.name) for key, value in variables.items()}
        inherited = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        self._start = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.worker", name, json.dumps(work)],
                cwd=ROOT,
                env=inherited | {"PYTHONPATH": str(ROOT)} | quiet | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> Worker:
        """Returns itself."""
        return self

    def __exit__(self, *error) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()

    def first_step(self) -> dict[str, Any]:
        """Returns the answer of the worker after its first step, and `start`, the seconds since the process started."""
        return self._answer() | {"start": time.perf_counter() - self._start}

    def work(self, seconds: float) -> dict[str, Any]:
        """Lets the worker work for about `seconds`. Returns its steps, seconds, cpu and peak_memory."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"seconds": seconds}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = [text.strip() for text in self._log.read_text().splitlines() if text.strip()][-3:]
            raise WorkerError(f"exit code {self._process.returncode}: " + " | ".join(last)[-500:])
        return json.loads(line)


def measure(
    case: Case,
    peers: str,
    repeats: int,
    seconds: float,
    say: Callable[[str], None],
    directory: str,
    environment: dict[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Measures a case in rounds.

    Args:
      case: the case.
      peers: the interpreter of the peers' environment.
      repeats: number of rounds.
      seconds: working time of a contestant per round.
      say: called with lines about the progress.
      directory: directory with JPEG files for the input pipelines.
      environment: additional environment variables for all contestants.

    Returns:
      By contestant: samples by measure (one per round), versions, and an error if it failed. The sample `others` is the
      share of all cores that other processes on this machine took.
    """
    work = case.work | {"cores": len(os.sched_getaffinity(0)), "directory": directory}
    results: dict[str, dict[str, Any]] = {name: {"samples": {}, "versions": {}} for name in case.contestants}
    workers: dict[str, Worker] = {}

    def start(name: str) -> dict[str, Any]:
        workers[name] = Worker(name, work, peers if CONTESTANTS[name].is_peer else sys.executable, environment)
        first = workers[name].first_step()
        if case.parameters is not None and first["parameters"] != case.parameters:
            raise WorkerError(f"the network has {first['parameters']:,} parameters, not {case.parameters:,}")
        results[name]["versions"] = first["versions"]
        return first

    def one_round(name: str) -> dict[str, float]:
        wall, busy = time.perf_counter(), _busy_seconds()
        answer = start(name) if case.fresh else workers[name].work(seconds)
        others = _busy_seconds() - busy - answer["cpu"]
        share = max(0.0, others / (time.perf_counter() - wall) / work["cores"])
        if case.fresh:
            _end(workers, name)
            return {"start": answer["start"], "memory": answer["peak_memory"] / 1e9, "others": share}
        return {"rate": answer["steps"] * work["batch"] / answer["seconds"], "others": share}

    def attempt(name: str, action: Callable[[str], dict[str, float]]) -> dict[str, Any]:
        if "error" in results[name]:
            return {}
        try:
            return action(name)
        except (WorkerError, BrokenPipeError) as error:
            results[name]["error"] = str(error)
            say(f"  {CONTESTANTS[name].title} FAILED: {error}")
            _end(workers, name)
            return {}

    try:
        for name in [] if case.fresh else case.contestants:
            first = attempt(name, start)
            if first:
                say(f"  {CONTESTANTS[name].title}: first step after {first['start']:.0f} s")
        for i in range(repeats):
            # The starting contestant rotates.
            for name in case.contestants[i % len(case.contestants) :] + case.contestants[: i % len(case.contestants)]:
                sample = attempt(name, one_round)
                for quantity, value in sample.items():
                    results[name]["samples"].setdefault(quantity, []).append(value)
                shown = ", ".join(f"{quantity} {value:.3g}" for quantity, value in sample.items())
                say(f"  round {i + 1}/{repeats}, {CONTESTANTS[name].title}: {shown or 'failed'}")
    finally:
        for name in list(workers):
            _end(workers, name)
    return results


def _busy_seconds() -> float:
    """Returns the seconds that all cores together have been busy, or stolen by another virtual machine."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _end(workers: dict[str, Worker], name: str) -> None:
    if name in workers:
        workers.pop(name).__exit__()
