"""`xception-jax probe` judges saved features by nearest neighbours and ridge regression."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from xception_jax.command_line import at_least
from xception_jax.errors import BadDataError
from xception_jax.logs.metrics_log import json_ready

if TYPE_CHECKING:
    import numpy as np

    from xception_jax.evaluation.features import Features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Fits k nearest neighbours (cosine similarity) and ridge regression to the features of TRAIN, and prints their "
        "accuracy on TEST. The number of neighbours and the penalty are chosen on a fifth of TRAIN."
    )
    parser.epilog = "The files are written by `embed` with labels: --dataset and --split, or --labels folder."
    parser.add_argument("train", metavar="TRAIN.npz", help="features to fit to")
    parser.add_argument("test", metavar="TEST.npz", help="features to evaluate on")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed for choosing that fifth (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Fits the classifiers and prints their accuracies.

    Raises:
      InputMissingError: a file is missing.
      BadDataError: a file is damaged or has no labels, or the two files do not fit each other.
    """
    from xception_jax.evaluation.features import load_features
    from xception_jax.evaluation.probe import count_shared, probe

    train, test = load_features(args.train), load_features(args.test)
    from xception_jax.metrics.intervals import wilson_interval  # imports JAX

    fitted, judged = _labels(train, args.train), _labels(test, args.test)
    _check_pair(train, test, f"{args.train} and {args.test}")
    if shared := count_shared(train.features, test.features):
        print(f"warning: {shared:,} test images have exactly the features of a training image", file=sys.stderr)
    count, classes = len(judged), len(train.class_names)
    if not args.json:
        print(f"{len(fitted):,} training images, {count:,} test images, {classes} classes")
        print(f"{'':<22}{'test accuracy':<28}{'option':<18}held-out accuracy")
    for result in probe((train.features, fitted), (test.features, judged), classes, args.seed):
        low, high = wilson_interval(result.accuracy, count)
        if args.json:
            entry: dict[str, Any] = {"classifier": result.name, "accuracy": result.accuracy, "interval": [low, high]}
            entry |= {"option": result.option, "held_out_accuracy": result.held_out, "count": count}
            print(json.dumps(json_ready(entry)))
        else:
            accuracy = f"{result.accuracy:.4f}  [{low:.4f}, {high:.4f}]"
            print(f"{result.name:<22}{accuracy:<28}{result.option:<18}{result.held_out:.4f}")
    return 0


def _labels(features: Features, where: str) -> np.ndarray:
    """Returns the labels, one per image.

    Raises:
      BadDataError: there are none, several per image, or unknown ones.
    """
    label, classes = features.label, len(features.class_names)
    fix = "embed a split with one label per image, or images with --labels folder"
    if label is None:
        raise BadDataError("the features have no labels", where, fix)
    if label.ndim != 1:
        raise BadDataError("the images have several labels each", where, fix)
    if len(label) != len(features.features) or label.min() < 0 or label.max() >= classes:
        raise BadDataError(f"the labels do not fit {len(features.features):,} images and {classes} classes", where, fix)
    return label


def _check_pair(train: Features, test: Features, where: str) -> None:
    """Raises BadDataError if two files are not of the same network and classes."""
    if train.weights != test.weights or train.features.shape[1] != test.features.shape[1]:
        raise BadDataError("the features are of two networks", where, "embed both with the same weights")
    if train.class_names != test.class_names:
        raise BadDataError("the classes differ", where, "embed folders or splits with the same classes")
