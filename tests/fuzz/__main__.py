"""Fuzzes the readers of files from strangers: `make fuzz SECONDS=600`. See docs/reference/security.md.

Every target runs for `--seconds` in a process of its own, which is started again after a crash. `.fuzz/TARGET` keeps
the inputs that reached new code, from which the next run starts, and the finds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.kernels import KERNELS, build_kernels, kernel_seeds
from tests.fuzz.targets import REGRESSIONS, TARGETS

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / ".fuzz"
LIMITS = (
    "-timeout=60",
    "-report_slow_units=60",
    "-rss_limit_mb=3072",
    "-use_value_profile=1",
    "-print_final_stats=0",
    "-verbosity=1",
)
MOST_CRASHES = 10

_STATISTICS = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)/")


class Result(NamedTuple):
    """Holds the results of a target: executions, covered edges, size of its corpus, and finds."""

    executions: int
    coverage: int
    corpus: int
    finds: list[Path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzzes the targets, prints a table, and returns 1 if there is a find."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzes the readers of strangers' files.")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--target", choices=(*TARGETS, KERNELS), help="one target (default: all)")
    args = parser.parse_args(arguments)
    chosen = [args.target] if args.target else [*TARGETS, KERNELS]
    print(f"{'target':14} {'executions':>11} {'per second':>11} {'coverage':>9} {'corpus':>7} {'finds':>6}", flush=True)
    finds: list[Path] = []
    for name in chosen:
        try:
            result = fuzz(name, args.seconds)
        except RuntimeError as reason:
            print(f"{name:14} skipped: {reason}", flush=True)
            continue
        rate = result.executions / args.seconds
        numbers = f"{result.executions:11,} {rate:11,.0f} {result.coverage:9,} {result.corpus:7,} {len(result.finds):6}"
        print(f"{name:14} {numbers}", flush=True)
        finds += result.finds
    for path in finds:
        print(f"find: {path.relative_to(ROOT)}")
    if finds:
        print(f"correct the reader, then move each file to {REGRESSIONS.relative_to(ROOT)}/TARGET")
    return 1 if finds else 0


def fuzz(name: str, seconds: int) -> Result:
    """Fuzzes a target for some seconds.

    Raises:
      RuntimeError: it cannot run here; the message says why.
    """
    finds, corpus, seeds = (DIRECTORY / name / part for part in ("finds", "corpus", "seeds"))
    shutil.rmtree(seeds, ignore_errors=True)
    for directory in (finds, corpus, seeds):
        directory.mkdir(parents=True, exist_ok=True)
    words = DIRECTORY / name / "words"
    if name == KERNELS:
        command, inputs_of, longest = [str(build_kernels(DIRECTORY / name))], kernel_seeds, 64
        words.write_text("")
    else:
        target = TARGETS[name]
        command, inputs_of, longest = _python(name, finds), target.seeds, target.longest
        words.write_text("".join(f'"{_quoted(word)}"\n' for word in target.words))
    for label, data in inputs_of().items():
        (seeds / label).write_bytes(data)
    inputs = [str(path) for path in (corpus, seeds, REGRESSIONS / name) if path.is_dir()]
    executions = coverage = size = 0
    deadline = time.monotonic() + seconds
    for _ in range(MOST_CRASHES):
        left = round(deadline - time.monotonic())
        if left < 1:
            break
        options = [*LIMITS, f"-max_total_time={left}", f"-max_len={longest}", f"-artifact_prefix={finds}/"]
        options += [f"-dict={words}"] if words.stat().st_size else []
        done = _run([*command, *options, *inputs], left)
        found = [tuple(map(int, match)) for match in _STATISTICS.findall(done)]
        if not found:
            raise RuntimeError(f"it did not start: {' '.join(done.split())[-300:]}")
        executions += found[-1][0]
        coverage, size = max(coverage, found[-1][1]), found[-1][3]
    return Result(executions, coverage, size, sorted(finds.iterdir()))


def _python(name: str, finds: Path) -> list[str]:
    try:
        import atheris  # noqa: F401
    except ImportError:
        raise RuntimeError("Atheris is not installed; `make fuzz` sets up .venv-fuzz with it") from None
    return [sys.executable, "-m", "tests.fuzz.fuzz_target", name, str(finds)]


def _run(command: Sequence[str], seconds: int) -> str:
    """Runs libFuzzer and returns what it printed. A process that does not even end by its own limits is killed."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            return process.communicate(timeout=seconds + 120)[0]
        except BaseException as error:
            process.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return process.communicate()[0]


def _quoted(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"')


if __name__ == "__main__":
    sys.exit(main())
