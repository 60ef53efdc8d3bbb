"""`python -m xception_jax predict`: what a network takes images for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from xception_jax.data import folders, images
from xception_jax.data.prepare import imagenet
from xception_jax.errors import BadDataError, InputMissingError, StorageError, UsageError
from xception_jax.evaluation.network import open_network, require_classifier
from xception_jax.files import write_atomically
from xception_jax.logs.metrics import json_ready
from xception_jax.models import create_model
from xception_jax.weights import Network

MAX_ON_SHEET = 400
THUMBNAIL = 320  # longer side, in pixels
THREADS = 8


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


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says of one image.

    Attributes:
      path: of the image.
      classes: the most probable first; empty if the image cannot be read.
      probabilities: of these.
      error: why the image cannot be read, or ''.
      thumbnail: the image, uint8 RGB, if it was asked for.
    """

    path: Path
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""
    thumbnail: np.ndarray | None = None


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


def find_images(arguments: Sequence[str]) -> list[Path]:
    """Returns the files among the arguments, and the images in the folders among them, in alphabetical order.

    In folders links are followed, and hidden names passed over. What is named itself is taken whatever its name.

    Raises:
      InputMissingError: one of them is not there, or a folder holds no image.
      StorageError: a folder cannot be read.
    """
    found: dict[Path, None] = {}  # each once, in their order
    for argument in map(Path, arguments):
        if not os.path.exists(argument):  # unlike Path.exists also of a name that is too long for any file
            raise InputMissingError("there is no such image or folder", printable(argument), "correct the path")
        if not argument.is_dir():
            found[argument] = None
            continue
        files = [path for path in folders.files(argument) if path.suffix.lower() in images.SUFFIXES and path.is_file()]
        if not files:
            suffixes = ", ".join(images.SUFFIXES)
            raise InputMissingError("there is no image in the folder", printable(argument), f"names end in {suffixes}")
        found |= dict.fromkeys(files)
    return list(found)


def class_names(network: Network) -> list[str]:
    """Returns a name for each class, with words for ImageNet's WordNet ids.

    A file that names none is taken for ImageNet's if it has as many: those of Keras and timm are in this order.
    Otherwise classes have numbers.
    """
    words = imagenet.class_words()
    names = network.classes
    if names is None and network.model.num_classes == len(words):
        print("the weights do not name their 1,000 classes: they are taken for ImageNet's", file=sys.stderr)
        names = tuple(imagenet.class_names())
    if names is None:
        return [f"class {number}" for number in range(network.model.num_classes)]
    return [words.get(name, name) for name in names]


def predict(
    network: Network,
    paths: Sequence[Path],
    *,
    top: int = 5,
    batch_size: int = 32,
    thumbnails: int = 0,
) -> Iterator[Prediction]:
    """Predicts images in batches of equal size, so that one program is compiled, and loads the next one meanwhile.

    Args:
      network: with a classifier; it tells how logits become probabilities.
      paths: files of images.
      top: classes of each image.
      batch_size: images at a time.
      thumbnails: so many of the first images come with one.

    Yields:
      A prediction for each path, in their order.
    """
    model = create_model(network.model)
    top = min(top, network.model.num_classes)
    size = min(batch_size, len(paths))
    view = network.preprocessing
    activation = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}[network.probabilities]

    @jax.jit
    def forward(variables, pixels):
        logits, _ = model.apply(variables, pixels, train=False)
        return jax.lax.top_k(activation(logits), top)

    def load(number: int) -> tuple[np.ndarray, str, np.ndarray | None]:
        return _load(paths[number], view, number < thumbnails)

    variables = jax.device_put(network.variables)
    starts = range(0, len(paths), size)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="decode") as pool:
        following = pool.map(load, range(size))
        for start in starts:
            loaded = list(following)
            following = pool.map(load, range(start + size, min(start + 2 * size, len(paths))))
            pixels = np.zeros((size, view.size, view.size, 3), np.float32)
            for row, (image, _, _) in enumerate(loaded):
                pixels[row] = image
            probabilities, classes = jax.device_get(forward(variables, pixels))
            for row, (_, error, thumbnail) in enumerate(loaded):
                path = paths[start + row]
                if error:
                    yield Prediction(path, error=error)
                else:
                    best = tuple(map(int, classes[row])), tuple(map(float, probabilities[row]))
                    yield Prediction(path, *best, thumbnail=thumbnail)


def _load(path: Path, view: images.Preprocessing, thumbnail: bool) -> tuple[np.ndarray, str, np.ndarray | None]:
    """Returns the view of an image, black if it cannot be read; why it cannot; and its thumbnail if it is wanted."""
    pixels = np.zeros((view.size, view.size, 3), np.float32)
    try:
        image = images.decode(path.read_bytes())
    except images.DamagedImageError as error:
        return pixels, f"it cannot be decoded: {' '.join(str(error).split())}", None
    except OSError as error:
        return pixels, f"it cannot be read: {error.strerror}", None
    view(image, pixels)
    return pixels, "", images.thumbnail(image, THUMBNAIL) if thumbnail else None


def printable(path: str | Path) -> str:
    """Returns a path as one line of text: no control characters, and no bytes that are no text."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(path))


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
