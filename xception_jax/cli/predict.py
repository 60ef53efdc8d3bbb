"""`xception-jax predict` prints the most probable classes of images."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xception_jax.cli.image_files import add_limits, limits, unreadable
from xception_jax.command_line import at_least
from xception_jax.errors import UsageError
from xception_jax.evaluation.predict import Prediction, class_names, find_images, predict
from xception_jax.logs.metrics_log import json_ready
from xception_jax.names import printable, printable_path
from xception_jax.user_files import require_directory, require_outputs, write_output
from xception_jax.weights.sources import require_known

MAX_ON_SHEET = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Predicts the most probable classes of JPEG, PNG and WebP images."
    parser.epilog = (
        'With --json, each line is an object {"file", "predictions": [{"class", "name", "probability"}]}, the most '
        'probable class first, or {"file", "error"} for an image that cannot be read. If an image cannot be read, the '
        "exit code is 65."
    )
    parser.add_argument("images", nargs="+", metavar="PATH", help="images, or folders to search for images")
    parser.add_argument(
        "--weights",
        required=True,
        metavar="SOURCE",
        help="weight file, name of public weights, or work directory of a run",
    )
    parser.add_argument("--step", type=at_least(0), help="checkpoint of a run (default: the newest intact one)")
    parser.add_argument(
        "--top", type=at_least(1), default=5, metavar="N", help="number of classes per image (default: 5)"
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=32, metavar="N", help="images per batch (default: 32)"
    )
    parser.add_argument(
        "--sigmoid", action="store_true", help="apply a sigmoid, for weight files that do not record multi-label models"
    )
    add_limits(parser)
    parser.add_argument("--contact_sheet", metavar="FILE.png", help="draw a PNG of the images with their best class")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Predicts the images, prints the predictions, and draws the contact sheet.

    Raises:
      UsageError: the contact sheet is not a PNG.
      InputMissingError: the network or an image is missing.
      BadDataError: the network is damaged, or some images are. All other images have been predicted then.
    """
    if args.contact_sheet:
        _check_sheet(Path(args.contact_sheet))
    paths = find_images(args.images)
    require_outputs([args.contact_sheet], paths)
    require_known(args.weights)
    from xception_jax.runs import open_network, require_classifier  # JAX takes seconds to import

    network = open_network(args.weights, args.step)
    require_classifier(network)
    if args.sigmoid and not network.has_single_logit:  # whose probability is a sigmoid already
        network = dataclasses.replace(network, multi_label=True)
    names = class_names(network)
    shown = min(len(paths), MAX_ON_SHEET) if args.contact_sheet else 0
    options = {"batch_size": args.batch_size, "thumbnails": shown, "limits": limits(args)}
    predictions = predict(network, paths, top=args.top, **options)
    damaged, tiles = [], []
    for prediction in tqdm(predictions, "predicting", len(paths), unit="img", disable=None):
        if prediction.error:
            damaged.append(prediction.path)
            tqdm.write(f"{printable_path(prediction.path)}: {printable(prediction.error)}", file=sys.stderr)
        if args.json:
            tqdm.write(json.dumps(json_ready(_as_dict(prediction, names))))
        elif not prediction.error:
            tqdm.write(_as_text(prediction, names))
        if prediction.thumbnail is not None:
            tiles.append(prediction)
    if args.contact_sheet and tiles:
        _write_sheet(args.contact_sheet, tiles, names, len(paths))
    if damaged:
        raise unreadable(damaged, len(paths), "predicted")
    return 0


def _as_text(prediction: Prediction, names: Sequence[str]) -> str:
    lines = [printable_path(prediction.path)]
    for label, probability in zip(prediction.classes, prediction.probabilities, strict=True):
        lines.append(f"  {probability:7.2%}  {printable(names[label])}")
    return "\n".join(lines)


def _as_dict(prediction: Prediction, names: Sequence[str]) -> dict[str, Any]:
    if prediction.error:
        return {"file": str(prediction.path), "error": prediction.error}
    best = zip(prediction.classes, prediction.probabilities, strict=True)
    return {
        "file": str(prediction.path),
        "predictions": [{"class": label, "name": names[label], "probability": share} for label, share in best],
    }


def _check_sheet(path: Path) -> None:
    """Raises a UserError if the contact sheet cannot be written, to fail before the predictions."""
    if path.suffix.lower() != ".png":
        raise UsageError("the contact sheet is a PNG", str(path), "use a name that ends in .png")
    require_directory(path)


def _write_sheet(path: str, predictions: Sequence[Prediction], names: Sequence[str], total: int) -> None:
    from xception_jax.evaluation.contact_sheet import Tile, draw  # matplotlib takes a second to import

    if total > MAX_ON_SHEET:
        print(f"the contact sheet shows the first {len(predictions)} of {total:,} images", file=sys.stderr)
    tiles = [
        Tile(
            prediction.thumbnail,
            prediction.path.name,
            names[prediction.classes[0]],
            prediction.probabilities[0],
        )
        for prediction in predictions
        if prediction.thumbnail is not None
    ]
    write_output("contact sheet", path, draw(tiles))
