"""`xception-jax embed` saves the features of images."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xception_jax.cli.image_files import add_limits, limits, unreadable
from xception_jax.command_line import at_least
from xception_jax.errors import UsageError
from xception_jax.names import printable, printable_path
from xception_jax.user_files import require_outputs
from xception_jax.weights.sources import require_known

if TYPE_CHECKING:
    from xception_jax.evaluation.features import Embedder, Features
    from xception_jax.weights import Network

SUFFIXES = (".npz", ".csv")

EXAMPLES = """\
An .npz file has the arrays features [n, c], path [n] and, with labels, label [n] and class_names; a .csv file has one
row per image. If an image cannot be read, it is left out and the exit code is 65.

examples:
  xception-jax embed --weights xception.safetensors photos/ --out photos.npz
  xception-jax embed --weights xception.safetensors photos/train --labels folder --out train.npz
  xception-jax embed --weights runs/fashion_mnist --dataset fashion_mnist_subset --split test --out test.npz
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Saves the features of images: the input of the classifier, after pooling."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("images", nargs="*", metavar="PATH", help="images, or folders to search for images")
    parser.add_argument(
        "--weights",
        required=True,
        metavar="SOURCE",
        help="weight file, name of public weights, or work directory of a run",
    )
    parser.add_argument("--step", type=at_least(0), help="checkpoint of a run (default: the newest intact one)")
    parser.add_argument("--out", required=True, metavar="FILE.npz|FILE.csv", help="where to save the features")
    parser.add_argument("--labels", choices=("folder",), help="label each image with the name of its folder")
    parser.add_argument("--dataset", metavar="NAME", help="embed a split of a dataset with its labels")
    parser.add_argument("--split", help="such as 'test' or 'train[98%%:]'")
    parser.add_argument(
        "--data_dir", default="", metavar="DIR", help="directory of the datasets (default: that of TFDS)"
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=32, metavar="N", help="images per batch (default: 32)"
    )
    add_limits(parser)


def run(args: argparse.Namespace) -> int:
    """Computes and saves the features.

    Raises:
      UsageError: the arguments are not valid together.
      InputMissingError: the network, an image or the dataset is missing.
      BadDataError: the network is damaged, or some images are. The features of all others have been saved then.
    """
    _check(args)
    from xception_jax.evaluation.features import make_embedder, save_features
    from xception_jax.evaluation.predict import find_images

    paths = find_images(args.images) if args.images else []
    require_known(args.weights)
    from xception_jax.runs import open_network, without_classifier  # JAX takes seconds to import

    network = open_network(args.weights, args.step)
    has_classifier = "head" in network.variables["params"]
    embedder = make_embedder(network if has_classifier else without_classifier(network))
    if args.dataset:
        features, damaged = _embed_split(args, network, embedder)
    else:
        features, damaged = _embed_files(args, network, embedder, paths)
    if len(features.features):
        save_features(args.out, features)
        count, channels = features.features.shape
        print(f"{printable_path(args.out)}: {channels:,} features of {count:,} images", file=sys.stderr)
    if damaged:
        raise unreadable(damaged, len(damaged) + len(features.features), "embedded")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Checks the arguments that need neither the network nor JAX."""
    if bool(args.images) == bool(args.dataset):
        what = "images and --dataset cannot be combined" if args.images else "there is nothing to embed"
        raise UsageError(what, "embed", "pass images or folders, or --dataset NAME --split SPLIT")
    if bool(args.dataset) != bool(args.split):
        raise UsageError("--dataset and --split belong together", "--dataset and --split", "pass both")
    if args.dataset and args.labels:
        raise UsageError("a dataset has labels of its own", "--labels", "remove --labels")
    out = Path(args.out)
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError("features are saved as .npz or .csv", args.out, "use a name that ends in .npz or .csv")
    require_outputs([out], args.images)


def _embed_files(
    args: argparse.Namespace, network: Network, embedder: Embedder, paths: list[Path]
) -> tuple[Features, list[str]]:
    """Returns the features of the images that can be read, and the paths of the others."""
    import numpy as np
    from tqdm import tqdm

    from xception_jax.evaluation.features import Features
    from xception_jax.evaluation.loading import load_batches

    rows, kept, damaged = [], [], []
    with tqdm(total=len(paths), desc="embedding", unit="img", disable=None) as progress:
        for batch in load_batches(paths, network.preprocessing, args.batch_size, limits=limits(args)):
            features = embedder(batch.pixels)
            for path, error, row in zip(batch.paths, batch.errors, features, strict=False):  # the rest is padding
                if error:
                    damaged.append(str(path))
                    tqdm.write(f"{printable_path(path)}: {printable(error)}", file=sys.stderr)
                else:
                    rows.append(row)
                    kept.append(path)
            progress.update(len(batch.paths))
    files = np.array([str(path) for path in kept])
    features = np.stack(rows) if rows else np.zeros((0, 0), np.float32)
    if not args.labels:
        return Features(features, files, weights=network.sha256), damaged
    names, label = np.unique([Path(os.path.abspath(path)).parent.name for path in kept], return_inverse=True)
    return Features(features, files, label.astype(np.int64), tuple(map(str, names)), network.sha256), damaged


def _embed_split(args: argparse.Namespace, network: Network, embedder: Embedder) -> tuple[Features, list[str]]:
    """Returns the features of the images of a split that can be read, and the names of the others."""
    import numpy as np
    from tqdm import tqdm

    from xception_jax.config import ExperimentConfig
    from xception_jax.data.datasets import open_dataset
    from xception_jax.data.pipeline import EvaluationBatches
    from xception_jax.evaluation.features import Features

    data = ExperimentConfig().data.replace(
        name=args.dataset, data_dir=args.data_dir, max_pixels=args.max_pixels, max_scans=args.max_scans
    )
    source = open_dataset(data, args.split)
    batches = EvaluationBatches(data, source, batch_size=args.batch_size, view=network.preprocessing)
    rows, labels, indices, damaged = [], [], [], []
    with contextlib.closing(iter(batches)) as iterator:
        for batch in tqdm(iterator, "embedding", len(batches), unit="batch", disable=None):
            kept = batch["mask"] & ~batch["damaged"]
            rows.append(embedder(batch["image"])[kept])
            labels.append(batch["label"][kept])
            indices.append(batch["index"][kept])
            damaged += batch["index"][batch["mask"] & batch["damaged"]].tolist()
    info = source.info
    place = f"{info.name} {info.split}"
    label = np.concatenate(labels)
    features = Features(
        features=np.concatenate(rows),
        path=np.array([f"{place} {index}" for index in np.concatenate(indices)]),
        label=label.astype(bool) if info.multi_label else label.astype(np.int64),
        class_names=info.class_names,
        weights=network.sha256,
    )
    return features, [f"{place} {index}" for index in damaged]
