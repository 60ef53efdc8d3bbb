"""Reads Xception and Inception V3 from Keras files of any format, also as part of a larger model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from xception_jax.errors import BadDataError
from xception_jax.weights import keras_architecture, tree
from xception_jax.weights.importing import Imported, compare_shapes, select_head
from xception_jax.weights.keras_file import KerasFile, Submodel, open_keras, read
from xception_jax.weights.keras_layers import Target, targets
from xception_jax.weights.keras_match import Backbone, assign, chained, find_backbone, of_kinds
from xception_jax.weights.network import ModelConfig, Network, Preprocessing, model_from_dict

# Numbers of separable convolutions outside of Xception's middle flow and of convolutions in Inception V3.
_XCEPTION_ENTRY_AND_EXIT, _INCEPTION_V3 = 10, 94
_IMAGENET_CLASSES = 1000


def import_keras(path: Path, model: ModelConfig | None, head: bool | None) -> Imported:
    """Reads a network from a Keras file; the arguments are those of `load_network`."""
    where = str(path)
    with open_keras(path) as file:
        if model is None:
            model = _infer(file, where)
        wanted = targets(model)
        norms = sum(target.kind == "norm" for target in wanted)
        epsilon = keras_architecture.epsilon(file.architecture, norms) if file.architecture else None
        if epsilon not in (None, model.batch_norm.epsilon):
            what = f"BatchNorm in the file has the epsilon {epsilon}, the model {model.batch_norm.epsilon}"
            raise BadDataError(what, where, f"set config.model.batch_norm.epsilon={epsilon}")
        backbone = find_backbone(file, wanted, tree.describe(model), where)
        classifier = [target for target in wanted if target.kind == "dense"]
        tensors, multi_label, notes = _read_head(file, backbone, classifier, head, where)
        shapes = tree.shapes(model)
        leaves = {leaf: read(tensor).reshape(shapes[leaf]) for leaf, tensor in (backbone.tensors | tensors).items()}

        # Keras' loaders resize the whole image, so networks trained on other datasets saw no central crop.
        preprocessing = (
            Preprocessing(crop=1.0) if tensors and model.num_classes != _IMAGENET_CLASSES else Preprocessing()
        )
        image_shape = None
        adapted = of_kinds([*backbone.beside, *backbone.outside], ("normalization",))
        if file.architecture:
            values = [read(tensor) for tensor in adapted[0].tensors[:2]] if adapted else None
            preprocessing, image_shape, front_notes = keras_architecture.read_preprocessing(
                file.architecture, values, preprocessing
            )
            notes += front_notes
        elif adapted:
            notes.append("left out: the Normalization layer; without the architecture its place is unknown")
    tree.check(leaves, model, where)
    if model.padding != "same":
        notes.append("Keras pads max pools as config.model.padding='same' does; the model has another value")
    network = Network(model, tree.unflatten(leaves), preprocessing, None, where, "", multi_label)
    return Imported(network, image_shape, notes)


def _read_head(
    file: KerasFile, backbone: Backbone, wanted: Sequence[Target], demanded: bool | None, where: str
) -> tuple[dict[str, h5py.Dataset], bool, list[str]]:
    """Returns the classifier's tensors, or none if it is left out; whether it is a sigmoid; notes."""
    beside, outside = (
        [layer for layer in each if layer.kind != "normalization"] for each in (backbone.beside, backbone.outside)
    )
    dense, foreign = of_kinds(beside, ("dense",)), [layer.name for layer in beside if layer.kind != "dense"]
    if foreign and demanded is not False:
        # Around a nested network it is clear where the network ends. Here it may be a part of another network.
        what = f"the file holds more than the network, left over: {tree.listed(foreign)}"
        raise BadDataError(what, where, "read the network without the layers above it: --no-head (head=False)")
    others = [layer.name for layer in outside if layer.kind != "dense"]
    layers = chained(dense or of_kinds(outside, ("dense",)))
    problem = compare_shapes(*([f"{each.shapes}" for each in side] for side in (wanted, layers)))
    multi_label = False
    if not problem and not dense and others:
        problem = f"not all of its layers are Dense: {tree.listed(others)}"
    if not problem and file.architecture:
        problem, multi_label = keras_architecture.compare_head(file.architecture, len(wanted))
    above = [
        *foreign,
        *(layer.name for layer in dense),
        *(layer.name for layer in of_kinds(outside, ("dense",))),
        *others,
    ]
    names = [layer.name for layer in layers]
    is_read, notes = select_head(demanded, problem, above, names, where)
    if not is_read:
        return {}, False, notes
    if wanted[:-1] and not file.architecture:
        notes.append(f"assuming average pooling, and ReLU after the hidden Dense layers: {tree.listed(names[:-1])}")
    return assign(wanted, layers), multi_label, notes


def _infer(file: KerasFile, where: str) -> ModelConfig:
    """Returns the `config.model` that the layers of a file suggest. Whether it fits is checked later."""

    def count(submodel: Submodel, kind: str) -> int:
        return len(of_kinds(submodel.layers, (kind,)))

    fix = "give the model that the file belongs to (--model)"
    submodel = max(file.submodels, key=lambda each: count(each, "norm"), default=Submodel("", ()))
    norms, convolutions, separable = (of_kinds(submodel.layers, (kind,)) for kind in ("norm", "conv", "separable"))
    if not norms:
        raise BadDataError("the file holds no convolutional network", where, fix)
    if len(separable) > _XCEPTION_ENTRY_AND_EXIT:
        model: dict[str, Any] = {"name": "xception", "middle_blocks": (len(separable) - _XCEPTION_ENTRY_AND_EXIT) // 3}
    elif len(convolutions) >= _INCEPTION_V3:
        has_bias = any(len(layer.tensors) == 2 for layer in convolutions)
        model = {"name": "inception_v3_2016" if has_bias else "inception_v3"}
    else:
        what = f"with {len(separable)} separable and {len(convolutions)} other convolutions the file is neither"
        raise BadDataError(f"{what} Xception nor Inception V3", where, fix)
    model["batch_norm"] = {"scale": len(norms[0].tensors) == 4}
    epsilon = keras_architecture.epsilon(file.architecture, len(norms)) if file.architecture else None
    if epsilon is not None:
        model["batch_norm"]["epsilon"] = epsilon
    outside = [layer for other in file.submodels if other is not submodel for layer in other.layers]
    if dense := chained(of_kinds(submodel.layers, ("dense",)) or of_kinds(outside, ("dense",))):
        model["num_classes"] = dense[-1].shapes[0][1]
        widths = {layer.shapes[0][1] for layer in dense[:-1]}
        if len(widths) == 1:
            model |= {"fc_layers": len(dense) - 1, "fc_width": widths.pop()}
    return model_from_dict(model)
