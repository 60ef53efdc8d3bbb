"""Runs a command: `xception-jax COMMAND --help` or `python -m xception_jax COMMAND --help`."""

import sys

from xception_jax.environment import restart_with_allocator


def start() -> None:
    """Runs the command given by the arguments and exits with its code: the entry point of all programs."""
    if {"train", "explain"}.intersection(sys.argv[1:2]):  # they compute gradients
        restart_with_allocator()
    # After the restart, which takes as long as what was imported before.
    from xception_jax.cli import main
    from xception_jax.command_line import run_main

    run_main(main)


if __name__ == "__main__":
    start()
