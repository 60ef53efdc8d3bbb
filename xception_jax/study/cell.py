"""One cell of a study in a process of its own: trains what config.json of a work directory describes.

    python -m xception_jax.study.cell WORKDIR [--cores 0,1] [--parent PID]

It is the ordinary training program, and resumes like it. The runner starts it; a person may, too.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
from pathlib import Path

from absl import logging

from xception_jax.command_line import run_main
from xception_jax.config import load_json
from xception_jax.errors import InputMissingError

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Trains, and prints what came out."""
    parser = argparse.ArgumentParser(prog="python -m xception_jax.study.cell", description=__doc__)
    parser.add_argument("workdir", type=Path, help="a directory with config.json")
    parser.add_argument("--cores", help="the only CPU cores to run on, such as 0,1")
    parser.add_argument("--parent", type=int, help="process whose death ends this one after its step, with a save")
    args = parser.parse_args()
    if args.parent is not None:
        _stop_with(args.parent)
    if args.cores is not None:  # before JAX is imported, which makes as many threads as it may use
        os.sched_setaffinity(0, {int(core) for core in args.cores.split(",")})
    try:
        config = load_json((args.workdir / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputMissingError(
            "there is no config.json", str(args.workdir), "give a directory that a study has made"
        ) from None

    logging.set_verbosity(logging.WARNING)
    from xception_jax.training.loop import train

    print(train(config, str(args.workdir)))


def _stop_with(parent: int) -> None:
    """Lets the kernel send SIGTERM when the runner dies, in whatever way: nobody would note how this cell ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run_main(main)
