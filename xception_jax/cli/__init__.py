"""The commands of `python -m xception_jax`, a thin file each."""

from __future__ import annotations

import sys
from importlib import import_module

from xception_jax.command_line import Parser

# Each is a module of this package with `add_arguments(parser)` and `run(args)`, which returns the exit code. It is
# imported only when its command is called.
COMMANDS = {
    "prepare": "write a dataset in the form that training reads",
    "predict": "name the classes of images",
    "evaluate": "evaluate a network on a split, exactly",
    "export": "write a network as StableHLO, ONNX or safetensors, checked, with a model card",
    "convert": "convert weights from Keras or timm, and back to Keras",
    "study": "compare networks over seeds: run a study, report it",
    "plan": "estimate memory, time and cost of a run on accelerators you do not have",
}


def main() -> int:
    """Runs the command that the arguments name."""
    parser = Parser(prog="python -m xception_jax", description="Xception and Inception V3 in JAX.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if name in sys.argv[1:2]:
            import_module(f"xception_jax.cli.{name}").add_arguments(subparser)
    args, overrides = parser.parse_known_args()
    unknown = [argument for argument in overrides if "config" not in args or not argument.startswith("--config.")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides = overrides
    return import_module(f"xception_jax.cli.{args.command}").run(args)
