"""The commands: python -m xception_jax <command> --help."""

from __future__ import annotations

import sys
from importlib import import_module

from xception_jax.command_line import Parser, run_main

# Command: (module with add_arguments(parser) and run(args) -> exit code, what it does). Imported when it is asked for.
COMMANDS = {
    "prepare": ("xception_jax.data.prepare.command", "write a dataset in the form that training reads"),
    "predict": ("xception_jax.evaluation.predict", "name the classes of images"),
    "evaluate": ("xception_jax.evaluation.command", "evaluate a network on a split, exactly"),
    "export": ("xception_jax.export.command", "a network as StableHLO, ONNX or safetensors, checked, with its card"),
    "convert": ("xception_jax.weights.command", "weights of Keras or timm to ours, and back"),
    "study": ("xception_jax.study.command", "compare networks over seeds: run a study, report it"),
    "plan": ("xception_jax.hardware.command", "memory, time and cost of a run on chips that are not here"),
}


def main() -> int:
    """Runs the command that the arguments name."""
    parser = Parser(prog="python -m xception_jax", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        if name in sys.argv[1:2]:
            import_module(module).add_arguments(subparser)
    args, overrides = parser.parse_known_args()
    unknown = [argument for argument in overrides if "config" not in args or not argument.startswith("--config.")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides = overrides
    return import_module(COMMANDS[args.command][0]).run(args)


if __name__ == "__main__":
    run_main(main)
