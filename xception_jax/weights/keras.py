"""Reads Xception and Inception V3 from Keras files of any format, also as part of a larger model, and writes them."""

from __future__ import annotations

import collections
import io
import os
import sys
from typing import Any

import h5py
import numpy as np

from xception_jax.config import ModelConfig, resolve_model
from xception_jax.errors import BadDataError
from xception_jax.weights import keras_architecture, tree
from xception_jax.weights.content import Content
from xception_jax.weights.keras_file import KerasFile, Submodel, layers_of
from xception_jax.weights.keras_layers import of_kind, targets
from xception_jax.weights.keras_match import Backbone, Targets, assign, find_backbone, find_dense
from xception_jax.weights.network import Imported, Network, Preprocessing
from xception_jax.weights.own import write

# Numbers of separable convolutions outside of Xception's middle flow and of convolutions in Inception V3.
_XCEPTION_ENTRY_AND_EXIT, _INCEPTION_V3 = 10, 94
_IMAGENET_CLASSES = 1000
# Keras 3 names the layers in a file by class and position.
_GROUPS = {"conv": "conv2d", "separable": "separable_conv2d", "norm": "batch_normalization", "dense": "dense"}
# What keras.applications has, by our name.
_NETWORKS = {name: resolve_model({"name": name}) for name in ("xception", "inception_v3")}


def import_keras(
    content: Content[np.ndarray], where: str, model: ModelConfig | None, demanded: bool | None
) -> Imported:
    """Reads a network from the content of a Keras file; `demanded` is the `head` of `load_network`."""
    file = layers_of(content, where)
    model = _infer(file, where) if model is None else model
    wanted, shapes = targets(model), tree.shapes(model)
    epsilon = keras_architecture.epsilon(file.architecture, len(of_kind(wanted, "norm")))
    if epsilon not in (None, model.batch_norm.epsilon):
        what = f"BatchNorm in the file has the epsilon {epsilon}, the model {model.batch_norm.epsilon}"
        raise BadDataError(what, where, f"set config.model.batch_norm.epsilon={epsilon}")
    backbone = find_backbone(file, wanted, tree.describe(model), where)
    head, multi_label, notes = _read_head(file, backbone, of_kind(wanted, "dense"), demanded, where)
    leaves = {name: tensor.reshape(shapes[name]) for name, tensor in (backbone.tensors | head).items()}
    # Keras' loaders resize the whole image, so networks trained on other datasets saw no central crop.
    default = Preprocessing(crop=1.0) if head and model.num_classes != _IMAGENET_CLASSES else Preprocessing()
    adapted = of_kind([*backbone.beside, *backbone.outside], "normalization")
    if adapted and not file.architecture.layers:
        notes.append("left out: the Normalization layer; without the architecture its place is unknown")
    values = adapted[0].leaves[:2] if adapted else None
    preprocessing, image_shape, told = keras_architecture.read_preprocessing(file.architecture, values, default)
    notes += told
    tree.check(leaves, model, where)
    if model.padding != "same":
        notes.append("Keras pads max pools as config.model.padding='same' does; the model has another value")
    several = multi_label and model.num_classes > 1  # a single unit is the logit of the second of two classes
    network = Network(model, tree.unflatten(leaves), preprocessing, None, where, "", several)
    return Imported(network, image_shape, notes)


def _read_head(
    file: KerasFile, backbone: Backbone, wanted: Targets, demanded: bool | None, where: str
) -> tuple[dict[str, np.ndarray], bool, list[str]]:
    """Returns the classifier's tensors, or none if it is left out; whether it ends in a sigmoid; notes."""
    beside, outside = (
        [layer.name for layer in layers if layer.kind not in ("dense", "normalization")] for layers in backbone[1:]
    )
    if beside and demanded is not False:
        # Around a nested network it is clear where the network ends. Here it may be a part of another network.
        what = f"the file contains layers that are not part of the network: {tree.listed(beside)}"
        raise BadDataError(what, where, tree.without_head(where))
    layers = find_dense(backbone.beside, backbone.outside)
    problem = tree.compare_heads([f"{each.shapes}" for each in wanted], [f"{each.shapes}" for each in layers])
    multi_label = False
    if not problem and outside and layers[0] not in backbone.beside:
        problem = f"not all of its layers are Dense: {tree.listed(outside)}"
    if not problem and file.architecture.layers:
        problem, multi_label = keras_architecture.compare_head(file.architecture, len(wanted))
    dense = [layer.name for layer in of_kind([*backbone.beside, *backbone.outside], "dense")]
    names = [layer.name for layer in layers]
    is_read, notes = tree.select_head(demanded, problem, [*beside, *dense, *outside], names, where)
    if not is_read:
        return {}, False, notes
    if wanted[:-1] and not file.architecture.layers:
        notes.append(f"assuming average pooling, and ReLU after the hidden Dense layers: {tree.listed(names[:-1])}")
    return assign(wanted, layers), multi_label, notes


def _infer(file: KerasFile, where: str) -> ModelConfig:
    """Returns the `config.model` that the layers of a file suggest. Whether it fits is checked later."""
    fix = "give the model that the file belongs to (--model)"
    largest = max(file.submodels, key=lambda each: len(of_kind(each.layers, "norm")), default=Submodel("", []))
    elements = sum(leaf.size for layer in largest.layers for leaf in layer.leaves)
    norms, convolutions, separable = (of_kind(largest.layers, kind) for kind in ("norm", "conv", "separable"))
    if not norms:
        raise BadDataError("the file holds no convolutional network", where, fix)
    if len(separable) > _XCEPTION_ENTRY_AND_EXIT:
        blocks = (len(separable) - _XCEPTION_ENTRY_AND_EXIT) // 3
        model: dict[str, Any] = {"name": "xception", "middle_blocks": tree.middle_blocks(blocks, elements)}
    elif len(convolutions) >= _INCEPTION_V3:
        has_bias = any(len(layer.leaves) == 2 for layer in convolutions)
        model = {"name": "inception_v3_2016" if has_bias else "inception_v3"}
    else:
        what = f"with {len(separable)} separable and {len(convolutions)} other convolutions the file is neither"
        raise BadDataError(f"{what} Xception nor Inception V3", where, fix)
    model["batch_norm"] = {"scale": len(norms[0].leaves) == 4}
    epsilon = keras_architecture.epsilon(file.architecture, len(norms))
    if epsilon is not None:
        model["batch_norm"]["epsilon"] = epsilon
    outside = [layer for other in file.submodels if other is not largest for layer in other.layers]
    if dense := find_dense(largest.layers, outside):
        model["num_classes"] = dense[-1].shapes[0][1]
        widths = {layer.shapes[0][1] for layer in dense[:-1]}
        if len(widths) == 1 and len(dense) <= tree.MAX_HIDDEN:
            model |= {"fc_layers": len(dense) - 1, "fc_width": widths.pop()}
    return tree.resolve_inferred(model, where)


def save_keras(path: str | os.PathLike, network: Network) -> None:
    """Writes the weights as Keras 3 does, bit by bit.

    `keras.applications.Xception(weights=None, classes=...).load_weights(path)` reads them, with `include_top=False` if
    the network has no head. That network has no hidden fully connected layers. If ours has, a note says which Keras
    model loads the file.

    Raises:
      ConfigError: Keras' network has other shapes or computes another function.
      BadDataError: the variables do not fit `network.model`.
      StorageError: the file cannot be written.
    """
    tree.require_network(network.model, _NETWORKS, "keras.applications", tree.HIDDEN)
    leaves = {name: np.asarray(leaf) for name, leaf in tree.flatten(network.variables).items()}
    tree.check(leaves, network.model, os.fspath(path))
    content, counts = io.BytesIO(), collections.Counter[str]()
    with h5py.File(content, "w") as file:
        for target in targets(network.model):
            if target.leaves[0] not in leaves:  # the head may be missing
                continue
            number = f"_{counts[target.kind]}" if counts[target.kind] else ""
            counts[target.kind] += 1
            for i, (leaf, shape) in enumerate(zip(target.leaves, target.shapes, strict=True)):
                name = f"layers/{_GROUPS[target.kind]}{number}/vars/{i}"
                dataset = file.create_dataset(name, data=leaves[leaf].reshape(shape))
                if leaves[leaf].dtype == "bfloat16":  # HDF5 only knows that it has two bytes
                    dataset.attrs["dtype"] = "bfloat16"
    write(path, content.getvalue())
    if counts["dense"] > 1:
        text = "keras.applications has no hidden layers: put average pooling and these Dense layers on a base without"
        print(f"note: {text} top; it then loads the file", file=sys.stderr)
