"""Weights of timm's `legacy_xception` and `inception_v3` (torchvision's too), from safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from xception_jax.config import resolve_model
from xception_jax.errors import BadDataError
from xception_jax.weights import guard, tree
from xception_jax.weights.keras import Imported
from xception_jax.weights.network import Preprocessing

EPSILONS = {"xception": 1e-5, "inception_v3": 1e-3}
# PyTorch's bicubic resizing of images (by Pillow) is antialiased.
PREPROCESSING = {
    "xception": Preprocessing(crop=0.8975, interpolation="antialiased_bicubic"),
    "inception_v3": Preprocessing(crop=0.875, interpolation="antialiased_bicubic"),
}
_INTERPOLATIONS = {"bilinear": "antialiased_bilinear", "bicubic": "antialiased_bicubic"}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_MODULES = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_ONE_CONVOLUTION = ("1x1_0", "pool_0")
_SPLIT = {"3x3_1x3": "3x3_2a", "3x3_3x1": "3x3_2b", "3x3dbl_1x3": "3x3dbl_3a", "3x3dbl_3x1": "3x3dbl_3b"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def load_timm(path: str | os.PathLike, model: ConfigDict) -> dict[str, Any]:
    """Reads the weights of timm's `legacy_xception` or `inception_v3`.

    timm pads max pools and counts padding in average pools: `model.padding='symmetric'`; the epsilon of BatchNorm is
    1e-5 in `legacy_xception` and 1e-3 in `inception_v3`, whose BatchNorm has a scale. Another padding or epsilon in
    `model` is accepted with a line on standard error.

    Args:
      path: safetensors with timm's names, as `model.safetensors` of the Hugging Face hub.
      model: `config.model` of the network. With `aux_head` the auxiliary classifier is read too, otherwise left out.

    Returns:
      {'params', 'batch_stats'}, NumPy arrays; without `params['head']` if the file has no classifier.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: it is damaged, or does not fit; the message names what is missing or left over.
    """
    path = Path(path)
    guard.require_file(path)
    tensors = read_tensors(path)
    imported = import_timm(tensors, path, model)
    imported.print_notes()
    return imported.variables


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file.

    Raises:
      BadDataError: it is something else, or damaged.
    """
    if guard.container_format(path) != "safetensors":
        raise BadDataError("the file is no safetensors file", str(path), "read Keras files with load_keras")
    return guard.read_safetensors(path)[0]


def import_timm(tensors: Mapping[str, np.ndarray], path: Path, model: ConfigDict | None) -> Imported:
    """Does what `load_timm` does; without `model` it is inferred from the tensors.

    Raises:
      BadDataError: as `load_timm`.
    """
    where = str(path)
    tensors = {
        name.removeprefix("module."): tensor  # of DataParallel
        for name, tensor in tensors.items()
        if not name.endswith(".num_batches_tracked")
    }
    model = _infer(tensors, where) if model is None else resolve_model(model)
    notes = []
    for field, found, theirs in (
        ("padding", model.padding, "symmetric"),
        ("batch_norm.epsilon", model.batch_norm.epsilon, EPSILONS.get(model.name)),
    ):
        if theirs is not None and found != theirs:
            notes.append(f"timm computes with config.model.{field}={theirs!r}, the model has {found!r}")
    if not model.aux_head and any(name.startswith("AuxLogits.") for name in tensors):
        notes.append("left out: AuxLogits.*, the auxiliary classifier (config.model.aux_head=True reads it)")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("AuxLogits.")}
    shapes = tree.shapes(model)
    if "fc.weight" not in tensors:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(tree.HEAD)}
    last_block = 6 + model.middle_blocks
    sources = {leaf: timm_name(leaf, model.name, last_block) for leaf in shapes}
    missing = sorted(name for name in sources.values() if name not in tensors)
    left_over = sorted(tensors.keys() - set(sources.values()))
    if missing or left_over:
        parts = [f"missing: {tree.listed(missing)}"] if missing else []
        parts += [f"left over: {tree.listed(left_over)}"] if left_over else []
        raise BadDataError(f"the file does not fit {tree.describe(model)}: {'; '.join(parts)}", where, _fix(left_over))
    leaves = {leaf: _in_our_layout(tensors[name]) for leaf, name in sources.items()}
    tree.check(leaves, model, where)
    preprocessing = _described(path) or PREPROCESSING.get(model.name, Preprocessing())
    shape = (preprocessing.size, preprocessing.size)
    return Imported("timm safetensors", model, tree.unflatten(leaves), preprocessing, shape, tuple(notes))


def timm_name(leaf: str, name: str, last_block: int) -> str:
    """Returns what timm calls one of our variables.

    Args:
      leaf: such as 'params/block5_sepconv1/spatial/kernel'.
      name: of the network.
      last_block: number of the last block of Xception, 14 with eight middle blocks.
    """
    _, layer, *parts, last = leaf.split("/")
    if layer == "head":
        return f"{'fc' if parts[0] == 'predictions' else parts[0]}.{_LEAVES[last]}"
    kind = "bn" if layer.endswith("_bn") else "conv"
    layer = layer.removesuffix("_bn")
    if name == "xception":
        inner = {"spatial": ".conv1", "pointwise": ".pointwise"}[parts[0]] if parts else ""
        return f"{_xception_module(layer, kind, last_block)}{inner}.{_LEAVES[last]}"
    if layer == "aux_predictions":
        return f"AuxLogits.fc.{_LEAVES[last]}"
    return f"{_inception_module(layer)}.{kind}.{_LEAVES[last]}"


def _xception_module(layer: str, kind: str, last_block: int) -> str:
    match = re.fullmatch(r"block(\d+)_(conv|sepconv|shortcut)(\d*)", layer)
    if match is None:
        return layer
    block, position = int(match[1]), int(match[3] or 0)
    if match[2] == "conv":
        return f"{kind}{position}"
    if block == last_block:
        return f"{kind}{position + 2}"
    if match[2] == "shortcut":
        return f"block{block - 1}.{'skipbn' if kind == 'bn' else 'skip'}"
    # A block is a row of ReLU, separable convolution, BatchNorm; the first one begins without ReLU.
    index = 3 * (position - 1) + (0 if block == 2 else 1) + (kind == "bn")
    return f"block{block - 1}.rep.{index}"


def _inception_module(layer: str) -> str:
    module, _, tower = layer.partition("_")
    if module == "stem":
        return _STEM[int(tower)]
    if module == "aux":
        return f"AuxLogits.conv{tower}"
    number = int(module.removeprefix("mixed"))
    if tower in _ONE_CONVOLUTION or (number == 3 and tower == "3x3_0"):
        branch = f"branch{'_' if tower == 'pool_0' else ''}{tower.removesuffix('_0')}"
    elif tower in _SPLIT:
        branch = f"branch{_SPLIT[tower]}"
    else:
        name, _, index = tower.rpartition("_")
        branch = f"branch{name}_{int(index) + 1}"
    return f"Mixed_{_MODULES[number]}.{branch}"


def _in_our_layout(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's kernels are [out, in, h, w] and [out, in], ours [h, w, in, out] and [in, out]."""
    return tensor.transpose((2, 3, 1, 0)) if tensor.ndim == 4 else tensor.T


def _infer(tensors: Mapping[str, np.ndarray], where: str) -> ConfigDict:
    if "conv3.conv1.weight" in tensors:
        blocks = {name.split(".")[0] for name in tensors if re.match(r"block\d+\.", name)}
        model: dict[str, Any] = {"name": "xception", "middle_blocks": max(0, len(blocks) - 4)}
    elif "Mixed_5b.branch1x1.conv.weight" in tensors:
        model = {"name": "inception_v3"}
    else:
        what = "the names of the tensors are neither timm's legacy_xception nor inception_v3"
        raise BadDataError(what, where, "other networks of the Xception family (xception41, 65, 71) are not built here")
    model |= {"padding": "symmetric", "batch_norm": {"epsilon": EPSILONS[model["name"]], "scale": True}}
    if "fc.weight" in tensors:
        model["num_classes"] = tensors["fc.weight"].shape[0]
    return resolve_model(ConfigDict(model, type_safe=False))


def _fix(left_over: list[str]) -> str:
    if left_over and all(name.endswith(".bn.weight") for name in left_over):
        return "set config.model.batch_norm.scale=True: timm's BatchNorm has one"
    return "give the model that the file belongs to"


def _described(path: Path) -> Preprocessing | None:
    """Returns the preprocessing in the config.json that the Hugging Face hub has beside a file, if it is there."""
    beside = path.with_name("config.json")
    try:
        if beside.stat().st_size > guard.SMALL:
            return None
        fields = json.loads(beside.read_text())["pretrained_cfg"]
        return Preprocessing.from_fields(
            {
                "size": fields["input_size"][1],
                "crop": fields["crop_pct"],
                "interpolation": _INTERPOLATIONS[fields["interpolation"]],
                "mean": fields["mean"],
                "std": fields["std"],
            }
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
