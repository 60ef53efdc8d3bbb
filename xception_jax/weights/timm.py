"""Reads and writes Xception and Inception V3 with the names of timm, and reads those of related PyTorch projects.

timm's `legacy_xception` descends from Cadene's pretrained-models, whose Xception FaceForensics++ and DeepfakeBench use
too: all name the layers below the classifier alike. timm's and torchvision's `inception_v3` share their names as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy

from xception_jax.config import ModelConfig, XceptionConfig, resolve_model
from xception_jax.errors import BadDataError
from xception_jax.weights import hub, tree
from xception_jax.weights.limits import COPY_AGAIN
from xception_jax.weights.network import Imported, Network, Preprocessing
from xception_jax.weights.own import write

# What timm's networks compute, by our name.
_NETWORKS = {
    "xception": resolve_model({"name": "xception", "padding": "symmetric", "batch_norm": {"epsilon": 1e-5}}),
    "inception_v3": resolve_model({"name": "inception_v3", "padding": "symmetric", "batch_norm": {"scale": True}}),
}
# Pillow's bicubic interpolation, which PyTorch uses, is antialiased.
_PREPROCESSING = {
    "xception": Preprocessing(crop=0.8975, interpolation="antialiased_bicubic"),
    "inception_v3": Preprocessing(crop=0.875, interpolation="antialiased_bicubic"),
}
# FaceForensics++ and DeepfakeBench resize the whole image to a square.
_WHOLE_IMAGE = Preprocessing(crop=1.0, interpolation="bicubic")
_IMAGENET_CLASSES = 1000
_LANDMARKS = {"xception": "conv3.conv1.weight", "inception_v3": "Mixed_5b.branch1x1.conv.weight"}  # one tensor of each
# The linear layer on top: timm and torchvision; Cadene, FaceForensics++ and DeepfakeBench; both behind a dropout.
_HEADS = ("fc", "last_linear", "fc.1", "last_linear.1")
_ABOVE = ("fc", "classifier.", "head.", "last_linear.")  # names of layers above the network
# Parts below the classifier that do not lead to it.
_UNUSED = {
    "AuxLogits.": "the auxiliary classifier (config.model.aux_head=True reads it)",
    "adjust_channel.": "a layer of DeepfakeBench that its Xception does not use",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_MODULES = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
# Branches that are not numbered as all others are: 7x7dbl_0 is branch7x7dbl_1.
_BRANCHES = {"1x1_0": "1x1", "pool_0": "_pool", "3x3_1x3": "3x3_2a", "3x3_3x1": "3x3_2b"}
_BRANCHES |= {"3x3dbl_1x3": "3x3dbl_3a", "3x3dbl_3x1": "3x3dbl_3b"}


_OF_TRAINING = {"optimizer", "metrics"}  # parts of the names of what a checkpoint holds beside the network


def import_timm(
    tensors: Mapping[str, np.ndarray], path: Path, model: ModelConfig | None, demanded: bool | None
) -> Imported:
    """Reads a network from tensors with timm's names; `demanded` is the `head` of `load_network`."""
    where, prefix = str(path), _prefix(tensors, str(path))
    own: dict[str, np.ndarray] = {}  # by the name without the prefix
    above: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        inner, outside = name.removeprefix(prefix), not name.startswith(prefix)
        if _OF_TRAINING & set(name.split(".")) or (outside and tensor.size == 1 and "." not in name):
            continue
        if outside or inner.startswith(_ABOVE):
            above[name] = tensor
        elif not name.endswith(".num_batches_tracked"):
            own[inner] = tensor
    head = next((layer for layer in _HEADS if f"{prefix}{layer}.weight" in above), "fc")
    model = _infer(own, above.get(f"{prefix}{head}.weight"), where) if model is None else model
    names, shapes, notes = timm_names(model, head), tree.shapes(model), []
    theirs = _NETWORKS.get(model.name, model)
    for field, value, other in (
        ("padding", model.padding, theirs.padding),
        ("batch_norm.epsilon", model.batch_norm.epsilon, theirs.batch_norm.epsilon),
    ):
        if value != other:
            notes.append(f"timm computes with config.model.{field}={other!r}, the model has {value!r}")
    for part, meaning in _UNUSED.items():
        unused = {name for name in own if name.startswith(part)}
        if unused and not unused & set(names.values()):
            own = {name: tensor for name, tensor in own.items() if name not in unused}
            notes.append(f"left out: {prefix}{part}*, {meaning}")

    roots = {name.split(".")[0] for name in names.values()}
    others = sorted(name for name in own if name.split(".")[0] not in roots)
    if demanded is False:
        above |= {f"{prefix}{name}": own.pop(name) for name in others}
    elif others and {name for leaf, name in names.items() if not leaf.startswith(tree.HEAD)} <= own.keys():
        what = f"the file contains layers that are not part of the network: {tree.listed(others)}"
        raise BadDataError(what, where, tree.without_head(where))

    ours = sorted(f"{prefix}{names[leaf]} {shapes[leaf][::-1]}" for leaf in names if leaf.startswith(tree.HEAD))
    problem = tree.compare_heads(ours, sorted(f"{name} {tensor.shape}" for name, tensor in above.items()))
    is_read, head_notes = tree.select_head(demanded, problem, sorted(above), sorted(above), where)
    if is_read:
        own |= {name.removeprefix(prefix): tensor for name, tensor in above.items()}
    our_names = {name: leaf for leaf, name in names.items()}
    leaves = {our_names.get(name, name): _our_layout(name, tensor) for name, tensor in own.items()}
    tree.check(leaves, model, where, names)
    is_imagenet = head == "fc" or model.num_classes == _IMAGENET_CLASSES or not is_read
    default = _PREPROCESSING.get(model.name, Preprocessing()) if is_imagenet else _WHOLE_IMAGE
    num_classes = model.num_classes if is_read else 0
    preprocessing, classes, hub_notes = hub.describe(path.with_name("config.json"), model.name, default, num_classes)
    network = Network(model, tree.unflatten(leaves), preprocessing, classes, where, "")
    image_shape = None if preprocessing is default else (preprocessing.size, preprocessing.size)
    return Imported(network, image_shape, notes + head_notes + hub_notes)


def _our_layout(name: str, tensor: np.ndarray) -> np.ndarray:
    """Converts a kernel from [out, in, h, w] or [out, in] to [h, w, in, out] or [in, out]."""
    if name.endswith(".pointwise.weight") and tensor.ndim == 2:  # without its sides of 1, as in xception-b5690688
        tensor = tensor[:, :, None, None]
    return tensor.transpose((2, 3, 1, 0) if tensor.ndim == 4 else None)


def save_timm(path: str | os.PathLike, network: Network) -> None:
    """Writes the weights as timm does, bit by bit.

    `timm.create_model("legacy_xception", num_classes=...)`, or "inception_v3", loads the file with `strict=True`, with
    `num_classes=0` if the network has no head and `aux_logits=True` if it has an auxiliary one. A BatchNorm without
    scale gets a scale of ones.

    Raises:
      ConfigError: timm's network has other shapes or computes another function.
      BadDataError: the variables do not fit `network.model`.
      StorageError: the file cannot be written.
    """
    leaves = {name: np.asarray(leaf) for name, leaf in tree.flatten(network.variables).items()}
    has_head = any(name.startswith(tree.HEAD) for name in leaves)
    head_fields = ("aux_head",) if has_head else tree.HIDDEN  # in timm, both heads have as many classes
    tree.require_network(network.model, _NETWORKS, "timm", ("batch_norm.scale", *head_fields))
    tree.check(leaves, network.model, os.fspath(path))
    names, tensors = timm_names(network.model), {}
    for leaf, value in leaves.items():
        name = names[leaf]
        tensors[name] = np.ascontiguousarray(value.transpose((3, 2, 0, 1) if value.ndim == 4 else None))
        if norm := re.fullmatch(r"(.+)\.running_mean", name):
            tensors[f"{norm[1]}.num_batches_tracked"] = np.zeros((), np.int64)
            if not network.model.batch_norm.scale:
                tensors[f"{norm[1]}.weight"] = np.ones_like(value)
    write(path, safetensors.numpy.save(tensors, {"format": "pt"}))


def _prefix(tensors: Mapping[str, np.ndarray], where: str) -> str:
    """Returns what precedes all names of the network: of DataParallel, torch.compile, or a module around it."""
    landmark = re.compile(r"(|.*\.)(" + "|".join(map(re.escape, _LANDMARKS.values())) + ")")
    prefixes = {match[1] for name in tensors if (match := landmark.fullmatch(name))}
    if not prefixes:
        what = "the names of the tensors are neither those of Xception nor of Inception V3 in PyTorch"
        raise BadDataError(what, where, "other networks of the Xception family (xception41, 65, 71) are not supported")
    if len(prefixes) > 1:
        what = f"the file holds the network more than once: {tree.listed(sorted(f'{each}*' for each in prefixes))}"
        raise BadDataError(what, where, "save only the one that you want")
    return prefixes.pop()


def _infer(tensors: Mapping[str, np.ndarray], classifier: np.ndarray | None, where: str) -> ModelConfig:
    model = _NETWORKS["xception" if _LANDMARKS["xception"] in tensors else "inception_v3"]
    if isinstance(model, XceptionConfig):
        blocks = {name.split(".")[0] for name in tensors if re.match(r"block\d+\.", name)}
        elements = sum(tensor.size for tensor in tensors.values())
        model = model.replace(middle_blocks=tree.middle_blocks(len(blocks) - 4, elements))
    if classifier is None or classifier.ndim != 2:
        return model
    if classifier.shape[0] == 0:
        raise BadDataError("the classifier in the file has no classes", where, COPY_AGAIN)
    return model.replace(num_classes=classifier.shape[0])


def timm_names(model: ModelConfig, head: str = "fc") -> dict[str, str]:
    """Returns timm's name of each of our variables; other projects call the classifier (`head`) something else."""
    names = {}
    for leaf in tree.shapes(model):
        _, layer, *parts, last = leaf.split("/")
        kind, layer = ("bn", layer.removesuffix("_bn")) if layer.endswith("_bn") else ("conv", layer)
        if layer == "head":
            module = head if parts == ["predictions"] else parts[0]
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
