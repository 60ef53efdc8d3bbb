"""Makes the card of an export: its origin, accuracy and use, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xception_jax.config import to_dict
from xception_jax.environment import installed_versions
from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.export.check import Difference
from xception_jax.export.formats import PLATFORMS, loading_code
from xception_jax.export.inference import in_float32
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.single_label import TopK
from xception_jax.models import create_model
from xception_jax.models.cost import count_cost
from xception_jax.names import NAME_LENGTH, in_markdown
from xception_jax.weights.network import Network

_PACKAGES = ("xception_jax", "jax", "jaxlib", "flax", "onnx", "onnxruntime", "safetensors")
_SHARES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "map_at_k": "mean average precision"}
_INPUTS = {
    "float32": "float32 [b, {size}, {size}, 3], RGB, preprocessed as below",
    "uint8": "uint8 [b, {size}, {size}, 3], RGB, 0 to 255, cropped and resized as below; the file scales them itself",
}


def make_card(
    network: Network,
    file: str,
    format: str,
    sha256: str,
    *,
    uint8: bool,
    evaluation: Mapping[str, Any] | None,
    difference: Difference | None,
) -> dict[str, Any]:
    """Returns a card as plain data.

    Args:
      network: the exported network.
      file: name of the file.
      format: of the file.
      sha256: of the file.
      uint8: whether the file takes pixels from 0 to 255.
      evaluation: as `run_evaluation` or `read_evaluation` returns it.
      difference: result of the check; None if there was no check.
    """
    model = network.model if format == "safetensors" else in_float32(network).model
    size = network.preprocessing.size
    cost = count_cost(create_model(model.replace(dtype="float32")), size)  # the same for every dtype
    images = "uint8" if uint8 else "float32"
    return {
        "file": file,
        "sha256": sha256,
        "format": format,
        "platforms": list(PLATFORMS) if format == "stablehlo" else None,
        "source": network.source,
        "source_sha256": network.sha256,
        "network": to_dict(model),
        "parameters": cost.parameters,
        "multiply_adds": cost.multiply_adds,
        "input": {"name": "images", "dtype": images, "shape": ["b", size, size, 3]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["b", model.num_classes]},
        "probabilities": network.probabilities,
        "batch_norm": "as trained" if format == "safetensors" else "folded into the convolutions",
        "preprocessing": dataclasses.asdict(network.preprocessing),
        "classes": None if network.classes is None else list(network.classes),
        "evaluation": None if evaluation is None else _telling(evaluation, model.num_classes),
        "check": None if difference is None else dataclasses.asdict(difference),
        "versions": {"python": platform.python_version()} | installed_versions(_PACKAGES),
        "load": _code(file, format, images, size),
    }


def _telling(evaluation: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """Returns the evaluation without a top-5 accuracy that is 1 for every network; older runs have recorded it."""
    hidden = () if TopK(5).suits(num_classes) else ("top5", "top5_interval")
    return {name: value for name, value in evaluation.items() if name not in hidden}


def _code(file: str, format: str, dtype: str, size: int) -> str:
    example = f'images = np.zeros((1, {size}, {size}, 3), "{dtype}")  # replace by your images'
    return "import numpy as np\n" + loading_code(file, format, example)


def run_evaluation(workdir: Path, step: int, prefix: str) -> dict[str, Any] | None:
    """Returns the accuracy of a checkpoint on the test split, or else on the development split; None if not measured.

    Args:
      workdir: work directory of the run.
      step: of the checkpoint.
      prefix: of the metrics of the exported variables, '' or 'ema_'.
    """
    entries = {entry["split"]: entry for entry in read_metrics(workdir / "metrics.jsonl") if entry["step"] == step}
    entry = entries.get("test") or entries.get("dev")
    return _accuracy(entry, prefix) if entry else None


def read_evaluation(path: Path, network: Network) -> dict[str, Any]:
    """Returns the accuracy from the output of `evaluate --json`, of the Polyak average if there is one.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: the file has other content, or is about another network.
    """
    try:
        metrics = json.loads(path.read_text())
        evaluation = _accuracy(metrics, "ema_" if any(f"ema_{name}" in metrics for name in _SHARES) else "")
    except FileNotFoundError:
        fix = "write it by `xception-jax evaluate SOURCE --json > FILE.json`"
        raise InputMissingError("there is no evaluation", str(path), fix) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"the evaluation cannot be read: {type(error).__name__}: {error}"
        raise BadDataError(what, str(path), "name a file with the output of `evaluate --json`") from None
    of = metrics.get("sha256")
    if of and of != network.sha256:
        raise BadDataError(
            f"the evaluation is about another network, with SHA-256 {of} instead of {network.sha256}",
            str(path),
            f"evaluate {network.source}",
        )
    return evaluation


def _accuracy(metrics: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns dataset, split, count and each share, with its interval if it is a proportion of independent images.

    Raises:
      KeyError: there is no share.
    """
    evaluation = {name: metrics[name] for name in ("dataset", "split", "step", "count") if name in metrics}
    count = float(evaluation["count"])
    for name in _SHARES:
        share = float(metrics.get(prefix + name, math.nan))
        if math.isfinite(share):
            evaluation[name] = share
            if name != "map_at_k":
                evaluation[f"{name}_interval"] = list(wilson_interval(share, count))
    if not any(name in evaluation for name in _SHARES):
        raise KeyError("top1")
    return evaluation


def as_markdown(card: Mapping[str, Any]) -> str:
    """Returns a card as Markdown."""
    size = card["preprocessing"]["size"]
    takes = _INPUTS[card["input"]["dtype"]].format(size=size)
    rows = {
        "file": f"{in_markdown(card['file'])}, {card['format']}" + _platforms(card),
        "SHA-256": f"`{card['sha256']}`",
        "made from": f"{in_markdown(card['source'])}, SHA-256 {in_markdown(card['source_sha256'])}",
        "network": f"{card['network']['name']}, {card['parameters']:,} parameters",
        "cost": f"{card['multiply_adds'] / 1e9:.3g} G multiply-adds per image",
        "input": f"`images`: {takes}",
        "output": f"`logits`: float32 [b, {card['network']['num_classes']}]; probabilities: {card['probabilities']}",
        "BatchNorm": card["batch_norm"],
        "accuracy": _accuracy_text(card["evaluation"]),
        "check": _check_text(card["check"]),
        "versions": ", ".join(f"{name} {version}" for name, version in card["versions"].items()),
    }
    lines = [
        f"# {in_markdown(card['file'])}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {text} |" for name, text in rows.items()),
    ]
    lines += ["", "## Preprocessing", "", _preprocessing_text(card["preprocessing"], card["input"]["dtype"])]
    lines += ["", "## Use", "", "```python", card["load"], "```", "", "## Classes", "", _classes_text(card)]
    fields = ", ".join(f"{name}={value!r}" for name, value in card["network"].items())
    return "\n".join([*lines, "", "## Network", "", f"`config.model`: {in_markdown(fields)}", ""])


def _platforms(card: Mapping[str, Any]) -> str:
    return f", for {', '.join(card['platforms'])}" if card["platforms"] else ""


def _accuracy_text(evaluation: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "not measured"
    parts = []
    for name, title in _SHARES.items():
        if name in evaluation:
            interval = evaluation.get(f"{name}_interval")
            between = f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
            parts.append(f"{title} {evaluation[name]:.4f}{between}")
    where = [in_markdown(evaluation[name]) for name in ("dataset", "split") if evaluation.get(name)]
    return f"{', '.join(parts)}; {evaluation['count']:,} images of {' '.join(where)}"


def _check_text(check: Mapping[str, Any] | None) -> str:
    if check is None:
        return "not done"
    return (
        f"run in a separate process; the largest difference of logits from the network in {check['images']} views of a"
        f" photograph is {check['largest']:.1e}, for logits of up to {check['logits']:.3g}"
    )


def _preprocessing_text(preprocessing: Mapping[str, Any], dtype: str) -> str:
    share, size, interpolation = (preprocessing[name] for name in ("crop", "size", "interpolation"))
    mean, std = (", ".join(f"{value:g}" for value in preprocessing[name]) for name in ("mean", "std"))
    resized = f"The central {share:.4g} of each side, resized to {size} x {size} ({interpolation})."
    if interpolation.startswith("antialiased_"):  # see data/images.antialiased_view
        shorter = math.floor(size / share)
        resized = f"The shorter side resized to {shorter} ({interpolation}), then the central {size} x {size}."
    where = "In the file" if dtype == "uint8" else "Then"
    return f"{resized} {where}: (pixel / 255 - mean) / std, with mean {mean} and std {std} for red, green, blue."


def _classes_text(card: Mapping[str, Any]) -> str:
    names, number = card["classes"], card["network"]["num_classes"]
    if names is None:
        return f"{number:,} classes without names."
    shown = ", ".join(f"{index} {in_markdown(name, NAME_LENGTH)}" for index, name in enumerate(names[:20]))
    return f"{number:,}: {shown}" + (f", and {number - 20:,} more in the JSON file." if number > 20 else ".")
