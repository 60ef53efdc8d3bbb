"""Trains a network: python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

A config is a Python file that is executed. Any field can be overridden on the command line:
--config.batch_size=64 --config.model.segments=4. Running the same command again resumes the run.
Exit codes: 0 if the run has finished, 75 if it was stopped by a signal. docs/reliability.md lists all of them.
"""

from absl import app, flags, logging
from ml_collections import config_flags

from xception_jax.command_line import field_help, parse_flags, run_main
from xception_jax.config import resolve
from xception_jax.errors import UsageError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "a config file such as those in configs/, with ':variant' if it has variants.\n" + field_help()
)
WORKDIR = flags.DEFINE_string("workdir", None, "directory for config.json, metrics.jsonl, checkpoints/ and report.html")


def main(argv: list[str]) -> None:
    """Trains a network as specified by the flags."""
    if len(argv) > 1:
        raise UsageError(f"unexpected argument {argv[1]!r}", " ".join(argv), "write flags as --name=value; see --help")
    config, workdir = CONFIG.value, WORKDIR.value
    if config is None or workdir is None:
        missing = "config" if config is None else "workdir"
        raise UsageError(f"--{missing} is missing", "the command line", str(__doc__).splitlines()[0])

    logging.set_verbosity(logging.WARNING)  # libraries log too much at INFO
    config = resolve(config)  # reports mistakes in the config before JAX is imported, which takes seconds
    from xception_jax.training.loop import train

    print(train(config, workdir))


if __name__ == "__main__":
    run_main(lambda: app.run(main, flags_parser=parse_flags))
