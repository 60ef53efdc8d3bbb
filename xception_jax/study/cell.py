"""One cell of a study in a process of its own: trains what config.json of a work directory describes.

    python -m xception_jax.study.cell WORKDIR [--cores 0,1] [--end-with-stdin]

It is the ordinary training program, and resumes like it. The runner starts it; a person may, too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from absl import logging

from xception_jax.command_line import Parser, run_main
from xception_jax.config import from_json
from xception_jax.errors import InputMissingError


def main() -> None:
    """Trains, and prints what came out."""
    parser = Parser(prog="python -m xception_jax.study.cell", description=__doc__)
    parser.add_argument("workdir", type=Path, help="a directory with config.json")
    parser.add_argument("--cores", help="the only CPU cores to run on, such as 0,1")
    parser.add_argument("--end-with-stdin", action="store_true", help="save and end when standard input is closed")
    args = parser.parse_args()
    if args.end_with_stdin:
        threading.Thread(target=_stop_at_end_of_input, name="runner", daemon=True).start()
    if args.cores is not None:  # before JAX is imported, which makes as many threads as it may use
        os.sched_setaffinity(0, {int(core) for core in args.cores.split(",")})
    try:
        config = from_json((args.workdir / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputMissingError(
            "there is no config.json", str(args.workdir), "give a directory that a study has made"
        ) from None

    logging.set_verbosity(logging.WARNING)
    from xception_jax.training.loop import train

    print(train(config, str(args.workdir)))


def _stop_at_end_of_input() -> None:
    """Stops like on SIGTERM when the runner, which holds the other end, dies in whatever way.

    Nobody would note how this cell ends. The kernel's own PR_SET_PDEATHSIG will not do: it comes once for each thread
    of the runner, and the second signal ends a run without a save.
    """
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run_main(main)
