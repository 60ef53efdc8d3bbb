"""Makes the card of an export: its origin, accuracy and use, as JSON and as Markdown."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xception_jax.config import to_dict
from xception_jax.environment import installed_versions
from xception_jax.errors import BadDataError
from xception_jax.export.check import Difference
from xception_jax.export.formats import PLATFORMS, loading_code
from xception_jax.export.inference import in_float32
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.single_label import TopK
from xception_jax.models import create_model
from xception_jax.models.cost import COSTS, count_cost
from xception_jax.names import NAME_LENGTH, in_markdown
from xception_jax.training.run_directory import metrics_of_run
from xception_jax.user_files import read_json, reading
from xception_jax.weights.network import Network

_PACKAGES = ("xception_jax", "jax", "jaxlib", "flax", "onnx", "onnxruntime", "safetensors")
_SHARES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "map_at_k": "mean average precision"}
_FACTS = {"dataset": str, "split": str, "step": int, "count": int}
_MAX_COUNT = 2**53  # larger integers are not exact as floats
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
      format: format of the file.
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
        **{name: getattr(cost, name) for name in COSTS},
        "input": {"name": "images", "dtype": images, "shape": ["b", size, size, 3]},
        "output": {"name": "logits", "dtype": "float32", "shape": ["b", model.num_classes]},
        "probabilities": network.probabilities,
        "batch_norm": "as trained" if format == "safetensors" else "folded into the convolutions",
        "preprocessing": network.preprocessing.to_fields(),
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


def run_evaluation(workdir: str, step: int, prefix: str) -> dict[str, Any] | None:
    """Returns the accuracy of a checkpoint on the test split, or else on the development split; None if not measured.

    Args:
      workdir: work directory of the run, or its address.
      step: step of the checkpoint.
      prefix: prefix of the metrics of the exported variables, '' or 'ema_'.
    """
    entries = {entry["split"]: entry for entry in metrics_of_run(workdir) if entry["step"] == step}
    entry = entries.get("test") or entries.get("dev")
    if not entry or not any(_is_known(entry.get(prefix + name)) for name in _SHARES):
        return None  # such as MAP of a split in which no image has a label
    with reading("metrics", f"{workdir}/metrics.jsonl", "pass --evaluation, or restore the file"):
        return _accuracy(entry, prefix, independent=not entry.get("groups"))


def _is_known(share: Any) -> bool:
    return share is not None and not (isinstance(share, float) and math.isnan(share))


def read_evaluation(path: Path, network: Network) -> dict[str, Any]:
    """Returns the accuracy from the output of `evaluate --json`, of the Polyak average if there is one.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: the file has other content, or is about another network.
    """
    with reading("evaluation", path, "write it by `xception-jax evaluate SOURCE --json > FILE.json`"):
        metrics = read_json(path, dict)
        prefix = "ema_" if any(f"ema_{name}" in metrics for name in _SHARES) else ""
        evaluation = _accuracy(metrics, prefix, independent=not metrics.get("judgement", {}).get("groups"))
    of = metrics.get("sha256")
    if of and of != network.sha256:
        raise BadDataError(
            f"the evaluation is about another network, with SHA-256 {of} instead of {network.sha256}",
            str(path),
            f"evaluate {network.source}",
        )
    return evaluation


def _accuracy(metrics: Mapping[str, Any], prefix: str, *, independent: bool) -> dict[str, Any]:
    """Returns dataset, split, count and each share, with its interval if it is a proportion of independent images.

    Args:
      metrics: an entry of metrics.jsonl, or the output of `evaluate --json`.
      prefix: prefix of the metrics, '' or 'ema_'.
      independent: whether the images are; those of a group are not.

    Raises:
      KeyError: there is no count or no share.
      TypeError: a value has another type.
      ValueError: a number is out of range.
    """
    evaluation = {name: metrics[name] for name in _FACTS if name in metrics}
    for name, value in evaluation.items():
        if type(value) is not _FACTS[name]:  # a bool is an int for `isinstance`
            raise TypeError(f"{name} is {type(value).__name__}, not {_FACTS[name].__name__}")
    if not 0 <= evaluation["count"] < _MAX_COUNT:
        raise ValueError("count is out of range")
    for name in _SHARES:
        share = metrics.get(prefix + name, math.nan)
        if type(share) not in (float, int):
            raise TypeError(f"{name} is {type(share).__name__}, not float")
        if type(share) is int or math.isfinite(share):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is not between 0 and 1")
            evaluation[name] = float(share)
            if independent and name != "map_at_k":
                evaluation[f"{name}_interval"] = list(wilson_interval(share, evaluation["count"]))
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
        "live": f"{card['live_parameters']:,} parameters, {card['live_multiply_adds'] / 1e9:.3g} G multiply-adds, "
        "without weights that meet only padding and without products of padding",
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
    scaled = f"{resized} {where}: (pixel / 255 - mean) / std, with mean {mean} and std {std} for red, green, blue."
    turn = preprocessing.get("turn")
    if turn is None:
        return scaled
    return f"{scaled} Last: turned ({turn['kind']}, angle {turn['angle']:g}, seed {turn['seed']}; data/turn.py)."


def _classes_text(card: Mapping[str, Any]) -> str:
    names, number = card["classes"], card["network"]["num_classes"]
    if names is None:
        return f"{number:,} classes without names." if number > 1 else "One logit; the file does not name its classes."
    number = len(names)
    shown = ", ".join(f"{index} {in_markdown(name, NAME_LENGTH)}" for index, name in enumerate(names[:20]))
    return f"{number:,}: {shown}" + (f", and {number - 20:,} more in the JSON file." if number > 20 else ".")
