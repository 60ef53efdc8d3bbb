"""`xception-jax explain` shows which parts of an image support a class."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xception_jax.cli.image_files import add_limits, limits, unreadable
from xception_jax.command_line import at_least
from xception_jax.errors import BadDataError, UsageError
from xception_jax.explain.options import BASELINES, METHODS, STEPS
from xception_jax.explain.paths import check_apart, check_file, check_output, is_file
from xception_jax.logs.metrics_log import json_ready
from xception_jax.names import LINE_LENGTH, printable, printable_path
from xception_jax.user_files import require_outputs
from xception_jax.weights.sources import require_known

if TYPE_CHECKING:
    from xception_jax.weights import Network

OUT = "explanation.png"
MAX_RESIDUAL = 0.05  # share of the change of a logit that integrated gradients may miss without a note

EXAMPLES = """\
A file for --out holds one image beside its map, or a contact sheet if there are several images; a folder gets a
picture of each. With --json, each line is an object {"file", "class", "name", "probability"}, or {"file", "error"} for
an image that cannot be read. If an image cannot be read, the exit code is 65.

examples:
  xception-jax explain --weights runs/fashion_mnist photo.jpg
  xception-jax explain --weights xception.safetensors photos/ --class tabby --out sheet.png
  xception-jax explain --weights xception.safetensors photos/ --method hires_cam --block block4 --out maps/
  xception-jax explain --weights xception.safetensors photos/ --sanity
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Draws heat maps of the parts of images that support a class."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("images", nargs="+", metavar="PATH", help="images, or folders to search for images")
    parser.add_argument(
        "--weights",
        required=True,
        metavar="SOURCE",
        help="weight file, name of public weights, or work directory of a run",
    )
    parser.add_argument("--step", type=at_least(0), help="checkpoint of a run (default: the newest intact one)")
    parser.add_argument("--method", choices=METHODS, default="grad_cam", help="default: grad_cam")
    parser.add_argument(
        "--class",
        dest="label",
        metavar="NAME|INDEX",
        help="class to explain (default: the most probable of each image)",
    )
    parser.add_argument(
        "--block",
        metavar="NAME",
        help="for grad_cam, hires_cam: block of the network (default: the last with 4 x 4 positions)",
    )
    parser.add_argument(
        "--steps", type=at_least(1), metavar="N", help=f"for integrated_gradients: points (default: {STEPS})"
    )
    parser.add_argument(
        "--baseline",
        choices=BASELINES,
        help=f"for integrated_gradients: image without evidence (default: {next(iter(BASELINES))})",
    )
    parser.add_argument("--out", default=OUT, metavar="FILE.png|FOLDER", help=f"where to draw (default: {OUT})")
    parser.add_argument("--npz", metavar="FILE.npz", help="also save the maps as arrays")
    parser.add_argument("--batch_size", type=at_least(1), default=8, metavar="N", help="images per batch (default: 8)")
    add_limits(parser)
    parser.add_argument(
        "--sanity",
        action="store_true",
        help="draw nothing; compare the maps of the first batch with those of randomized networks",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Explains the images, prints what was explained, and writes the pictures.

    Raises:
      UsageError: the arguments are not valid together, or there is no such class or block.
      InputMissingError: the network, an image or a folder is missing.
      BadDataError: the network is damaged, or some images are. All other images have been explained then.
    """
    _check(args)
    from tqdm import tqdm

    from xception_jax.evaluation.predict import class_names, find_images

    paths = find_images(args.images, but=None if args.sanity or is_file(args.out) else Path(args.out))
    if not args.sanity:
        check_apart(args.out, paths)
    require_outputs([args.npz], paths)
    require_known(args.weights)
    from xception_jax.explain import files  # JAX takes seconds to import
    from xception_jax.explain.explainer import explain_files, make_explainer
    from xception_jax.runs import open_network, require_classifier

    network = open_network(args.weights, args.step)
    require_classifier(network)
    names = class_names(network)
    label = None if args.label is None else find_class(args.label, names, network.classes or ())
    block = _find_block(network, args.block) if "block" in METHODS[args.method].options else None
    explainer = make_explainer(
        network,
        args.method,
        label,
        block=block,
        steps=args.steps,
        baseline=args.baseline,
        batch_size=args.batch_size,
    )
    if args.sanity:
        return _check_sanity(args, network, explainer, paths)
    describer = files.Describer(network, names, args.method, block)
    output = files.make_output(args.out, describer, len(paths))
    options = {"thumbnails": output.thumbnails, "longest": output.longest, "batch_size": args.batch_size}
    explained = explain_files(network, explainer, paths, **options, limits=limits(args))
    damaged, kept, residuals = [], [], []
    for each in tqdm(explained, "explaining", len(paths), unit="img", disable=None):
        entry: dict[str, Any] = {"file": str(each.path)}
        if each.error:
            damaged.append(each.path)
            tqdm.write(f"{printable_path(each.path)}: {printable(each.error)}", file=sys.stderr)
            entry["error"] = each.error
        else:
            output.add(each)
            residuals.append(each.residual)
            entry |= {"class": each.label, "name": describer.label(each), "probability": each.probability}
            if args.npz:
                kept.append(dataclasses.replace(each, thumbnail=None))  # large, and not saved
        if args.json:
            tqdm.write(json.dumps(json_ready(entry)))
        elif not each.error:
            tqdm.write(f"{printable_path(each.path)}  {each.probability:.2%}  {printable(entry['name'])}")
    if written := output.finish():
        print(printable(written, LINE_LENGTH), file=sys.stderr)
    if kept:
        files.save_maps(args.npz, kept, args.method, block)
    _report_problems(residuals, damaged, len(paths))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Checks the arguments that need neither the network nor JAX."""
    readers = {option: name for name, method in METHODS.items() for option in method.options}
    for option, reader in readers.items():
        if getattr(args, option) is not None and option not in METHODS[args.method].options:
            what = f"{args.method} does not read --{option}"
            raise UsageError(what, f"--{option}", f"remove it, or use --method {reader}")
    if args.sanity and args.npz:
        raise UsageError("--sanity saves no maps", "--npz", "remove one of them")
    if args.npz:
        check_file(args.npz, ".npz")
    if not args.sanity:
        check_output(args.out)


def find_class(wanted: str, names: Sequence[str], identifiers: Sequence[str]) -> int:
    """Returns the number of a class that is given by name, identifier (such as a WordNet id) or number.

    Args:
      wanted: what the user wrote; case does not matter.
      names: names in the order of the classes.
      identifiers: names of the classes in the weights.

    Raises:
      UsageError: there is no such class, or several classes have the name.
    """
    for known in (names, identifiers):
        found = [number for number, name in enumerate(known) if name.casefold() == wanted.casefold()]
        if len(found) > 1:
            numbers = ", ".join(map(str, found))
            raise UsageError(f"{len(found)} classes are called {wanted!r}", "--class", f"use a number: {numbers}")
        if found:
            return found[0]
    if wanted.isdecimal() and len(wanted) < 20 and int(wanted) < len(names):
        return int(wanted)
    close = difflib.get_close_matches(wanted, names, 3, 0.5) or names[:3]
    examples = ", ".join(repr(printable(name)) for name in close)
    fix = f"use a number from 0 to {len(names) - 1}, or a name such as {examples}"
    raise UsageError(f"the network has no class {wanted!r}", "--class", fix)


def _find_block(network: Network, wanted: str | None) -> str:
    """Returns the name of a block of the network, by default the last whose map is worth drawing.

    Raises:
      UsageError: there is no such block.
    """
    from xception_jax.explain.endpoints import MIN_SIDE, last_drawable, list_endpoints
    from xception_jax.models import create_model

    model, size = create_model(network.model), network.preprocessing.size
    blocks = list_endpoints(model, network.variables, size)
    if wanted is not None and wanted not in blocks:
        raise UsageError(f"the network has no block {wanted!r}", "--block", f"choose one of {', '.join(blocks)}")
    block = wanted or last_drawable(model, network.variables, size)
    if block not in list_endpoints(model, network.variables, size, MIN_SIDE):
        what = f"the map of {block} has fewer than {MIN_SIDE} positions a side, so it shows little"
        print(f"note: {what}; choose an earlier block with --block", file=sys.stderr)
    return block


def _check_sanity(args: argparse.Namespace, network: Network, explainer: Any, paths: Sequence[Path]) -> int:
    """Prints how similar the maps of the first batch are to those of randomized networks."""
    from tqdm import tqdm

    from xception_jax.evaluation.loading import load_batches
    from xception_jax.explain import sanity

    batch = next(load_batches(paths, network.preprocessing, args.batch_size, limits=limits(args)))
    readable = [not error for error in batch.errors]
    damaged = {path: error for path, error in zip(batch.paths, batch.errors, strict=True) if error}
    for path, error in damaged.items():
        print(f"{printable_path(path)}: {printable(error)}", file=sys.stderr)
    if not any(readable):
        raise BadDataError(batch.errors[0], str(batch.paths[0]), "use intact JPEG, PNG or WebP images")
    cascade = sanity.cascade(network, explainer, batch.pixels[: len(readable)][readable])
    rows = list(tqdm(cascade, "randomizing", unit="block", disable=None))
    meaning = sanity.verdict(rows[-1].correlation)
    if args.json:
        for row in rows:
            print(json.dumps(json_ready(row._asdict())))
        print(json.dumps({"verdict": meaning}))
    else:
        print(sanity.as_text(rows, METHODS[args.method].title, sum(readable)), meaning, sep="\n")
    if damaged:
        raise unreadable(list(damaged), len(batch.paths), "used")
    return 0


def _report_problems(residuals: Sequence[float], damaged: Sequence[Path], total: int) -> None:
    missed = [residual for residual in residuals if residual > MAX_RESIDUAL]
    if missed:
        what = f"{len(missed):,} maps miss more than {MAX_RESIDUAL:.0%} of the change of the logit"
        print(f"note: {what}, up to {max(missed):.0%}; increase --steps", file=sys.stderr)
    if damaged:
        raise unreadable(damaged, total, "explained")
