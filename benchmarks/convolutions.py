"""Times every convolution of a network in isolation: its value, and the gradients of its input and kernel.

    python -m benchmarks.convolutions --config=configs/fashion_mnist.py
    python -m benchmarks.convolutions --config=configs/imagenet.py --config.model.dtype=float32 --config.batch_size=8
    XCEPTION_JAX_CPU_KERNELS=0 python -m benchmarks.convolutions --config=configs/fashion_mnist.py     # in plain JAX

Each one is a separate program with its inputs in memory. A time is the median of its calls. GFLOP/s includes products
with padding.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from xception_jax import ops
from xception_jax.command_line import Parser, read_config, run_main
from xception_jax.config import ExperimentConfig, resolve
from xception_jax.models import create_model
from xception_jax.models.layers import Conv
from xception_jax.models.trace import trace_layers
from xception_jax.ops.padding import Padding, explicit_padding, output_size

KINDS = ("value", "input gradient", "kernel gradient")


class Convolution(NamedTuple):
    """The arguments of `ops.conv`, with the shapes of x and the kernel."""

    x: tuple[int, ...]
    kernel: tuple[int, ...]
    segments: int
    stride: int
    padding: Padding

    @property
    def flops(self) -> int:
        """FLOP of the value, and also of each gradient."""
        pads = explicit_padding(self.padding, self.x[1:3], self.kernel[:2], self.stride)
        pixels = self.x[0] * math.prod(output_size(self.x[1:3], self.kernel[:2], self.stride, pads))
        return 2 * pixels * math.prod(self.kernel)


def find_convolutions(config: ExperimentConfig) -> Counter[Convolution]:
    """Counts the convolutions of a training step, grouped by their arguments."""
    found: Counter[Convolution] = Counter()

    def visit(layer, images, output):
        if isinstance(layer, Conv):
            x = (config.batch_size, *images.shape[1:])
            kernel: tuple[int, ...] = layer.get_variable("params", "kernel").shape
            found[Convolution(x, kernel, layer.segments, layer.stride, layer.padding)] += 1

    trace_layers(create_model(config.model), config.data.image_size, visit)
    return found


def measure(convolution: Convolution, dtype: str, seconds: float) -> dict[str, float]:
    """Returns the time of each of `KINDS`, in milliseconds."""
    x = jax.random.normal(jax.random.key(0), convolution.x, dtype)
    kernel = jax.random.normal(jax.random.key(1), convolution.kernel, dtype)
    _, _, segments, stride, padding = convolution
    conv = partial(ops.conv, segments=segments, stride=stride, padding=padding)
    value = jax.jit(conv)
    dy = value(x, kernel)

    def gradient(argument: int) -> Callable:
        return jax.jit(lambda x, kernel, dy: jax.vjp(conv, x, kernel)[1](dy)[argument])

    calls = (partial(value, x, kernel), partial(gradient(0), x, kernel, dy), partial(gradient(1), x, kernel, dy))
    return {kind: 1e3 * median_seconds(call, seconds) for kind, call in zip(KINDS, calls, strict=True)}


def median_seconds(call: Callable[[], jax.Array], seconds: float) -> float:
    """Returns the median time of a call, over at least `seconds` and three calls, after two warm-up calls."""
    for _ in range(2):
        call().block_until_ready()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        call().block_until_ready()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def row(title: str, milliseconds: dict[str, float], flops: float) -> str:
    """Formats a line of the table."""
    times = "".join(f"{ms:12.3f} ms {flops / ms / 1e6:6.0f} GFLOP/s" for ms in milliseconds.values())
    return f"{title:64}{times}"


def main() -> None:
    """Measures all convolutions, and prints a line for each of them and for their sum."""
    parser = Parser(prog="python -m benchmarks.convolutions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, help="config as for train.py, with overrides --config.FIELD=VALUE")
    parser.add_argument("--seconds", type=float, default=0.3, help="seconds per measurement (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the times as JSON")
    args, overrides = parser.parse_known_args()
    config = resolve(read_config(args.config, overrides))

    results: list[dict[str, Any]] = []
    say = partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    say(f"{'calls per step, x, kernel, segments, stride, padding':64}" + "".join(f"{kind:>30}" for kind in KINDS))
    for convolution, count in find_convolutions(config).items():
        milliseconds = measure(convolution, config.model.dtype, args.seconds)
        sides = ["x".join(map(str, shape)) for shape in (convolution.x, convolution.kernel)]
        title = " ".join(map(str, (*sides, *convolution[2:])))
        say(row(f"{count:3} x {title}", milliseconds, convolution.flops))
        results.append(
            {"count": count} | convolution._asdict() | {"milliseconds": milliseconds, "flops": convolution.flops}
        )
    total = {kind: sum(r["count"] * r["milliseconds"][kind] for r in results) for kind in KINDS}
    say(row("sum of a step", total, sum(r["count"] * r["flops"] for r in results)))
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    run_main(main)
