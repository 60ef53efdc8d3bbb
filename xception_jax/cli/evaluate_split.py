"""Evaluates a network on a split, as the arguments of `xception-jax evaluate` say."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from xception_jax.config import DataConfig, ExperimentConfig, MeshConfig, override
from xception_jax.data.datasets import open_dataset, overlap
from xception_jax.data.pipeline import Batch, DamagedImages, EvaluationBatches
from xception_jax.data.sources import Source, SourceInfo, check_labels
from xception_jax.errors import ConfigError, InputMissingError, UsageError
from xception_jax.evaluation.evaluate import evaluate, make_evaluation_step, name_examples
from xception_jax.evaluation.real import image_numbers, load_real_labels, real_accuracy
from xception_jax.evaluation.temperature import calibrate
from xception_jax.metrics import Metric, metrics_of
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.judgement import Judgement, Threshold, choose_thresholds, judge
from xception_jax.metrics.predictions import MAX_CLASSES, Predictions
from xception_jax.models import create_model
from xception_jax.names import printable
from xception_jax.parallel import batch_sharding, check_batch, make_mesh, to_devices
from xception_jax.runs import is_run, open_network, open_run, require_classifier, run_network
from xception_jax.weights import Network

# For weight files; a run has `evaluation.batch_size`. Fits into small machines, and keeps a large accelerator busy.
BATCH_SIZE_PER_DEVICE = 64


@dataclasses.dataclass(frozen=True)
class Subject:
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


def open_subject(args: argparse.Namespace) -> Subject:
    """Opens the network named by the arguments.

    Raises:
      UserError: see `open_network`; BadDataError also if it has no classifier.
    """
    if is_run(args.source):
        run = open_run(args.source, args.step)
        return Subject(run_network(args.source, run), run.variables, run.config, run.step)
    network = open_network(args.source, args.step)
    require_classifier(network)
    view = network.preprocessing
    config = override(ExperimentConfig(), {"data.image_size": view.size, "data.eval_crop": view.crop})
    return Subject(network, {"": network.variables}, config, None)


def _open_data(args: argparse.Namespace, config: ExperimentConfig) -> tuple[DataConfig, Source]:
    """Returns `config.data` with the changes given by the arguments, and opens the split."""
    data = config.data
    own = is_run(args.source) and args.dataset in (None, data.name)
    if not own and not (args.dataset and args.split):
        fix = "pass for example --dataset imagenet2012 --split validation"
        raise UsageError("the dataset or the split is missing", "--dataset and --split", fix)
    data_dir = args.data_dir if args.data_dir is not None else data.data_dir
    limits = {name: getattr(args, name) for name in ("max_pixels", "max_scans") if getattr(args, name) is not None}
    data = data.replace(name=args.dataset or data.name, data_dir=data_dir, **limits)
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
    names = " and ".join(repr(printable(classes[0])) for classes in (network.classes, info.class_names))
    print(f"network and dataset name their classes differently ({names}); matching them by number", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of an evaluation. Predictions and judgement are of the last set of variables."""

    values: dict[str, Any]
    metrics: Sequence[Metric]
    predictions: Predictions
    judgement: Judgement
    info: SourceInfo


def evaluate_split(args: argparse.Namespace, subject: Subject) -> Result:
    """Evaluates a network on the split named by the arguments, and judges it.

    Raises:
      UsageError: the arguments are not valid together.
      ConfigError: the network does not fit the dataset.
      InputMissingError: the dataset or a file is missing.
      BadDataError: one of them is damaged.
    """
    network, config = subject.network, subject.config
    data, source = _open_data(args, config)
    info = source.info
    _check_classes(network, info)
    check_labels(source)
    development = _open_development(args, data, config, source)
    real_labels = load_real_labels(args.real, info.num_classes) if args.real else []
    numbers = image_numbers(source, real_labels) if args.real else []
    loss = "sigmoid" if info.multi_label else "softmax"
    config = override(config, {"loss.name": loss, "model.num_classes": network.model.num_classes})
    metrics = metrics_of(config)
    pass_over = _Pass(args, network, config, data, metrics)
    thresholds: list[Threshold] = []
    last = "ema_" if "ema_" in subject.variables else ""
    if development is not None:
        _, predictions, _ = pass_over(development, {last: subject.variables[last]})
        thresholds = choose_thresholds(predictions, args.at)
    values, predictions, damaged = pass_over(source, subject.variables)
    predictions = name_examples(predictions, source)

    named: dict[str, Any] = {"source": args.source, "sha256": network.sha256}
    named |= {"step": subject.step} if subject.step is not None else {}
    named |= {"dataset": info.name, "split": info.split} | values
    named |= {"thresholds_split": development.info.split} if development is not None else {}
    named |= {"damaged": damaged} if damaged else {}
    for prefix in subject.variables:
        for name in (f"{prefix}top1", f"{prefix}top5"):
            # Images of a group are not independent: their interval is that of the judgement.
            if name in values and predictions.group is None:
                named[f"{name}_interval"] = wilson_interval(values[name], values["count"])
    if not info.multi_label:
        calibration = calibrate(predictions)
        named |= {f"{last}{name}": value for name, value in dataclasses.asdict(calibration).items()}
    if numbers:
        named |= {f"{last}{key}": value for key, value in real_accuracy(predictions, numbers, real_labels).items()}
    return Result(named, metrics, predictions, judge(predictions, info.num_classes, thresholds), info)


def _open_development(
    args: argparse.Namespace, data: DataConfig, config: ExperimentConfig, source: Source
) -> Source | None:
    """Opens the split to choose thresholds on; None if there is none.

    Raises:
      UsageError: it has images of the split that is evaluated.
    """
    info = source.info
    own = is_run(args.source) and data.name == config.data.name
    split = args.thresholds or (config.data.eval_split if own else "")
    if args.thresholds and info.num_classes > MAX_CLASSES:
        what = f"thresholds are chosen for up to {MAX_CLASSES} classes, and {info.name} has {info.num_classes:,}"
        raise UsageError(what, "--thresholds", "remove --thresholds")
    if not split or info.num_classes > MAX_CLASSES:
        return None
    try:
        development = open_dataset(data, split)
    except InputMissingError as error:
        if args.thresholds:
            raise
        print(f"note: no thresholds were chosen: {error.what}", file=sys.stderr)
        return None
    if overlap(source, split):
        if args.thresholds:
            fix = "choose thresholds on images that are not evaluated: they fit their own images too well"
            what = f"--thresholds {split} has images of the split that is evaluated, {info.split}"
            raise UsageError(what, "--thresholds", fix)
        return None
    return development


class _Pass:
    """Runs a network over every image of a split."""

    def __init__(
        self,
        args: argparse.Namespace,
        network: Network,
        config: ExperimentConfig,
        data: DataConfig,
        metrics: Sequence[Metric],
    ):
        self.network, self.data, self.metrics, self.mesh = network, data, metrics, make_mesh(MeshConfig())
        size = self.mesh.size
        usual = config.evaluation.batch_size if is_run(args.source) else BATCH_SIZE_PER_DEVICE * size
        self.batch_size = math.ceil(usual / size) * size if args.batch_size is None else args.batch_size
        check_batch(
            "config.evaluation.batch_size" if args.batch_size is None else "--batch_size", self.batch_size, size
        )
        keep_logits = not config.loss.multi_label
        self.step = make_evaluation_step(create_model(network.model), config, keep_logits=keep_logits)

    def __call__(self, source: Source, variables: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], Predictions, int]:
        """Returns the metrics, the predictions of the last set of variables, and the number of damaged images."""
        size = min(self.batch_size, math.ceil(len(source) / self.mesh.size) * self.mesh.size)
        batches = EvaluationBatches(self.data, source, batch_size=size, view=self.network.preprocessing)
        fix = "prepare the dataset again from an intact copy; large images need --max_pixels or --max_scans"
        damaged = DamagedImages(source.info, self.data.max_bad_fraction, fix)
        with jax.set_mesh(self.mesh), contextlib.closing(iter(batches)) as iterator:
            values, predictions = evaluate(
                self.step,
                self.metrics,
                jax.device_put(variables, NamedSharding(self.mesh, PartitionSpec())),
                tqdm(iterator, f"evaluating {printable(source.info.split)}", len(batches), unit="batch", disable=None),
                len(source),
                to_devices=lambda batch: to_devices(batch, batch_sharding(self.mesh)),
                poll=lambda batch: _note_damaged(damaged, batch),
            )
        return values, predictions, int(values.pop("damaged"))


def _note_damaged(damaged: DamagedImages, batch: Batch) -> None:
    for line in damaged.add(batch):
        print(line, file=sys.stderr)
