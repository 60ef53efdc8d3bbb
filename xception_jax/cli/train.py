"""`xception-jax train`: trains a network, or resumes a run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from absl import logging

from xception_jax.command_line import field_help, read_config
from xception_jax.config import resolve
from xception_jax.config.shipped import shipped_names
from xception_jax.environment import program
from xception_jax.errors import UsageError
from xception_jax.launchers import may_have_peers
from xception_jax.names import in_shell
from xception_jax.storage import checkpoint_directory, is_url, open_store
from xception_jax.training.workdir import check_workdir

EXAMPLES = """\
examples:
  xception-jax train --config=fashion_mnist --workdir=runs/fashion_mnist
  xception-jax train --config=imagenet:inception_v3 --workdir=runs/inception_v3 --config.batch_size=512
  xception-jax train --config=my_config.py --workdir=runs/mine

The same command resumes a run that was stopped. The exit code is 0 if the run has finished, and 75 if a signal stopped
it after a save.

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Trains a network as described by a config, and writes checkpoints, metrics and a report."
    parser.epilog = EXAMPLES + field_help()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s --config=NAME --workdir=DIR [--config.FIELD=VALUE ...]"
    parser.add_argument(
        "--config",
        metavar="NAME",
        help=f"{', '.join(shipped_names())}, or your own .py file, which is executed; ':VARIANT' may follow",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="directory for config.json, metrics.jsonl, checkpoints/ and report.html, also gs://BUCKET/PATH",
    )


def run(args: argparse.Namespace) -> int:
    """Trains a network and prints the results.

    Raises:
      UserError: see `xception_jax.training.train.train`.
    """
    for name in ("config", "workdir"):
        if getattr(args, name) is None:
            fix = "xception-jax train --config=fashion_mnist --workdir=runs/fashion_mnist"
            raise UsageError(f"--{name} is missing", "the command line", fix)
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)  # libraries log too much at INFO
    config = resolve(read_config(args.config, args.overrides))
    address = checkpoint_directory(args.workdir, "--workdir")
    if is_url(address):
        open_store(address, "--workdir")
    else:
        on_tpu = importlib.util.find_spec("libtpu") is not None
        check_workdir(Path(address), alone=not may_have_peers(config.distributed, os.environ, on_tpu=on_tpu))
    # Mistakes in the arguments are reported before JAX is imported.
    from xception_jax.logs.console import announce

    with announce("loading JAX"):
        import jax

        from xception_jax.training.train import train

    summary = train(config, args.workdir)
    print(summary, flush=True)
    if jax.process_index() == 0:
        workdir = in_shell(summary.report.parent)
        report = in_shell(summary.report)
        opened = f"gcloud storage cp {report} ." if is_url(address) else f"open {report} in a browser"
        print(
            f"next:\n  {opened}",
            f"  {program()} predict --weights {workdir} PHOTO.jpg",
            f"  {program()} evaluate {workdir}",
            sep="\n",
            file=sys.stderr,
        )
    return 0
