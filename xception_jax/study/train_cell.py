"""Trains one cell of a study from the config.json in its work directory.

    python -m xception_jax.study.train_cell WORKDIR [--cores 0,1] [--end-with-stdin] [--activations]

The runner of a study starts each cell with this command, and so can you. It is the ordinary training program and
resumes like it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from xception_jax.environment import use_cores
from xception_jax.process import run_program


def main() -> None:
    """Trains the cell and prints the result.

    Raises:
      InputMissingError: there is no config.json.
      UserError: as for training.
    """
    # Imported when signals are handled, see `run_program`.
    from absl import logging

    from xception_jax.command_line import Parser
    from xception_jax.config import load_config
    from xception_jax.errors import InputMissingError

    parser = Parser(prog="python -m xception_jax.study.train_cell", description=__doc__)
    parser.add_argument("workdir", type=Path, help="a work directory with config.json")
    parser.add_argument("--cores", help="CPU cores to run on, such as 0,1; by default all")
    parser.add_argument("--end-with-stdin", action="store_true", help="save and end when standard input is closed")
    parser.add_argument(
        "--activations",
        action="store_true",
        help="measure, at the end, what enters the activations between convolutions",
    )
    args = parser.parse_args()
    if args.end_with_stdin:
        threading.Thread(target=_stop_at_end_of_input, name="runner", daemon=True).start()
    if args.cores is not None:  # before JAX is imported: it starts as many threads as there are cores
        use_cores({int(core) for core in args.cores.split(",")})
    path = args.workdir / "config.json"
    if not path.exists():
        fix = "name the work directory of a cell, such as cells/ARM/seed0"
        raise InputMissingError("there is no config.json", str(args.workdir), fix)
    config = load_config(path)

    logging.set_verbosity(logging.WARNING)
    from xception_jax.training.train import train

    print(train(config, str(args.workdir)))
    if args.activations:
        from xception_jax.study.activations import write_activations

        write_activations(args.workdir)


def _stop_at_end_of_input() -> None:
    """Stops the cell, as SIGTERM does, once the runner at the other end of the pipe has died in any way.

    Without a runner, no process would record how the cell ends. PR_SET_PDEATHSIG is no alternative: the kernel sends
    that signal once for each thread of the runner, and the second one ends a run without a save.
    """
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run_program(main, resumable=True)
