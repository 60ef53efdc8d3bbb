"""Measures training and inference of Xception at 299 x 299 in bfloat16 on an accelerator, ours and timm.

    python -m benchmarks.accelerator --batch=256
    python -m benchmarks.accelerator --peers=.venv-peers/bin/python     # an interpreter with torch for CUDA and timm

Each measurement runs in its own process, one after the other, on a batch that stays on the device, without input
pipeline or checkpoints. Parameters and BatchNorm statistics are float32 everywhere. Prints one line of JSON per
measurement: milliseconds per step (median, minimum and maximum of ten), images/s, seconds from the start of the process
to the end of the first step, and peak memory of the device.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

STARTED = time.perf_counter()
STEPS = 10
WORKS = ("ours train", "ours infer", "timm train", "timm infer")


def ours(kind: str, batch: int, model: dict) -> tuple[Callable[[], object], Callable[[], int]]:
    """Returns a function that runs one step and waits for it, and a function that returns the peak memory in bytes."""
    import jax
    import jax.numpy as jnp

    from benchmarks.contestants import ours
    from xception_jax.config import default_config
    from xception_jax.models import create_model

    def memory() -> int:
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)

    work = {"network": "xception", "size": 299, "batch": batch, "kind": "train"}
    fields = {"dtype": "bfloat16"} | model
    if kind == "train":
        return ours.prepare(work | {"model": fields}, {})[0], memory
    config = default_config().model
    config.update_from_flattened_dict(fields)
    network = create_model(config)
    images = jax.random.uniform(jax.random.key(0), (batch, 299, 299, 3), minval=-1.0)
    variables = jax.jit(lambda key: network.init(key, jnp.zeros((1, 299, 299, 3))))(jax.random.key(1))
    apply = jax.jit(lambda variables, images: network.apply(variables, images)[0])
    return lambda: apply(variables, images).block_until_ready(), memory


def timm(kind: str, batch: int, model: dict) -> tuple[Callable[[], object], Callable[[], int]]:
    """Same as `ours` for timm's legacy_xception: eager, channels_last, autocast and autotuned cuDNN algorithms."""
    import timm
    import torch
    import torch.nn.functional as F

    if model:
        raise SystemExit("timm does not support --model")
    torch.backends.cudnn.benchmark = True
    network = timm.create_model("legacy_xception").cuda().to(memory_format=torch.channels_last).train(kind == "train")
    images = torch.randn(batch, 3, 299, 299, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device="cuda")
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, fused=True)

    def step():
        with torch.set_grad_enabled(kind == "train"), torch.autocast("cuda", torch.bfloat16):
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
        if kind == "train":
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.cuda.synchronize()

    return step, torch.cuda.max_memory_allocated


def measure(work: str, batch: int, model: dict) -> dict:
    """Runs steps in this process and returns the measurements."""
    contestant, kind = work.split()
    step, memory = {"ours": ours, "timm": timm}[contestant](kind, batch, model)
    step()
    first = time.perf_counter() - STARTED
    seconds = []
    for number in range(2 + STEPS):
        start = time.perf_counter()
        step()
        if number >= 2:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "work": work,
        "batch": batch,
        "model": model,
        "milliseconds": [round(1e3 * value, 2) for value in (median, min(seconds), max(seconds))],
        "images_per_second": round(batch / median, 1),
        "first_step_seconds": round(first, 1),
        "peak_memory_gib": round(memory() / 2**30, 2),
    }


def main() -> None:
    """Runs every measurement in its own process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batch", type=int, default=256, help="images per step (default: 256)")
    parser.add_argument("--peers", default=sys.executable, help="Python interpreter with timm (default: this one)")
    parser.add_argument(
        "--model", type=json.loads, default={}, help="fields of config.model, such as '{\"segments\": 4}'"
    )
    parser.add_argument("--work", choices=WORKS, help="run only this measurement, in this process")
    args = parser.parse_args()
    if args.work:
        print(json.dumps(measure(args.work, args.batch, args.model)))
        return
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ  # to measure the memory that is used
    for work in WORKS if not args.model else WORKS[:2]:
        interpreter = args.peers if work.startswith("timm") else sys.executable
        command = [interpreter, "-m", "benchmarks.accelerator", f"--batch={args.batch}", f"--work={work}"]
        subprocess.run([*command, f"--model={json.dumps(args.model)}"], env=environment, check=False)


if __name__ == "__main__":
    main()
