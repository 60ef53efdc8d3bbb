"""`xception-jax export`: writes a network as a file for other programs, checks it, and writes its card."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xception_jax.command_line import at_least
from xception_jax.errors import InputMissingError, StorageError, UsageError
from xception_jax.files import free_space, sha256, write_atomically
from xception_jax.names import printable_path
from xception_jax.user_files import require_outputs
from xception_jax.weights.sources import require_known

if TYPE_CHECKING:
    from xception_jax.export.check import Difference
    from xception_jax.weights.network import Network

EXAMPLES = """\
examples:
  xception-jax export runs/fashion_mnist exports --format stablehlo
  xception-jax export xception.safetensors exports/xception.onnx --format onnx --uint8
  xception-jax export runs/fashion_mnist small.safetensors --format safetensors
  xception-jax export runs/fashion_mnist exports --format stablehlo --check_only

Also writes FILE.sha256 (for sha256sum --check), FILE.json and FILE.md (the card).
"""
FORMATS = ("stablehlo", "onnx", "safetensors")
_EXTRAS = {"onnx": ("onnx", "onnxruntime")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Writes a network as one file, runs the file in a separate process and compares the logits."
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="weight file, name of public weights, or work directory of a run")
    parser.add_argument("out", help="a directory, or a file whose name ends with the format")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--step", type=at_least(0), help="checkpoint of the run (default: the newest intact one)")
    parser.add_argument("--uint8", action="store_true", help="take pixels from 0 to 255, which the file scales itself")
    parser.add_argument("--evaluation", metavar="FILE.json", help="output of `evaluate --json`, for the card")
    parser.add_argument("--no_check", action="store_true", help="do not check the file")
    parser.add_argument("--check_only", action="store_true", help="check an existing file; write nothing")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")


def run(args: argparse.Namespace) -> int:
    """Exports and checks a network, or only checks an export, and prints a summary.

    Raises:
      UsageError: the arguments contradict each other.
      InputMissingError: the network, a file or a package is missing.
      BadDataError: the source or the export is damaged, or the export computes something else.
      StorageError: the export cannot be written.
    """
    _check_arguments(args)
    require_known(args.source)
    from xception_jax.export.card import as_markdown, make_card  # JAX takes seconds to import
    from xception_jax.export.check import check_sha256, checksum_line
    from xception_jax.export.formats import write_network
    from xception_jax.runs import require_classifier

    network, evaluation = _open(args)
    require_classifier(network)
    path = _path(args.out, network, args.format)
    if args.check_only:
        if not path.is_file():
            raise InputMissingError("there is no export", str(path), "remove --check_only to write it")
        check_sha256(path)
        found = _check(args, path, network, str(path))
        print(json.dumps(dataclasses.asdict(found)) if args.json else _summary(path, found))
        return 0
    if path.parent.is_dir():
        outputs = [f"{path}{ending}" for ending in ("", ".sha256", ".json", ".md")]
        require_outputs(outputs, [args.source, *([args.evaluation] if args.evaluation else [])])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file gets its name only after the check.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            draft = Path(scratch) / path.name
            write_network(network, draft, args.format, uint8=args.uint8)
            difference = None if args.no_check else _check(args, draft, network, str(path))
            card = make_card(
                network,
                path.name,
                args.format,
                sha256(draft),
                uint8=args.uint8,
                evaluation=evaluation,
                difference=difference,
            )
            draft.replace(path)
        write_atomically(f"{path}.sha256", checksum_line(card["sha256"], path.name))
        text = json.dumps(card, indent=2)
        write_atomically(f"{path}.json", text + "\n")
        write_atomically(f"{path}.md", as_markdown(card))
    except OSError as error:
        room = f"{path.parent} ({free_space(path.parent)})" if path.parent.is_dir() else str(path.parent)
        what = f"the export cannot be written: {error.strerror or error}"
        raise StorageError(what, room, "free some space or choose another directory") from None
    print(text if args.json else _summary(path, difference))
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.uint8 and args.format == "safetensors":
        raise UsageError("safetensors hold weights and cannot scale pixels", "--uint8", "remove --uint8")
    if args.no_check and args.check_only:
        raise UsageError("--no_check and --check_only contradict each other", "the command line", "remove one of them")
    if args.evaluation and args.check_only:
        raise UsageError("--check_only writes no model card", "--evaluation", "remove one of them")
    for package in _EXTRAS.get(args.format, ()):
        if importlib.util.find_spec(package) is None:
            fix = f"pip install {' '.join(_EXTRAS[args.format])}"
            raise InputMissingError(f"the package {package} is not installed", f"--format={args.format}", fix)


def _open(args: argparse.Namespace) -> tuple[Network, dict[str, Any] | None]:
    """Returns the network and its accuracy, if that is known."""
    from xception_jax.export.card import read_evaluation, run_evaluation
    from xception_jax.runs import is_run, open_network, open_run, run_network

    evaluation = None
    if is_run(args.source):
        run = open_run(args.source, args.step)
        network = run_network(args.source, run)
        if not args.evaluation:
            evaluation = run_evaluation(args.source, run.step, run.eval_prefix)
    else:
        network = open_network(args.source, args.step)
    if args.evaluation:
        evaluation = read_evaluation(Path(args.evaluation), network)
    return network, evaluation


def _path(out: str, network: Network, format: str) -> Path:
    path = Path(out)
    if path.suffix == f".{format}":
        return path
    if path.is_file() or path.suffix in {f".{other}" for other in FORMATS}:
        raise UsageError(f"{out} does not end in .{format}", "out", "choose a directory, or a name with this ending")
    return path / f"{network.model.name}.{format}"


def _check(args: argparse.Namespace, path: Path, network: Network, name: str) -> Difference:
    from xception_jax.export.check import check_export
    from xception_jax.export.inference import in_float32, make_reference

    reference = make_reference(network if args.format == "safetensors" else in_float32(network))
    return check_export(path, args.format, network, reference, uint8=args.uint8, name=name)


def _summary(path: Path, difference: Difference | None) -> str:
    lines = [f"{printable_path(path)}: {path.stat().st_size:,} bytes"]
    if difference is not None:
        lines.append(
            f"largest difference from the network: {difference.largest:.2g} in logits of up to {difference.logits:.3g}"
            f" ({difference.images} views of a photograph)"
        )
    return "\n".join(lines)
