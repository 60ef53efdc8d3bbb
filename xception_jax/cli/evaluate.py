"""`xception-jax evaluate` judges a network on every image of a split, or compares two predictions."""

from __future__ import annotations

import argparse
import dataclasses
import json

from xception_jax.cli.image_files import add_limits
from xception_jax.command_line import at_least
from xception_jax.errors import UsageError
from xception_jax.explain.paths import check_file
from xception_jax.logs.metrics_log import json_ready
from xception_jax.user_files import require_outputs
from xception_jax.weights.sources import require_known

EXAMPLES = """\
examples:
  xception-jax evaluate runs/fashion_mnist
  xception-jax evaluate runs/lesions --at 0.9 --mistakes mistakes.csv
  xception-jax evaluate xception.safetensors --dataset imagenet2012 --split validation --real real.json
  xception-jax evaluate xception.safetensors --dataset imagenet_v2/matched-frequency --split test
  xception-jax evaluate runs/a --predictions a.npz     (the same for b)
  xception-jax evaluate --compare a.npz b.npz
"""
MISTAKES_IN_JSON = 100  # --mistakes writes all

# Options that --compare does not read.
_OF_A_NETWORK = (
    "dataset",
    "split",
    "step",
    "data_dir",
    "batch_size",
    "max_pixels",
    "max_scans",
    "real",
    "per_class",
    "mistakes",
    "thresholds",
    "predictions",
    "at",
)
AT = 0.95  # metrics.judgement.AT, whose package imports JAX


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Evaluates a network on every image of a split. For a run, evaluates the weights and their Polyak average. "
        "Thresholds are chosen on the development split of the run, never on the split that is evaluated."
    )
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", nargs="?", help="weight file, name of public weights, or work directory of a run")
    parser.add_argument("--dataset", metavar="NAME", help="name of the dataset (default: that of the run)")
    parser.add_argument("--split", help="such as 'validation' or 'train[98%%:]' (default: the test split of the run)")
    parser.add_argument("--step", type=at_least(0), help="checkpoint of the run (default: the newest intact one)")
    parser.add_argument(
        "--data_dir", metavar="DIR", help="directory of the datasets (default: that of the run, or that of TFDS)"
    )
    parser.add_argument("--batch_size", type=at_least(1), help="images per batch, over all devices")
    add_limits(parser, "{default}; for a run, by default {field}")
    parser.set_defaults(max_pixels=None, max_scans=None)
    parser.add_argument("--real", metavar="real.json", help="also score ImageNet's validation set by ReaL labels")
    parser.add_argument("--per_class", metavar="FILE.csv", help="write a table with one row per class")
    parser.add_argument(
        "--mistakes", metavar="FILE.csv", help="write a table of all mistakes, the most confident first"
    )
    parser.add_argument(
        "--thresholds",
        metavar="SPLIT",
        help="split to choose thresholds on (default: the development split of the run)",
    )
    parser.add_argument(
        "--at",
        type=float,
        metavar="RATE",
        help=f"specificity, and sensitivity, to choose thresholds for (default: {AT})",
    )
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
        from xception_jax.evaluation import compare

        if args.source:
            raise UsageError("--compare takes two files and no network", args.source, "remove the network")
        for option in _OF_A_NETWORK:
            if getattr(args, option) is not None:
                raise UsageError(f"--compare does not read --{option}", f"--{option}", "remove it")
        comparison = compare.compare_files(*args.compare)
        text = compare.as_text(comparison, *args.compare)
        print(json.dumps(dataclasses.asdict(comparison)) if args.json else text)
        return 0
    if not args.source:
        raise UsageError("there is nothing to evaluate", "evaluate SOURCE", "pass a work directory or a weight file")
    require_known(args.source)
    args.at = AT if args.at is None else args.at
    if not 0 < args.at <= 1:
        raise UsageError(f"--at is {args.at:g}", "--at", "set it to a rate above 0 and at most 1, such as 0.95")
    if args.predictions:
        check_file(args.predictions, ".npz")
    require_outputs((args.predictions, args.per_class, args.mistakes), filter(None, (args.source, args.real)))
    from xception_jax.cli.evaluate_split import evaluate_split, open_subject  # JAX takes seconds to import
    from xception_jax.evaluation import judgement_text, tables
    from xception_jax.metrics.predictions import mistakes, save_predictions

    subject = open_subject(args)
    result = evaluate_split(args, subject)
    rows = tables.class_rows(result.predictions, result.judgement, result.info.class_names)
    wrong = mistakes(result.predictions, result.info.class_names)
    if args.json:
        judgement = tables.judgement_as_dict(result.judgement, result.info.class_names)
        judged = {"per_class": rows, "judgement": judgement, "mistakes": wrong[:MISTAKES_IN_JSON]}
        print(json.dumps(json_ready(result.values | judged)))
    else:
        print(tables.as_text(result.values, list(subject.variables), result.metrics))
        split = result.values.get("thresholds_split", "")
        print(f"\n{judgement_text.as_text(result.judgement, result.info.class_names, wrong, split)}")
    # After the results, which a full disk must not cost.
    if args.predictions:
        save_predictions(args.predictions, result.predictions)
    if args.per_class:
        tables.write_csv(args.per_class, rows)
    if args.mistakes:
        tables.write_csv(args.mistakes, wrong, tables.MISTAKES_FIELDS)
    return 0
