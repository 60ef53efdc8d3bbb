"""Weights of timm's `legacy_xception` and `inception_v3` (torchvision's too), from safetensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xception_jax.config import ModelConfig, resolve_model
from xception_jax.errors import BadDataError
from xception_jax.weights import guard, hub, tree
from xception_jax.weights.keras import Imported
from xception_jax.weights.network import Preprocessing

EPSILONS = {"xception": 1e-5, "inception_v3": 1e-3}
# PyTorch's bicubic resizing of images (by Pillow) is antialiased.
PREPROCESSING = {
    "xception": Preprocessing(crop=0.8975, interpolation="antialiased_bicubic"),
    "inception_v3": Preprocessing(crop=0.875, interpolation="antialiased_bicubic"),
}
# One tensor of each network.
_KNOWN = {"xception": "conv3.conv1.weight", "inception_v3": "Mixed_5b.branch1x1.conv.weight"}
_ABOVE = ("fc", "classifier.", "head.", "last_linear.")  # what the layers on top of the network are called
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_MODULES = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
_ONE_CONVOLUTION = ("1x1_0", "pool_0")
_SPLIT = {"3x3_1x3": "3x3_2a", "3x3_3x1": "3x3_2b", "3x3dbl_1x3": "3x3dbl_3a", "3x3dbl_3x1": "3x3dbl_3b"}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def load_timm(path: str | os.PathLike, model: ModelConfig, *, head: bool | None = None) -> dict[str, Any]:
    """Reads the weights of timm's `legacy_xception` or `inception_v3`.

    timm pads max pools and counts padding in average pools: `model.padding='symmetric'`; the epsilon of BatchNorm is
    1e-5 in `legacy_xception` and 1e-3 in `inception_v3`, whose BatchNorm has a scale. Another padding or epsilon in
    `model` is accepted with a line on standard error.

    Args:
      path: safetensors with timm's names, as `model.safetensors` of the Hugging Face hub.
      model: `config.model` of the network. With `aux_head` the auxiliary classifier is read too, otherwise left out.
      head: True asks for the classifier, one Linear layer that fits `num_classes`; False leaves out what stands above
        the network; None takes the classifier if it is there and fits, and says so if it does not.

    Returns:
      {'params', 'batch_stats'}, NumPy arrays; without `params['head']` if the file has no classifier.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: it is damaged, or does not fit; the message names what is missing or left over.
    """
    path = Path(path)
    guard.require_file(path)
    tensors = read_tensors(path)
    imported = import_timm(tensors, path, model, head)
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


def import_timm(
    tensors: Mapping[str, np.ndarray], path: Path, model: ModelConfig | None, demanded: bool | None
) -> Imported:
    """Does what `load_timm` does; without `model` it is inferred from the tensors.

    Raises:
      BadDataError: as `load_timm`.
    """
    where = str(path)
    prefix = _prefix(tensors, where)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")}
    above = {name: tensor for name, tensor in tensors.items() if not _is_below(name, prefix)}
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name not in above}
    model = _infer(own, above.get(f"{prefix}fc.weight")) if model is None else resolve_model(model)
    notes = []
    for field, found, theirs in (
        ("padding", model.padding, "symmetric"),
        ("batch_norm.epsilon", model.batch_norm.epsilon, EPSILONS.get(model.name)),
    ):
        if theirs is not None and found != theirs:
            notes.append(f"timm computes with config.model.{field}={theirs!r}, the model has {found!r}")
    if not getattr(model, "aux_head", False) and any(name.startswith("AuxLogits.") for name in own):
        notes.append("left out: AuxLogits.*, the auxiliary classifier (config.model.aux_head=True reads it)")
        own = {name: tensor for name, tensor in own.items() if not name.startswith("AuxLogits.")}
    shapes = tree.shapes(model)
    sources = {leaf: timm_name(leaf, model.name, 6 + getattr(model, "middle_blocks", 0)) for leaf in shapes}
    head = {prefix + name: shapes[leaf][::-1] for leaf, name in sources.items() if leaf.startswith(tree.HEAD)}
    problem = _head_problem(head, above)
    if demanded and problem:
        fix = "set config.model.num_classes as in the file, or leave the head out: --no-head (head=False)"
        raise BadDataError(f"the head does not fit: {problem}", where, fix)
    if demanded is False or problem:
        sources = {leaf: name for leaf, name in sources.items() if not leaf.startswith(tree.HEAD)}
        reason = f" ({problem})" if problem and demanded is None else ""
        notes += [f"left out: {tree.listed(sorted(above))}{reason}"] if above else []
    else:
        own |= {name.removeprefix(prefix): tensor for name, tensor in above.items()}
    missing = sorted(name for name in sources.values() if name not in own)
    left_over = sorted(own.keys() - set(sources.values()))
    if missing or left_over:
        parts = [f"missing: {tree.listed(missing)}"] if missing else []
        parts += [f"left over: {tree.listed(left_over)}"] if left_over else []
        raise BadDataError(f"the file does not fit {tree.describe(model)}: {'; '.join(parts)}", where, _fix(left_over))
    leaves = {leaf: _in_our_layout(own[name]) for leaf, name in sources.items()}
    tree.check(leaves, model, where)
    default = PREPROCESSING.get(model.name, Preprocessing())
    num_classes = 0 if problem or demanded is False else model.num_classes
    preprocessing, classes, told = hub.describe(path.with_name("config.json"), default, num_classes)
    shape = (preprocessing.size, preprocessing.size)
    notes += told
    variables = tree.unflatten(leaves)
    return Imported("timm safetensors", model, variables, preprocessing, shape, tuple(notes), classes=classes)


def _is_below(name: str, prefix: str) -> bool:
    """Says whether a tensor is of the network, not of what is put on it."""
    return name.startswith(prefix) and not name.removeprefix(prefix).startswith(_ABOVE)


def _head_problem(needed: Mapping[str, tuple[int, ...]], above: Mapping[str, np.ndarray]) -> str:
    """Returns why what is put on the network is not the classifier of the model, or ''."""
    found = {name: tensor.shape for name, tensor in above.items()}
    if found == needed:
        return ""
    texts = (tree.listed([f"{name} {shape}" for name, shape in sorted(each.items())]) for each in (needed, found))
    return "the model's classifier is {}; the file has {}".format(*(text or "none" for text in texts))


def _prefix(tensors: Mapping[str, np.ndarray], where: str) -> str:
    """Returns what stands before all names of the network: of DataParallel, torch.compile, or a module around it.

    Raises:
      BadDataError: there is no network that is known, or there are two.
    """
    prefixes = {
        name.removesuffix(known)
        for name in tensors
        for known in _KNOWN.values()
        if name == known or name.endswith(f".{known}")
    }
    if not prefixes:
        what = "the names of the tensors are neither timm's legacy_xception nor inception_v3"
        raise BadDataError(what, where, "other networks of the Xception family (xception41, 65, 71) are not built here")
    if len(prefixes) > 1:
        what = f"the file holds the network more than once: {tree.listed(sorted(f'{each}*' for each in prefixes))}"
        raise BadDataError(what, where, "save the one that you mean on its own")
    return prefixes.pop()


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


def _infer(tensors: Mapping[str, np.ndarray], classifier: np.ndarray | None) -> ModelConfig:
    if _KNOWN["xception"] in tensors:
        blocks = {name.split(".")[0] for name in tensors if re.match(r"block\d+\.", name)}
        model: dict[str, Any] = {"name": "xception", "middle_blocks": max(0, len(blocks) - 4)}
    else:
        model = {"name": "inception_v3"}
    model |= {"padding": "symmetric", "batch_norm": {"epsilon": EPSILONS[model["name"]], "scale": True}}
    if classifier is not None and classifier.ndim == 2:
        model["num_classes"] = classifier.shape[0]
    return resolve_model(model)


def _fix(left_over: list[str]) -> str:
    if left_over and all(name.endswith(".bn.weight") for name in left_over):
        return "set config.model.batch_norm.scale=True: timm's BatchNorm has one"
    return "give the model that the file belongs to"
