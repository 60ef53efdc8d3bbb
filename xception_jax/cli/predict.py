"""`python -m xception_jax predict`: the most probable classes of images."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xception_jax.errors import BadDataError, InputMissingError, StorageError, UsageError
from xception_jax.evaluation.predict import Prediction, class_names, find_images, predict, printable
from xception_jax.files import write_atomically
from xception_jax.logs.metrics_log import json_ready
from xception_jax.runs import open_network, require_classifier

MAX_ON_SHEET = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Names the most probable classes of JPEG, PNG and WebP images."
    parser.epilog = (
        'With --json each line is an object {"file", "predictions": [{"class", "name", "probability"}]}, the most '
        'probable first; or {"file", "error"} for an image that cannot be read. If there is one, the exit code is 65.'
    )
    parser.add_argument("images", nargs="+", metavar="PATH", help="images, and folders that are searched for them")
    parser.add_argument("--weights", required=True, metavar="SOURCE", help="weight file, or work directory of a run")
    parser.add_argument("--step", type=int, help="checkpoint of a run; by default the newest that is intact")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes of each image (default: 5)")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument(
        "--sigmoid", action="store_true", help="each class by itself, for weights that do not tell; a run's do"
    )
    parser.add_argument("--contact_sheet", metavar="FILE.png", help="draw a PNG of the images with their best class")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Predicts, prints, and draws the contact sheet.

    Raises:
      UsageError: a number is not positive, or the contact sheet is to be no PNG.
      InputMissingError: the network or an image is not there.
      BadDataError: the network is damaged, or, after all others were predicted, images are.
    """
    for name in ("top", "batch_size"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} is {getattr(args, name)}", f"--{name}", "set it to a whole number, at least 1")
    if args.contact_sheet:
        _check_sheet(Path(args.contact_sheet))
    paths = find_images(args.images)
    network = open_network(args.weights, args.step)
    require_classifier(network)
    if args.sigmoid:
        network = dataclasses.replace(network, multi_label=True)
    names = class_names(network)
    shown = min(len(paths), MAX_ON_SHEET) if args.contact_sheet else 0
    predictions = predict(network, paths, top=args.top, batch_size=args.batch_size, thumbnails=shown)
    damaged, tiles = [], []
    for prediction in tqdm(predictions, "predicting", len(paths), unit="img", disable=None):
        if prediction.error:
            damaged.append(prediction.path)
            tqdm.write(f"{printable(prediction.path)}: {prediction.error}", file=sys.stderr)
        if args.json:
            tqdm.write(json.dumps(json_ready(_as_dict(prediction, names))))
        elif not prediction.error:
            tqdm.write(_as_text(prediction, names))
        if prediction.thumbnail is not None:
            tiles.append(prediction)
    if args.contact_sheet and tiles:
        _write_sheet(args.contact_sheet, tiles, names, len(paths))
    if damaged:
        others = ", all others were predicted" if len(damaged) < len(paths) else ""
        raise BadDataError(
            f"{len(damaged):,} of {len(paths):,} images cannot be read{others}",
            ", ".join(printable(path) for path in damaged[:10]),
            "they are damaged, or neither JPEG nor PNG nor WebP: replace them",
        )
    return 0


def _as_text(prediction: Prediction, names: Sequence[str]) -> str:
    lines = [printable(prediction.path)]
    for label, probability in zip(prediction.classes, prediction.probabilities, strict=True):
        lines.append(f"  {probability:7.2%}  {names[label]}")
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
    """Raises a UserError, now and not after all is predicted, if the contact sheet cannot be written there."""
    if path.suffix.lower() != ".png":
        raise UsageError("a contact sheet is a PNG", str(path), "let its name end in .png")
    if not path.absolute().parent.is_dir():
        raise InputMissingError("there is no such directory", str(path), "make it first, or write elsewhere")


def _write_sheet(path: str, predictions: Sequence[Prediction], names: Sequence[str], total: int) -> None:
    from xception_jax.evaluation.contact_sheet import Tile, draw  # matplotlib takes a second to import

    if total > MAX_ON_SHEET:
        print(f"the contact sheet shows the first {len(predictions)} of {total:,} images", file=sys.stderr)
    tiles = [
        Tile(
            prediction.thumbnail,
            printable(prediction.path.name),
            names[prediction.classes[0]],
            prediction.probabilities[0],
        )
        for prediction in predictions
        if prediction.thumbnail is not None
    ]
    try:
        write_atomically(path, draw(tiles))
    except OSError as error:
        raise StorageError(
            f"the contact sheet cannot be written: {error.strerror}", path, "write it elsewhere"
        ) from None
