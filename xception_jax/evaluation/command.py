"""`python -m xception_jax evaluate`: a checkpoint of a run on any split of its dataset, exactly."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax

from xception_jax.config import load_json
from xception_jax.data.pipeline import evaluation_batches
from xception_jax.errors import InputMissingError
from xception_jax.evaluation.evaluate import evaluate, make_evaluation_step
from xception_jax.evaluation.metrics import save_predictions
from xception_jax.training.experiment import make_experiment
from xception_jax.training.loop import open_checkpoints
from xception_jax.training.mesh import batch_sharding, to_devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Evaluates a checkpoint: its last weights, and their Polyak average if it has one."
    parser.add_argument("workdir", help="work directory of a run")
    parser.add_argument(
        "--split", help="such as 'validation' or 'train[98%%:]'; by default the test split of the config"
    )
    parser.add_argument("--step", type=int, help="checkpoint to evaluate; by default the newest that is intact")
    parser.add_argument("--data_dir", help="where the dataset is, if it has moved")
    parser.add_argument("--batch_size", type=int, help="images at a time, over all devices")
    parser.add_argument("--predictions", metavar="FILE.npz", help="save the best classes of each image")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints the metrics.

    Raises:
      InputMissingError: there is no run, or no such checkpoint.
      BadDataError: the checkpoint is damaged or does not fit.
    """
    workdir = Path(args.workdir)
    try:
        config = load_json((workdir / "config.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputMissingError(
            "there is no run", str(workdir), "give the work directory of a run: it holds config.json"
        ) from None
    # Only this split is opened: the training images need not be on this machine.
    split = args.split or config.data.test_split or config.data.eval_split
    config.data.train_split, config.data.eval_split, config.data.test_split = split, "", ""
    if args.data_dir is not None:
        config.data.data_dir = args.data_dir
    if args.batch_size is not None:
        config.evaluation.batch_size = args.batch_size
    experiment = make_experiment(config)
    source = experiment.sources["train"]

    with jax.set_mesh(experiment.mesh), open_checkpoints(experiment, workdir, read_only=True) as checkpoints:
        if args.step is None:
            restored = checkpoints.restore_latest(experiment.abstract)
            if restored is None:
                raise InputMissingError("there is no checkpoint yet", str(workdir), "train first")
            step, state = restored
        else:
            step, state = args.step, checkpoints.restore(args.step, experiment.abstract)
        metrics, predictions = evaluate(
            make_evaluation_step(experiment.model, config),
            state.all_variables(),
            evaluation_batches(config.data, source, batch_size=config.evaluation.batch_size),
            len(source),
            to_devices=lambda batch: to_devices(batch, batch_sharding(experiment.mesh)),
        )
    if args.predictions:
        save_predictions(args.predictions, predictions)
    metrics = {"step": step, "split": split} | metrics
    print(json.dumps(metrics) if args.json else "\n".join(f"{name:16}{value}" for name, value in metrics.items()))
    return 0
