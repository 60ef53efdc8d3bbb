"""`xception-jax convert`: converts weights of Keras or timm to our safetensors, and back to Keras."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from xception_jax.config import ModelConfig, from_json, resolve_model
from xception_jax.data.imagenet_classes import class_names
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.files import sha256
from xception_jax.weights.sources import require_known

if TYPE_CHECKING:
    from xception_jax.weights import Network

NAMES = ("xception", "inception_v3", "inception_v3_2016")
EXAMPLES = """\
examples:
  the released weights of Keras, or any other Keras file (.h5, .weights.h5, .keras)
    xception-jax convert xception_weights_tf_dim_ordering_tf_kernels.h5 xception.safetensors
  a model that was fine-tuned in Keras: its Xception and its classifier
    xception-jax convert flowers.keras flowers.safetensors --classes flowers.txt
  timm's legacy_xception or inception_v3
    xception-jax convert model.safetensors xception.safetensors --classes imagenet
  back to Keras, for keras.applications.Xception(weights=None).load_weights
    xception-jax convert xception.safetensors xception.weights.h5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Converts weights of Xception and Inception V3, with their preprocessing and class names."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="a Keras file (.h5, .weights.h5, .keras), or safetensors of timm or our own")
    parser.add_argument("out", help="OUT.safetensors, or OUT.weights.h5 for Keras")
    parser.add_argument(
        "--model",
        metavar="NAME|FILE",
        help=f"network of the weights: {', '.join(NAMES)}, or the config.json of a run; inferred by default",
    )
    parser.add_argument(
        "--head",
        action=argparse.BooleanOptionalAction,
        help="require the classifier of a Keras or timm file, or leave it out; by default it is read if it fits",
    )
    parser.add_argument("--classes", metavar="FILE", help="class names, one per line or as JSON; or 'imagenet'")
    parser.add_argument("--size", type=int, help="side of the images in pixels, if the file does not specify it")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Converts a weight file and prints a report.

    Raises:
      UsageError: an argument is invalid.
      InputMissingError: a file does not exist.
      BadDataError: the weights are damaged, refused, or do not fit.
      StorageError: the new file cannot be written.
    """
    to_keras = args.out.endswith(".weights.h5")
    if not to_keras and not args.out.endswith(".safetensors"):
        raise UsageError(f"{args.out} has an unknown ending", "out", "write to OUT.safetensors or OUT.weights.h5")
    if args.size is not None and args.size < 1:
        raise UsageError(f"--size is {args.size}", "--size", "give a number of pixels")
    require_known(args.source)
    from xception_jax.weights import load_network, save_keras, save_network  # JAX takes seconds to import

    model = None if args.model is None else _model(args.model)
    network = load_network(args.source, model, head=args.head, size=args.size)
    if args.classes is not None:
        network = dataclasses.replace(network, classes=_classes(args.classes, network))
    (save_keras if to_keras else save_network)(args.out, network)
    _report(args, network)
    return 0


def _model(name: str) -> ModelConfig:
    if name in NAMES:
        return resolve_model({"name": name})
    try:
        return from_json(Path(name).read_text()).model
    except FileNotFoundError:
        fix = f"choose among {', '.join(NAMES)}, or give the config.json of a run"
        raise InputMissingError(f"there is no model or file {name}", "--model", fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadDataError(f"{name} cannot be read: {error}", "--model", "give the config.json of a run") from None


def _classes(source: str, network: Network) -> tuple[str, ...]:
    if "head" not in network.variables["params"]:
        raise UsageError("the weights have no classifier to name the classes of", "--classes", "leave --classes out")
    names = class_names() if source == "imagenet" else _read_names(Path(source))
    if len(names) != network.model.num_classes:
        what = f"{source} names {len(names)} classes, but the classifier has {network.model.num_classes}"
        raise BadDataError(what, "--classes", "give one name for each class, in the order of the labels")
    return tuple(names)


def _read_names(path: Path) -> list[str]:
    """Returns the names in a text file, a JSON list, or a JSON object.

    The object maps labels to names (or to Keras' [id, name]), or names to labels (Keras' `class_indices`,
    torchvision's `class_to_idx`).
    """
    if not path.is_file():
        raise InputMissingError(f"there is no file {path}", "--classes", "give a text file with one name per line")
    try:
        text = path.read_text()
        if not text.lstrip().startswith(("[", "{")):
            return [line.strip() for line in text.splitlines() if line.strip()]
        names = json.loads(text)
        if isinstance(names, dict) and all(isinstance(label, int) for label in names.values()):
            names = {str(label): name for name, label in names.items()}
        if isinstance(names, dict):
            names = [names[str(label)] for label in range(len(names))]
        return [str(name[-1] if isinstance(name, list) else name) for name in names]
    except (OSError, ValueError, KeyError, IndexError, RecursionError) as error:
        raise BadDataError(f"{path} cannot be read: {error}", "--classes", "give one name per line") from None


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
        "preprocessing": dataclasses.asdict(network.preprocessing),
    }
    print(json.dumps(report) if args.json else "\n".join(f"{name:16}{value}" for name, value in report.items()))
