"""Trains a network: python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

A config is a Python file, and it is run. Any field of it is overridden on the command line:
--config.batch_size=64 --config.model.segments=4. The same command again resumes the run.
Exit codes: 0 done, 75 stopped by a signal and resumable; all of them are in docs/reliability.md.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from xception_jax.command_line import field_help, parse_flags, run_main
from xception_jax.config import resolve
from xception_jax.errors import UsageError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a file of configs/, with ':variant' if it has variants.\n" + field_help()
)
WORKDIR = flags.DEFINE_string("workdir", None, "directory of config.json, metrics.jsonl, checkpoints/ and report.html")


def main(argv: list[str]) -> None:
    """Trains what the flags say."""
    if len(argv) > 1:
        raise UsageError(f"unexpected argument {argv[1]!r}", " ".join(argv), "every flag is --name=value; see --help")
    config, workdir = CONFIG.value, WORKDIR.value
    if config is None or workdir is None:
        missing = "config" if config is None else "workdir"
        raise UsageError(f"--{missing} is missing", "the command line", str(__doc__).splitlines()[0])

    logging.set_verbosity(logging.WARNING)  # libraries tell much about themselves at INFO
    resolve(config)  # a mistake in it shows before JAX is imported, which takes seconds
    from xception_jax.training.loop import train

    print(train(config, workdir))


if __name__ == "__main__":
    run_main(lambda: app.run(main, flags_parser=parse_flags))
