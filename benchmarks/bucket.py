"""Compares training into a bucket with training into a directory, in turn: python -m benchmarks.bucket --help.

The bucket is on the server of the tests, which runs in this process, on the same machine. So this measures what our
side of a run in a bucket costs: copies, digests, requests and the lease. `--latency` delays every request.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.storage.gcs_objects import Objects
from tests.storage.gcs_requests import Fault
from tests.storage.gcs_server import GcsServer
from xception_jax.logs.goodput import INPUT, SAVING, START, STEPS, from_entry

BUCKET = "bucket"


def train(workdir: str, arguments: list[str], environment: dict[str, str]) -> float:
    """Runs `train` and returns its wall time in seconds.

    Raises:
      SystemExit: the run failed.
    """
    command = [sys.executable, "-m", "xception_jax", "train", f"--workdir={workdir}", *arguments]
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
    return time.monotonic() - began


def figures(metrics: bytes, wall: float) -> dict[str, float]:
    """Returns the figures of a run: the text of its metrics.jsonl, and its wall time in seconds."""
    last = json.loads(metrics.splitlines()[-1])
    spent = from_entry(last)
    if spent is None:
        raise ValueError("metrics.jsonl has no times")
    return {
        "start to first step, s": spent[START],
        "steps/s, saves not counted": last["step"] / (spent[STEPS] + spent[INPUT]),
        "steps blocked by saves, s": spent[SAVING],
        "all, s": wall,
    }


def main() -> None:
    """Trains in turn, and prints medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds that each request waits")
    parser.add_argument(
        "arguments",
        nargs="*",
        default=["--config=fashion_mnist", "--config.duration=4 epochs", "--config.checkpoint.every=100 steps"],
        help="of train, after --",
    )
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"directory": [], "bucket": []}
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as directory:
            wall = train(f"{directory}/run", args.arguments, {})
            found["directory"].append(figures(Path(directory, "run", "metrics.jsonl").read_bytes(), wall))
        with GcsServer(Objects([BUCKET]), lambda request: Fault(delay=args.latency)) as server:
            wall = train(f"gs://{BUCKET}/run", args.arguments, server.environment())
            metrics = server.objects.get(BUCKET, "run/metrics.jsonl", {}).content
            found["bucket"].append(figures(metrics, wall))
        print(f"round {number + 1} of {args.rounds}", {name: runs[-1] for name, runs in found.items()}, file=sys.stderr)
    print("| | directory | bucket | median of bucket / directory in a round |\n|---|---|---|---|")
    for figure in found["bucket"][0]:
        cells = [[run[figure] for run in runs] for runs in found.values()]
        shown = [f"{median(values):.3g} ({min(values):.3g} to {max(values):.3g})" for values in cells]
        ratio = median(bucket / directory for directory, bucket in zip(*cells, strict=True))
        print(f"| {figure} | {' | '.join(shown)} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
