"""`xception-jax prepare`: writes a dataset in the format that training reads."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xception_jax.cli.image_files import add_limits, limits
from xception_jax.config import DataConfig
from xception_jax.data.prepare.names import DATASET_NAMES, SHIPPED_NAMES
from xception_jax.data.prepare.splits import DEFAULT_SHARES
from xception_jax.errors import InputMissingError, UsageError
from xception_jax.files import expanded
from xception_jax.names import LINE_LENGTH, printable, printable_path

if TYPE_CHECKING:
    from xception_jax.data.prepare.image_folder import Contents, Skipped
    from xception_jax.data.prepare.writer import Summary

EXAMPLES = """\
examples:
  fashion_mnist_subset   10,000 + 2,000 images shipped with this package; training also writes it on first use
    xception-jax prepare fashion_mnist_subset
  fashion_mnist_scenes   multi-label scenes made from the same images; training also writes it on first use
    xception-jax prepare fashion_mnist_scenes
  fashion_mnist_stacks   three of the same images as the channels of one; training also writes it on first use
    xception-jax prepare fashion_mnist_stacks
  photograph_crops       crops of six photographs in scikit-image and scikit-learn; training also writes it on first use
    xception-jax prepare photograph_crops
  fashion_mnist          all 70,000 images, from the four idx files (Debian: apt install dataset-fashion-mnist)
    xception-jax prepare fashion_mnist --source /usr/share/datasets/fashion-mnist
  imagenet2012           ImageNet, from ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in one directory, not
                         unpacked; needs 160 GB of free disk space, and reads and writes 150 GB twice
    xception-jax prepare imagenet2012 --source ~/Downloads --data_dir /data/tfds
  imagenet_v2            new test images for ImageNet, from imagenetv2-matched-frequency.tar.gz or its folder;
                         imagenet_v2 is the same as imagenet_v2/matched-frequency
    xception-jax prepare imagenet_v2/matched-frequency --source ~/Downloads
    xception-jax prepare imagenet_v2/threshold-0.7 --source ~/Downloads
    xception-jax prepare imagenet_v2/topimages --source ~/Downloads
  image_folder           your own images: DIR/train/CLASS/*.jpg and DIR/validation/CLASS/*.jpg, or DIR/CLASS/*.jpg,
                         which is divided by class into train, validation and test; images may be in folders below
                         that of their class; links are followed, hidden names and __MACOSX are ignored
    xception-jax prepare image_folder --source ~/flowers --name flowers
    xception-jax prepare image_folder --source ~/flowers --name flowers --splits train=0.7,test=0.3
                         all files of a patient in one split, named by a regular expression over the path with one
                         capture, or by a CSV file with the columns file and group
    xception-jax prepare image_folder --source ~/scans --name scans --groups '(patient\\d+)_'
    xception-jax prepare image_folder --source ~/scans --name scans --groups patients.csv
                         cross-validation: the splits fold0 to fold4, to be combined as in
                         --config.data.train_split=fold1+fold2+fold3+fold4 --config.data.eval_split=fold0
    xception-jax prepare image_folder --source ~/flowers --name flowers --folds 5
  tfrecord               copies an existing TFDS dataset from TFRECORD to ArrayRecord files
    xception-jax prepare tfrecord --source ~/tensorflow_datasets/cifar10/3.0.2 --data_dir /data/array_record
"""
NAMES = (*SHIPPED_NAMES, *DATASET_NAMES, "image_folder", "tfrecord")

_CLASSES_SHOWN = 10
_MOST_FOLDS = 1000
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_DEFAULT_SPLITS = ",".join(f"{split}={share}" for split, share in DEFAULT_SHARES.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Writes a TFDS dataset in ArrayRecord files, without TensorFlow."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("dataset", choices=NAMES, help="dataset to prepare")
    parser.add_argument("--source", metavar="DIR", help="directory of the original files")
    parser.add_argument(
        "--data_dir",
        default="",
        metavar="DIR",
        help="directory of all datasets (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)",
    )
    parser.add_argument("--name", help="image_folder: name of the dataset, for config.data.name")
    parser.add_argument("--skip_damaged", action="store_true", help="image_folder: skip damaged images")
    add_limits(parser, "image_folder: {default}; set {field} as well")
    parser.add_argument(
        "--splits",
        metavar="NAME=SHARE,...",
        help=f"image_folder: shares of the splits, if there are no split folders (default: {_DEFAULT_SPLITS})",
    )
    parser.add_argument("--folds", type=int, metavar="K", help="image_folder: splits fold0 to fold(K-1) of equal size")
    parser.add_argument(
        "--groups",
        default="",
        metavar="REGEX|FILE.csv",
        help="image_folder: files that must be in one split, such as those of a patient",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset if it exists")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON and no progress")


def run(args: argparse.Namespace) -> int:
    """Runs the command and prints a summary: the dataset's directory, splits and, for a folder of images, classes.

    Raises:
      UsageError: an argument is missing.
      InputMissingError: an original file is missing.
      BadDataError: an original file is damaged.
      StorageError: the dataset cannot be written.
    """
    # These import tensorflow_datasets, which takes half a second that --help does not need.
    from xception_jax.data.datasets import DATASETS, SHIPPED
    from xception_jax.data.prepare.image_folder import Contents, Skipped, image_folder
    from xception_jax.data.prepare.tfrecord import copy_tfrecord
    from xception_jax.data.prepare.writer import write_dataset
    from xception_jax.data.sources import resolve_data_dir

    _refuse_unread(args)
    data_dir = resolve_data_dir(args.data_dir)
    options = {"overwrite": args.overwrite, "progress": not args.json}
    if args.dataset == "tfrecord":
        _report(args, copy_tfrecord(_source(args), data_dir, **options), skipped=Skipped(), contents=Contents())
    elif args.dataset == "image_folder":
        skipped, contents = Skipped(), Contents()
        dataset = image_folder(
            _source(args),
            _name(args),
            skipped,
            contents,
            skip_damaged=args.skip_damaged,
            shares=_shares(args),
            groups=args.groups,
            limits=limits(args),
        )
        summary = write_dataset(dataset, data_dir, **options)
        contents.warnings += contents.repeated()
        # A dataset that existed before may be that of another folder.
        classes = () if summary.already_there else dataset.features["label"].names
        _report(args, summary, skipped=skipped, classes=classes, contents=contents)
    else:
        dataset = SHIPPED[args.dataset]() if args.dataset in SHIPPED else DATASETS[args.dataset](_source(args))
        summary = write_dataset(dataset, data_dir, **options)
        _report(args, summary, skipped=Skipped(), contents=Contents(), expected=dataset.expected)
    return 0


# The options that only image_folder reads, and their defaults.
_OF_IMAGE_FOLDER: dict[str, Any] = {
    "--name": None,
    "--skip_damaged": False,
    "--max_pixels": DataConfig.max_pixels,
    "--max_scans": DataConfig.max_scans,
    "--splits": None,
    "--folds": None,
    "--groups": "",
}


def _refuse_unread(args: argparse.Namespace) -> None:
    """Raises UsageError if there are options that this dataset does not read."""
    unread = {} if args.dataset == "image_folder" else _OF_IMAGE_FOLDER
    if args.dataset in SHIPPED_NAMES:
        unread = unread | {"--source": None}
    for option, default in unread.items():
        if getattr(args, option[2:]) != default:
            raise UsageError(f"prepare {args.dataset} does not read {option}", option, f"remove {option}")


def _source(args: argparse.Namespace) -> Path:
    if not args.source:
        fix = "see the example in xception-jax prepare --help"
        raise UsageError(f"prepare {args.dataset} needs --source", "--source", fix)
    source = expanded(args.source, "--source")
    if not source.is_dir():
        raise InputMissingError(f"{source} is not a directory", "--source", "point --source at an existing directory")
    return source


def _name(args: argparse.Namespace) -> str:
    if args.name is None or not _NAME.fullmatch(args.name):
        fix = "set it to a name of lower-case letters, digits and underscores"
        raise UsageError(f"--name is {args.name!r}", "--name", fix)
    if args.name in (*SHIPPED_NAMES, *DATASET_NAMES, "synthetic"):
        raise UsageError(f"--name is {args.name}, which is another dataset", "--name", "choose another name")
    return args.name


def _shares(args: argparse.Namespace) -> dict[str, float] | None:
    """Returns the share of each split that --splits or --folds ask for, or None.

    Raises:
      UsageError: both are given, or one is not valid.
    """
    if args.folds is not None:
        if args.splits is not None or not 2 <= args.folds <= _MOST_FOLDS:
            what = "--splits and --folds exclude each other" if args.splits else f"--folds is {args.folds}"
            fix = f"set --folds to a whole number from 2 to {_MOST_FOLDS:,}, without --splits"
            raise UsageError(what, "--folds", fix)
        return {f"fold{number}": 1 / args.folds for number in range(args.folds)}
    if args.splits is None:
        return None
    try:
        pairs = [part.split("=") for part in args.splits.split(",")]
        shares = {name.strip(): float(share) for name, share in pairs}
        # TFDS takes 'all' for all splits.
        names_are_valid = len(shares) == len(pairs) and all(map(_NAME.fullmatch, shares)) and "all" not in shares
    except ValueError:
        shares, names_are_valid = {}, False
    if not names_are_valid or not (
        all(share > 0 for share in shares.values()) and abs(sum(shares.values()) - 1) <= 1e-6
    ):
        fix = f"write names other than 'all' and shares above 0 that sum to 1, such as {_DEFAULT_SPLITS}"
        raise UsageError(f"--splits is {args.splits!r}", "--splits", fix)
    return shares


def _report(
    args: argparse.Namespace,
    summary: Summary,
    *,
    skipped: Skipped,
    contents: Contents,
    expected: Mapping[str, int] | None = None,
    classes: Sequence[str] = (),
) -> None:
    expected = expected or {}
    if args.json:
        report = {
            "path": str(summary.path),
            "num_examples": summary.num_examples,
            "already_there": summary.already_there,
            "skipped": skipped.files,
            "expected": dict(expected),
        }
        if classes:
            counts = {split: dict(images) for split, images in contents.images.items()}
            groups = {split: len(of_split) for split, of_split in contents.groups.items()}
            report |= {"classes": list(classes), "images": counts, "groups": groups, "warnings": contents.warnings}
        print(json.dumps(report))
        return
    for line in skipped.lines():
        print(printable(line, LINE_LENGTH))
    if classes:
        more = ", ..." if len(classes) > _CLASSES_SHOWN else ""
        print(f"classes ({len(classes):,}): {', '.join(map(printable, classes[:_CLASSES_SHOWN]))}{more}")
        for line in (*contents.lines(list(classes)), *contents.warnings):
            print(printable(line, LINE_LENGTH))
    for split, count in expected.items():
        found = summary.num_examples.get(split, 0)
        if found != count:
            print(f"{split}: found {found:,} images; the complete dataset has {count:,}")
    splits = ", ".join(f"{split} {count:,}" for split, count in summary.num_examples.items())
    state = "already exists (--overwrite replaces it)" if summary.already_there else "written"
    print(f"{printable_path(summary.path)} {state}: {printable(splits, LINE_LENGTH)}")
