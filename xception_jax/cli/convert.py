"""`xception-jax convert`: converts weights of Keras, timm and our own, and of runs, into each other."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xception_jax.command_line import at_least
from xception_jax.config import ModelConfig, from_json, resolve_model
from xception_jax.errors import BadDataError, ConfigError, UsageError
from xception_jax.files import sha256
from xception_jax.names import LINE_LENGTH, printable
from xception_jax.user_files import parse_json, read_text, reading, require_outputs
from xception_jax.weights.sources import require_known

if TYPE_CHECKING:
    from xception_jax.weights import Network  # imports JAX

LAYOUTS = ("xception_jax", "timm", "keras")
NAMES = ("xception", "inception_v3", "inception_v3_2016")
EXAMPLES = """\
examples:
  the released weights of Keras, or any other Keras file (.h5, .weights.h5, .keras)
    xception-jax convert xception_weights_tf_dim_ordering_tf_kernels.h5 xception.safetensors
  a model that was fine-tuned in Keras: its Xception and its classifier
    xception-jax convert flowers.keras flowers.safetensors --classes flowers.txt
  timm's legacy_xception or inception_v3
    xception-jax convert model.safetensors xception.safetensors --classes imagenet
  a Keras model whose pixels were scaled to 0 to 1 before they reached it
    xception-jax convert flowers.h5 flowers.safetensors --mean 0 --std 1
  PyTorch weights of Cadene's pretrained-models, FaceForensics++ or DeepfakeBench, saved as safetensors
    xception-jax convert xception_best.safetensors deepfakes.safetensors --size 256
  a run: the Polyak average of its newest checkpoint
    xception-jax convert runs/flowers flowers.safetensors
  back to Keras, for keras.applications.Xception(weights=None).load_weights
    xception-jax convert xception.safetensors xception.weights.h5
  back to timm, for timm.create_model("legacy_xception", checkpoint_path="timm.safetensors")
    xception-jax convert xception.safetensors timm.safetensors --layout timm
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Converts weights of Xception and Inception V3, with their preprocessing and class names."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "source",
        help="a Keras file (.h5, .weights.h5, .keras), safetensors of PyTorch or of this package, or a work directory",
    )
    parser.add_argument("out", help="OUT.safetensors, or OUT.weights.h5 for Keras")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="naming scheme of the tensors (default: keras for OUT.weights.h5, otherwise xception_jax)",
    )
    parser.add_argument("--step", type=at_least(0), help="checkpoint of a run (default: the newest intact one)")
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        help=f"network of the weights: {', '.join(NAMES)}, or the config.json of a run; inferred by default",
    )
    parser.add_argument(
        "--head",
        action=argparse.BooleanOptionalAction,
        help="require the classifier, or leave it out; by default it is read if it fits",
    )
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line or as JSON; or 'imagenet'")
    parser.add_argument(
        "--size", type=at_least(1), help="side of the images in pixels, if the file does not specify it"
    )
    for name, meaning in (("mean", "subtracted from pixels between 0 and 1"), ("std", "what they are then divided by")):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{meaning}, one number or three; default: the values in the file, or 0.5: pixels from -1 to 1",
        )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Converts a weight file and prints a report.

    Raises:
      UsageError: an argument is invalid.
      InputMissingError: a file does not exist.
      BadDataError: the weights are damaged, refused, or do not fit.
      StorageError: the new file cannot be written.
    """
    layout = _layout(args)
    require_known(args.source)
    require_outputs([args.out], [args.source])
    scaling = _scaling(args)
    network = _read(args)
    network = dataclasses.replace(network, preprocessing=dataclasses.replace(network.preprocessing, **scaling))
    if args.classes is not None:
        network = dataclasses.replace(network, classes=_classes(args.classes, network))
    _writer(layout)(args.out, network)
    if layout != "xception_jax":
        what = "preprocessing, class names, or that an image can have several labels"
        print(f"note: the {layout} layout cannot store {what}; the report shows them", file=sys.stderr)
    _report(args, network)
    return 0


def _layout(args: argparse.Namespace) -> str:
    """Returns the layout, which the ending of the new file must have."""
    layout = args.layout or ("keras" if args.out.endswith(".weights.h5") else "xception_jax")
    ending = ".weights.h5" if layout == "keras" else ".safetensors"
    if not args.out.endswith(ending):
        raise UsageError(f"{args.out} does not end in {ending}", "out", "write to OUT.safetensors or OUT.weights.h5")
    return layout


def _scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of the preprocessing that are given, as three numbers each."""
    from xception_jax.weights.network import MAX_MEAN, MIN_STD

    found: dict[str, Any] = {}
    for name in ("mean", "std"):
        if (values := getattr(args, name)) is None:
            continue
        if len(values) not in (1, 3) or not all(math.isfinite(value) for value in values):
            what = f"--{name} is {' '.join(map(str, values))}"
            raise UsageError(what, f"--{name}", "give one finite number, or three")
        found[name] = tuple(values) if len(values) == 3 else tuple(values * 3)
    if min(found.get("std", (1.0,))) < MIN_STD:
        raise UsageError(
            "pixels cannot be divided by so small a number", "--std", f"give numbers of at least {MIN_STD:g}"
        )
    if max(map(abs, found.get("mean", (0.0,)))) > MAX_MEAN:
        raise UsageError("pixels from 0 to 1 have no such mean", "--mean", f"give numbers of at most {MAX_MEAN:g}")
    return found


def _writer(layout: str) -> Callable[[str, Network], None]:
    from xception_jax.weights import save_keras, save_network, save_timm

    return {"keras": save_keras, "timm": save_timm, "xception_jax": save_network}[layout]


def _read(args: argparse.Namespace) -> Network:
    """Reads the network from a weight file or the work directory of a run."""
    from xception_jax import runs  # JAX takes seconds to import
    from xception_jax.weights import load_network
    from xception_jax.weights.load import resized

    if not runs.is_run(args.source):
        if args.step is not None:
            raise UsageError(f"{args.source} is a weight file, which has no steps", "--step", "remove --step")
        model = None if args.model is None else _model(args.model)
        network = load_network(args.source, model, head=args.head, size=args.size)
    elif args.model is not None:
        raise UsageError("a run describes its network itself", "--model", "remove --model")
    else:
        network = runs.open_network(args.source, args.step)
        network = resized(network, network.source, args.size or network.preprocessing.size)
    if args.head is None:
        return network
    if args.head:
        runs.require_classifier(network)
        return network
    params = {name: layer for name, layer in network.variables["params"].items() if name != "head"}
    return dataclasses.replace(network, variables=network.variables | {"params": params}, classes=None)


def _model(name: str) -> ModelConfig:
    if name in NAMES:
        return resolve_model({"name": name})
    fix = f"choose among {', '.join(NAMES)}, or give the config.json of a run"
    with reading("model or file", name, fix, where="--model", damaged=ConfigError):
        return from_json(read_text(name)).model


def _classes(source: str, network: Network) -> tuple[str, ...]:
    from xception_jax.data.imagenet_classes import class_names
    from xception_jax.weights.network import both_names

    if "head" not in network.variables["params"]:
        raise UsageError("the weights have no classifier to name the classes of", "--classes", "leave --classes out")
    names = class_names() if source == "imagenet" else _read_names(Path(source))
    if network.has_single_logit:
        names = list(both_names(names))
    if len(names) != network.num_classes:
        what = f"{source} names {len(names)} classes, but the classifier has {network.num_classes}"
        raise BadDataError(what, "--classes", "give one name for each class, in the order of the labels")
    return tuple(names)


def _read_names(path: Path) -> list[str]:
    """Returns the names in a text file, a JSON list, or a JSON object.

    The object maps labels to names (or to Keras' [id, name]), or names to labels (Keras' `class_indices`,
    torchvision's `class_to_idx`).
    """
    with reading("list of names", path, "give a text file with one name per line", where="--classes"):
        text = read_text(path)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not text.lstrip().startswith(("[", "{")):
            return lines
        try:
            names = parse_json(text)
        except ValueError:
            if path.suffix == ".json":
                raise
            return lines  # the first name begins with a bracket
        if isinstance(names, dict) and all(isinstance(label, int) for label in names.values()):
            names = {str(label): name for name, label in names.items()}
        if isinstance(names, dict):
            names = [names[str(label)] for label in range(len(names))]
        names = [name[-1] if isinstance(name, list) else name for name in names]
        if not all(isinstance(name, str | int) for name in names):
            raise TypeError("a name is not text")
        return list(map(str, names))


def _report(args: argparse.Namespace, network: Network) -> None:
    from xception_jax.weights import tree

    sizes = [(name, leaf.size) for name, leaf in tree.flatten(network.variables).items()]
    report = {
        "path": args.out,
        "sha256": sha256(args.out),
        "source": args.source,
        "source_sha256": network.sha256,
        "model": tree.describe(network.model),
        "parameters": sum(size for name, size in sizes if name.startswith("params/")),
        "statistics": sum(size for name, size in sizes if name.startswith("batch_stats/")),
        "head": "head" in network.variables["params"],
        "num_classes": network.model.num_classes,
        "classes": None if network.classes is None else len(network.classes),
        "preprocessing": network.preprocessing.to_fields(),
    }
    lines = (f"{name:16}{printable(value, LINE_LENGTH)}" for name, value in report.items())
    print(json.dumps(report) if args.json else "\n".join(lines))
