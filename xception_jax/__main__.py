"""Runs a command: `xception-jax COMMAND --help` or `python -m xception_jax COMMAND --help`."""

import sys

from xception_jax.environment import restart_with_allocator


def start() -> None:
    """Runs the command given by the arguments and exits with its code: the entry point of all programs."""
    command = sys.argv[1:2]
    if {"train", "explain"}.intersection(command) or sys.argv[1:3] == ["study", "run"]:  # they compute gradients
        restart_with_allocator()
    # After the restart, which takes as long as what was imported before.
    from xception_jax.process import run_program

    run_program(_run, resumable=command == ["train"])


def _run() -> None:
    from xception_jax.cli import main
    from xception_jax.command_line import run_main

    run_main(main)


if __name__ == "__main__":
    start()
