"""Runs a command: python -m xception_jax <command> --help."""

from xception_jax.cli import main
from xception_jax.command_line import run_main

if __name__ == "__main__":
    run_main(main)
