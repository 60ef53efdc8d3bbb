"""Reads the weights of timm's `legacy_xception` and `inception_v3`, and of torchvision's `inception_v3`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xception_jax.config import ModelConfig, XceptionConfig, resolve_model
from xception_jax.errors import BadDataError
from xception_jax.weights import hub, tree
from xception_jax.weights.network import Imported, Network, Preprocessing

_EPSILONS = {"xception": 1e-5, "inception_v3": 1e-3}
# Pillow's bicubic interpolation, which PyTorch uses, is antialiased.
_PREPROCESSING = {
    "xception": Preprocessing(crop=0.8975, interpolation="antialiased_bicubic"),
    "inception_v3": Preprocessing(crop=0.875, interpolation="antialiased_bicubic"),
}
_LANDMARKS = {"xception": "conv3.conv1.weight", "inception_v3": "Mixed_5b.branch1x1.conv.weight"}  # one tensor of each
_ABOVE = ("fc", "classifier.", "head.", "last_linear.")  # names of layers above the network
_AUXILIARY = "AuxLogits."
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_MODULES = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
# Branches that are not numbered as all others are: 7x7dbl_0 is branch7x7dbl_1.
_BRANCHES = {"1x1_0": "1x1", "pool_0": "_pool", "3x3_1x3": "3x3_2a", "3x3_3x1": "3x3_2b"}
_BRANCHES |= {"3x3dbl_1x3": "3x3dbl_3a", "3x3dbl_3x1": "3x3dbl_3b"}


def import_timm(
    tensors: Mapping[str, np.ndarray], path: Path, model: ModelConfig | None, demanded: bool | None
) -> Imported:
    """Reads a network from tensors with timm's names; `demanded` is the `head` of `load_network`."""
    where, prefix = str(path), _prefix(tensors, str(path))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")}
    below = {name for name in tensors if name.startswith(prefix) and not name.removeprefix(prefix).startswith(_ABOVE)}
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name in below}
    above = {name: tensor for name, tensor in tensors.items() if name not in below}
    model = _infer(own, above.get(f"{prefix}fc.weight")) if model is None else model
    names, shapes, notes = timm_names(model), tree.shapes(model), []
    for field, value, theirs in (
        ("padding", model.padding, "symmetric"),
        ("batch_norm.epsilon", model.batch_norm.epsilon, _EPSILONS.get(model.name, model.batch_norm.epsilon)),
    ):
        if value != theirs:
            notes.append(f"timm computes with config.model.{field}={theirs!r}, the model has {value!r}")
    has_auxiliary = any(name.startswith(_AUXILIARY) for name in names.values())
    if not has_auxiliary and any(name.startswith(_AUXILIARY) for name in own):
        notes.append("left out: AuxLogits.*, the auxiliary classifier (config.model.aux_head=True reads it)")

    head = [leaf for leaf in names if leaf.startswith(tree.HEAD)]
    ours = sorted(f"{prefix}{names[leaf]} {shapes[leaf][::-1]}" for leaf in head)
    problem = tree.compare_heads(ours, sorted(f"{name} {tensor.shape}" for name, tensor in above.items()))
    is_read, head_notes = tree.select_head(demanded, problem, sorted(above), sorted(above), where)
    if is_read:
        own |= {name.removeprefix(prefix): tensor for name, tensor in above.items()}
    our_names = {name: leaf for leaf, name in names.items()}
    leaves = {
        # PyTorch's kernels are [out, in, h, w] and [out, in], ours [h, w, in, out] and [in, out].
        our_names.get(name, name): tensor.transpose((2, 3, 1, 0) if tensor.ndim == 4 else None)
        for name, tensor in own.items()
        if has_auxiliary or not name.startswith(_AUXILIARY)
    }
    tree.check(leaves, model, where, names)
    default = _PREPROCESSING.get(model.name, Preprocessing())
    num_classes = model.num_classes if is_read else 0
    preprocessing, classes, hub_notes = hub.describe(path.with_name("config.json"), default, num_classes)
    network = Network(model, tree.unflatten(leaves), preprocessing, classes, where, "")
    return Imported(network, (preprocessing.size, preprocessing.size), notes + head_notes + hub_notes)


def _prefix(tensors: Mapping[str, np.ndarray], where: str) -> str:
    """Returns what precedes all names of the network: of DataParallel, torch.compile, or a module around it."""
    landmark = re.compile(r"(|.*\.)(" + "|".join(map(re.escape, _LANDMARKS.values())) + ")")
    prefixes = {match[1] for name in tensors if (match := landmark.fullmatch(name))}
    if not prefixes:
        what = "the names of the tensors are neither timm's legacy_xception nor inception_v3"
        raise BadDataError(what, where, "other networks of the Xception family (xception41, 65, 71) are not supported")
    if len(prefixes) > 1:
        what = f"the file holds the network more than once: {tree.listed(sorted(f'{each}*' for each in prefixes))}"
        raise BadDataError(what, where, "save only the one that you want")
    return prefixes.pop()


def _infer(tensors: Mapping[str, np.ndarray], classifier: np.ndarray | None) -> ModelConfig:
    model: dict[str, Any] = {"name": "xception" if _LANDMARKS["xception"] in tensors else "inception_v3"}
    if model["name"] == "xception":
        blocks = {name.split(".")[0] for name in tensors if re.match(r"block\d+\.", name)}
        model["middle_blocks"] = max(0, len(blocks) - 4)
    if classifier is not None and classifier.ndim == 2:
        model["num_classes"] = classifier.shape[0]
    batch_norm = {"epsilon": _EPSILONS[model["name"]], "scale": True}
    return resolve_model(model | {"padding": "symmetric", "batch_norm": batch_norm})


def timm_names(model: ModelConfig) -> dict[str, str]:
    """Returns timm's name of each of our variables."""
    names = {}
    for leaf in tree.shapes(model):
        _, layer, *parts, last = leaf.split("/")
        kind, layer = ("bn", layer.removesuffix("_bn")) if layer.endswith("_bn") else ("conv", layer)
        if layer == "head":
            module = "fc" if parts == ["predictions"] else parts[0]
        elif isinstance(model, XceptionConfig):
            inner = {"spatial": ".conv1", "pointwise": ".pointwise"}.get(parts[0], f".{parts[0]}") if parts else ""
            module = _xception_module(layer, kind, 6 + model.middle_blocks) + inner
        else:
            module = "AuxLogits.fc" if layer == "aux_predictions" else f"{_inception_module(layer)}.{kind}"
        names[leaf] = f"{module}.{_LEAVES[last]}"
    return names


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
    # A block is a sequence of ReLU, separable convolution and BatchNorm; the first block begins without ReLU.
    index = 3 * (position - 1) + (block != 2) + (kind == "bn")
    return f"block{block - 1}.rep.{index}"


def _inception_module(layer: str) -> str:
    module, _, tower = layer.partition("_")
    if module == "stem":
        return _STEM[int(tower)]
    if module == "aux":
        return f"AuxLogits.conv{tower}"
    branch = "3x3" if layer == "mixed3_3x3_0" else _BRANCHES.get(tower)
    name, _, index = tower.rpartition("_")
    return f"Mixed_{_MODULES[int(module.removeprefix('mixed'))]}.branch{branch or f'{name}_{int(index) + 1}'}"
