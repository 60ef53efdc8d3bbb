"""`python -m xception_jax evaluate` evaluates a network on every image of a split, or compares two predictions."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from xception_jax.config import DataConfig, ExperimentConfig, MeshConfig, override
from xception_jax.data.pipeline import Batch, DamagedImages, EvaluationBatches
from xception_jax.data.prepare.datasets import open_dataset
from xception_jax.data.sources import Source, SourceInfo, check_labels
from xception_jax.errors import ConfigError, InputMissingError, UsageError
from xception_jax.evaluation import compare, tables
from xception_jax.evaluation.evaluate import evaluate, make_evaluation_step
from xception_jax.evaluation.real import image_numbers, load_real_labels, real_accuracy
from xception_jax.evaluation.temperature import calibrate
from xception_jax.logs.metrics_log import json_ready
from xception_jax.metrics import Metric, metrics_of
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import Predictions, save_predictions
from xception_jax.models import create_model
from xception_jax.parallel import batch_sharding, check_batch, make_mesh, to_devices
from xception_jax.runs import is_run, open_network, open_run, require_classifier, run_network
from xception_jax.weights import Network

EXAMPLES = """\
examples:
  python -m xception_jax evaluate runs/fashion_mnist
  python -m xception_jax evaluate xception.safetensors --dataset imagenet2012 --split validation --real real.json
  python -m xception_jax evaluate xception.safetensors --dataset imagenet_v2/matched-frequency --split test
  python -m xception_jax evaluate runs/a --predictions a.npz     (the same for b)
  python -m xception_jax evaluate --compare a.npz b.npz
"""
# For weight files; a run has `evaluation.batch_size`. Fits into small machines, and keeps a large accelerator busy.
BATCH_SIZE_PER_DEVICE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Evaluates a network on every image of a split. For a run, evaluates the weights and their Polyak average."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", nargs="?", help="work directory of a run, or a weight file")
    parser.add_argument("--dataset", metavar="NAME", help="name of the dataset (default: that of the run)")
    parser.add_argument("--split", help="such as 'validation' or 'train[98%%:]' (default: the test split of the run)")
    parser.add_argument("--step", type=int, help="checkpoint of the run (default: the newest intact one)")
    parser.add_argument(
        "--data_dir", metavar="DIR", help="directory of the datasets (default: that of the run, or that of TFDS)"
    )
    parser.add_argument("--batch_size", type=int, help="images per batch, over all devices")
    parser.add_argument("--real", metavar="real.json", help="also score ImageNet's validation set by ReaL labels")
    parser.add_argument("--per_class", metavar="FILE.csv", help="write a table with one row per class")
    parser.add_argument("--predictions", metavar="FILE.npz", help="save the most probable classes of each image")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A.npz", "B.npz"), help="test whether two saved predictions differ in accuracy"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Evaluates or compares, and prints the results.

    Raises:
      UsageError: the arguments are not valid together.
      ConfigError: the network does not fit the dataset.
      InputMissingError: the network, the checkpoint, the dataset or a file is missing.
      BadDataError: one of them is damaged.
    """
    if args.compare:
        if args.source:
            raise UsageError("--compare takes two files and no network", args.source, "remove the network")
        comparison = compare.compare_files(*args.compare)
        text = compare.as_text(comparison, *args.compare)
        print(json.dumps(dataclasses.asdict(comparison)) if args.json else text)
        return 0
    if not args.source:
        raise UsageError("there is nothing to evaluate", "evaluate SOURCE", "pass a work directory or a weight file")
    for path in filter(None, (args.predictions, args.per_class)):
        _require_directory(path)
    subject = _open_subject(args)
    values, measured, predictions, info = _evaluate(args, subject)
    rows = tables.class_rows(predictions, info.class_names)
    if args.predictions:
        save_predictions(args.predictions, predictions)
    if args.per_class:
        tables.write_csv(args.per_class, rows)
    if args.json:
        print(json.dumps(json_ready(values | {"per_class": rows})))
    else:
        print(tables.as_text(values, list(subject.variables), measured))
    return 0


def _require_directory(path: str) -> None:
    """Raises InputMissingError if the directory of an output file is missing, to fail before the evaluation."""
    directory = Path(path).absolute().parent
    if not directory.is_dir():
        raise InputMissingError(f"there is no directory {directory}", path, "create it, or choose another path")


@dataclasses.dataclass(frozen=True)
class _Subject:
    """The network to evaluate.

    Attributes:
      network: the network. Its own variables are not used.
      variables: sets of variables by metric prefix.
      config: the config of the run. For a weight file, the defaults with the preprocessing of the network.
      step: the step of the checkpoint, or None.
    """

    network: Network
    variables: dict[str, dict[str, Any]]
    config: ExperimentConfig
    step: int | None


def _open_subject(args: argparse.Namespace) -> _Subject:
    if is_run(args.source):
        run = open_run(args.source, args.step)
        return _Subject(run_network(args.source, run), run.variables, run.config, run.step)
    network = open_network(args.source, args.step)
    require_classifier(network)
    view = network.preprocessing
    config = override(ExperimentConfig(), {"data.image_size": view.size, "data.eval_crop": view.crop})
    return _Subject(network, {"": network.variables}, config, None)


def _open_data(args: argparse.Namespace, config: ExperimentConfig) -> tuple[DataConfig, Source]:
    """Returns `config.data` with the changes given by the arguments, and opens the split."""
    data = config.data
    own = is_run(args.source) and args.dataset in (None, data.name)
    if not own and not (args.dataset and args.split):
        fix = "pass for example --dataset imagenet2012 --split validation"
        raise UsageError("the dataset or the split is missing", "--dataset and --split", fix)
    data_dir = args.data_dir if args.data_dir is not None else data.data_dir
    data = data.replace(name=args.dataset or data.name, data_dir=data_dir)
    return data, open_dataset(data, args.split or data.test_split or data.eval_split)


def _check_classes(network: Network, info: SourceInfo) -> None:
    """Checks that the outputs of the network are the classes of the dataset.

    Raises:
      ConfigError: the number or the order of the classes differs.
    """
    if network.num_classes != info.num_classes:
        what = f"the network has {network.num_classes} classes, but {info.name} has {info.num_classes}"
        raise ConfigError(what, network.source, "use a dataset with the classes that the network was trained on")
    if network.classes is None or network.classes == info.class_names:
        return
    if set(network.classes) == set(info.class_names):
        raise ConfigError(
            f"the network has the classes of {info.name}, but in another order",
            network.source,
            f"prepare the dataset again so that its first class is {network.classes[0]}, not {info.class_names[0]}",
        )
    names = f"{network.classes[0]!r} and {info.class_names[0]!r}"
    print(f"network and dataset name their classes differently ({names}); matching them by number", file=sys.stderr)


def _evaluate(
    args: argparse.Namespace, subject: _Subject
) -> tuple[dict[str, Any], Sequence[Metric], Predictions, SourceInfo]:
    network, config = subject.network, subject.config
    data, source = _open_data(args, config)
    info = source.info
    _check_classes(network, info)
    check_labels(source)
    real_labels = load_real_labels(args.real, info.num_classes) if args.real else []
    numbers = image_numbers(source, real_labels) if args.real else []
    loss = "sigmoid" if info.multi_label else "softmax"
    config = override(config, {"loss.name": loss, "model.num_classes": info.num_classes})

    metrics, mesh = metrics_of(config), make_mesh(MeshConfig())
    usual = config.evaluation.batch_size if is_run(args.source) else BATCH_SIZE_PER_DEVICE * mesh.size
    batch_size = -(-usual // mesh.size) * mesh.size if args.batch_size is None else args.batch_size
    if batch_size < 1:
        raise UsageError(f"--batch_size is {batch_size}", "--batch_size", "set it to a whole number, at least 1")
    check_batch("evaluation.batch_size", batch_size, mesh.size)
    view = network.preprocessing
    batches = EvaluationBatches(data, source, batch_size=batch_size, view=view)
    damaged = DamagedImages(info, data.max_bad_fraction)
    with jax.set_mesh(mesh), contextlib.closing(iter(batches)) as iterator:
        values, predictions = evaluate(
            make_evaluation_step(create_model(network.model), config, keep_logits=not info.multi_label),
            metrics,
            jax.device_put(subject.variables, NamedSharding(mesh, PartitionSpec())),
            tqdm(iterator, "evaluating", len(batches), unit="batch", disable=None),
            len(source),
            to_devices=lambda batch: to_devices(batch, batch_sharding(mesh)),
            poll=lambda batch: _note_damaged(damaged, batch),
        )

    last = list(subject.variables)[-1]
    named: dict[str, Any] = {"source": args.source, "sha256": network.sha256}
    named |= {"step": subject.step} if subject.step is not None else {}
    named |= {"dataset": info.name, "split": info.split} | values
    if damaged.indices:
        named["damaged"] = len(damaged.indices)
    for prefix in subject.variables:
        for name in (f"{prefix}top1", f"{prefix}top5"):
            if name in values:
                named[f"{name}_interval"] = wilson_interval(values[name], values["count"])
    if not info.multi_label:
        calibration = calibrate(predictions)
        named |= {f"{last}{name}": value for name, value in dataclasses.asdict(calibration).items()}
    if numbers:
        named |= {f"{last}{key}": value for key, value in real_accuracy(predictions, numbers, real_labels).items()}
    return named, metrics, predictions, info


def _note_damaged(damaged: DamagedImages, batch: Batch) -> None:
    for index in damaged.add(batch)[: DamagedImages.NAMED]:
        print(f"image {index} is damaged; the next image replaces it", file=sys.stderr)
