"""Runs `train` until it stalls, as on a file server that does not answer. The other arguments are those of `train`.

The last argument is train:N or evaluation:N, to stall in the Nth batch, or report. The program then prints `stalled`,
and goes on when the file named by the variable GO appears.
"""

import os
import sys
import time

from xception_jax.process import run_program

kind, _, number = sys.argv.pop().partition(":")
sys.argv.insert(1, "train")


def stall() -> None:
    print("stalled", flush=True)
    while not os.path.exists(os.environ["GO"]):
        time.sleep(0.05)


def patch() -> None:
    from xception_jax.data import pipeline
    from xception_jax.data.loading import BatchLoader
    from xception_jax.training import summary

    pipeline._PREFETCHED_BATCHES = 1  # as many threads read batches, and two of them do not always begin in order
    read, write, counts = BatchLoader.__call__, summary.summarize_run, {"train": 0, "evaluation": 0}

    def stalling_read(self, *arguments, **options):
        of = "evaluation" if self._seed is None else "train"
        counts[of] += 1
        if of == kind and counts[of] == int(number):
            stall()
        return read(self, *arguments, **options)

    def stalling_write(*arguments, **options):
        if kind == "report":
            stall()
        return write(*arguments, **options)

    BatchLoader.__call__, summary.summarize_run = stalling_read, stalling_write


def main() -> None:
    from xception_jax.cli import main
    from xception_jax.command_line import run_main

    patch()
    run_main(main)


run_program(main, resumable=True)
