"""Runs the commands of `xception-jax`, one thin module each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from xception_jax import __version__
from xception_jax.command_line import Parser, refuse_empty, split_overrides, with_home
from xception_jax.config import FIELDS
from xception_jax.environment import program
from xception_jax.errors import UsageError, exit_code_meanings

# Each command is a module of this package with `add_arguments(parser)`, and `run(args)`, which returns the exit code.
# It is imported only if its command is called.
COMMANDS = {
    "train": "train a network, or resume its training",
    "prepare": "write a dataset in the format that training reads",
    "predict": "predict the classes of images",
    "evaluate": "evaluate a network on every image of a split",
    "explain": "show which parts of an image support a class",
    "embed": "save the features of images",
    "probe": "evaluate saved features with nearest neighbours and ridge regression",
    "export": "write a network as StableHLO, ONNX or safetensors, check it, and add a model card",
    "weights": "list, download and verify public weights by name",
    "convert": "convert weights between this package, Keras and timm",
    "study": "compare networks over several seeds: run and report a study",
    "plan": "estimate memory, time and cost of a run on accelerators you do not have",
}


def main() -> int:
    """Runs the command given by the arguments."""
    args = parse(sys.argv[1:])
    return import_module(f"xception_jax.cli.{args.command}").run(args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line. Overrides of config fields, `--config.FIELD=VALUE`, are in `overrides`, still as text.

    Raises:
      UsageError: it is not valid.
    """
    codes = "\n".join(f"  {code:3}  {meaning}" for code, meaning in exit_code_meanings().items())
    parser = Parser(
        prog=program(),
        description="Xception and Inception V3 in JAX.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xception_jax {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    arguments, overrides = split_overrides(argv)
    refuse_empty(arguments)
    arguments = with_home(arguments)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if name in arguments[:1]:
            import_module(f"xception_jax.cli.{name}").add_arguments(subparser)
    args, unknown = parser.parse_known_args(arguments)
    if "config" not in args:
        unknown += overrides
    if unknown:
        subparser, what = subparsers.choices[args.command], f"unrecognized arguments: {' '.join(unknown)}"
        name = unknown[0].partition("=")[0].removeprefix("--")
        fields = [name] if name in FIELDS else [field for field in FIELDS if field.endswith(f".{name}")]
        if fields and "config" in args:
            meant = " or ".join(f"--config.{field}" for field in fields[:3])
            raise UsageError(what, subparser.prog, f"did you mean {meant}?")
        subparser.error(what)
    args.overrides = overrides
    return args
