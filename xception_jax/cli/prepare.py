"""`python -m xception_jax prepare`: writes a dataset in the form that training reads."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from xception_jax.data.prepare import fashion_mnist
from xception_jax.data.prepare.image_folder import Skipped, image_folder
from xception_jax.data.prepare.imagenet import imagenet2012
from xception_jax.data.prepare.imagenet_v2 import NAME, VARIANTS, imagenet_v2
from xception_jax.data.prepare.tfrecord import copy_tfrecord
from xception_jax.data.prepare.writer import Dataset, Summary, write_dataset
from xception_jax.data.sources import resolve_data_dir
from xception_jax.errors import InputMissingError, UsageError

EXAMPLES = """\
examples:
  fashion_mnist_subset   10,000 + 2,000 images that are shipped with this package (written on first use anyway)
    python -m xception_jax prepare fashion_mnist_subset
  fashion_mnist_scenes   several garments in an image, made of the same images (written on first use anyway)
    python -m xception_jax prepare fashion_mnist_scenes
  fashion_mnist          all 70,000 images, from the four idx files (Debian: apt install dataset-fashion-mnist)
    python -m xception_jax prepare fashion_mnist --source /usr/share/datasets/fashion-mnist
  imagenet2012           ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, not unpacked, in one directory;
                         needs 150 GB of disk beside them, and reads and writes that much twice
    python -m xception_jax prepare imagenet2012 --source ~/Downloads --data_dir /data/tfds
  imagenet_v2            new test images for ImageNet: imagenetv2-matched-frequency.tar.gz in DIR, or unpacked there
    python -m xception_jax prepare imagenet_v2/matched-frequency --source ~/Downloads    (imagenet_v2 is the same)
    python -m xception_jax prepare imagenet_v2/threshold-0.7 --source ~/Downloads
    python -m xception_jax prepare imagenet_v2/topimages --source ~/Downloads
  image_folder           DIR/train/CLASS/*.jpg and DIR/validation/CLASS/*.jpg, or DIR/CLASS/*.jpg, divided 90 to 10;
                         links are followed, names that begin with a dot and __MACOSX are left out
    python -m xception_jax prepare image_folder --source ~/flowers --name flowers
  tfrecord               an existing TFDS dataset in TFRECORD files, copied to ArrayRecord files
    python -m xception_jax prepare tfrecord --source ~/tensorflow_datasets/cifar10/3.0.2 --data_dir /data/array_record
"""
_IMAGENET_V2 = {NAME: "matched-frequency"} | {f"{NAME}/{variant}": variant for variant in VARIANTS}
_NEED_SOURCE = ("fashion_mnist", "imagenet2012", *_IMAGENET_V2, "image_folder", "tfrecord")
NAMES = ("fashion_mnist_subset", "fashion_mnist_scenes", *_NEED_SOURCE)
NAMED_CLASSES = 10
_DATASET_NAME = re.compile(r"[a-z][a-z0-9_]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Writes a TFDS dataset of ArrayRecord files, without TensorFlow."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dataset", choices=NAMES, help="what to prepare")
    parser.add_argument("--source", metavar="DIR", help="directory of the files that it is made of")
    parser.add_argument("--data_dir", default="", metavar="DIR", help="TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--name", help="image_folder: what the dataset will be called in config.data.name")
    parser.add_argument("--skip-damaged", action="store_true", help="image_folder: leave damaged images out")
    parser.add_argument("--overwrite", action="store_true", help="write it again if it is there")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, and no progress")


def run(args: argparse.Namespace) -> int:
    """Runs the command and prints a summary: where the dataset is, the examples in each split, a folder's classes.

    Raises:
      UsageError: an argument is missing.
      InputMissingError: a file that it is made of is not there.
      BadDataError: such a file is damaged.
      StorageError: the dataset cannot be written.
    """
    source = _source(args)
    data_dir = resolve_data_dir(args.data_dir)
    if args.dataset == "tfrecord":
        summary = copy_tfrecord(source, data_dir, overwrite=args.overwrite, progress=not args.json)
        _report(args, summary, Skipped(), expected={})
        return 0
    skipped = Skipped()
    dataset = _dataset(args, source, skipped)
    summary = write_dataset(dataset, data_dir, overwrite=args.overwrite, progress=not args.json)
    expected = dataset.expected if args.dataset.startswith("imagenet") else {}
    # A dataset that was there already may be of another folder.
    is_new_folder = args.dataset == "image_folder" and not summary.already_there
    _report(args, summary, skipped, expected, dataset.features["label"].names if is_new_folder else ())
    return 0


def _source(args: argparse.Namespace) -> Path:
    if args.dataset in _NEED_SOURCE and not args.source:
        raise UsageError(
            f"prepare {args.dataset} needs --source",
            "--source",
            "see the example in python -m xception_jax prepare --help",
        )
    source = Path(args.source or ".").expanduser()
    if not source.is_dir():
        raise InputMissingError(f"{source} is not a directory", "--source", "point --source at an existing directory")
    return source


def _dataset(args: argparse.Namespace, source: Path, skipped: Skipped) -> Dataset:
    match args.dataset:
        case "fashion_mnist_subset":
            return fashion_mnist.fashion_mnist_subset()
        case "fashion_mnist_scenes":
            return fashion_mnist.fashion_mnist_scenes()
        case "fashion_mnist":
            return fashion_mnist.fashion_mnist(source)
        case "imagenet2012":
            return imagenet2012(source)
        case name if name in _IMAGENET_V2:
            return imagenet_v2(source, _IMAGENET_V2[name])
    if args.name is None or not _DATASET_NAME.fullmatch(args.name):
        raise UsageError(
            f"--name is {args.name!r}", "--name", "give the dataset a name of small letters, digits and underscores"
        )
    return image_folder(source, args.name, skipped, skip_damaged=args.skip_damaged)


def _report(
    args: argparse.Namespace,
    summary: Summary,
    skipped: Skipped,
    expected: Mapping[str, int],
    classes: Sequence[str] = (),
) -> None:
    if args.json:
        report = {
            "path": str(summary.path),
            "num_examples": summary.num_examples,
            "already_there": summary.already_there,
            "skipped": skipped.files,
            "expected": dict(expected),
        }
        report |= {"classes": list(classes)} if classes else {}
        print(json.dumps(report))
        return
    for line in skipped.lines():
        print(line)
    if classes:
        more = ", ..." if len(classes) > NAMED_CLASSES else ""
        print(f"classes ({len(classes):,}): {', '.join(classes[:NAMED_CLASSES])}{more}")
    for split, count in expected.items():
        found = summary.num_examples.get(split, 0)
        if found != count:
            print(f"{split}: {found:,} images were found, the full set has {count:,}")
    splits = ", ".join(f"{split} {count:,}" for split, count in summary.num_examples.items())
    again = " was there already (--overwrite writes it again)" if summary.already_there else " written"
    print(f"{summary.path}{again}: {splits}")
