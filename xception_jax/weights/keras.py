"""Weights of Keras, in whatever file they are: legacy .h5, .weights.h5, .keras; alone or within a larger model."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from xception_jax.config import ModelConfig, resolve_model
from xception_jax.errors import BadDataError
from xception_jax.weights import architecture, guard, head, tree
from xception_jax.weights.keras_file import Container, KerasFile, Layer, open_keras, read
from xception_jax.weights.keras_layers import Target, of_kind, targets
from xception_jax.weights.keras_match import Backbone, chained, find_backbone, find_head
from xception_jax.weights.network import Preprocessing

# Separable convolutions of Xception outside the middle flow, and convolutions of Inception V3.
_XCEPTION_ENTRY_AND_EXIT, _INCEPTION_V3 = 10, 94
IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Imported:
    """What a foreign file gave.

    Attributes:
      form: of the file, in words.
      model: `config.model`, as given or as inferred.
      variables: {'params', 'batch_stats'}.
      preprocessing: as far as the file tells, else the default; its size is not set.
      image_shape: height and width of the images that the network is given, or None where the file does not tell.
      notes: what a user should know: what was left out, what was assumed.
      multi_label: the classifier ends in a sigmoid.
      classes: their names, or None where the file does not tell.
    """

    form: str
    model: ModelConfig
    variables: dict[str, Any]
    preprocessing: Preprocessing
    image_shape: tuple[int, int] | None
    notes: tuple[str, ...]
    multi_label: bool = False
    classes: tuple[str, ...] | None = None

    def print_notes(self) -> None:
        """Prints the notes to standard error, one a line."""
        for note in self.notes:
            print(f"note: {note}", file=sys.stderr)


def load_keras(path: str | os.PathLike, model: ModelConfig, *, head: bool | None = None) -> dict[str, Any]:
    """Reads the weights of Keras' Xception or Inception V3 from any file that Keras writes.

    Layers are told by order and shape, never by name. The network may stand within a larger model, under any name.

    Args:
      path: a legacy `.h5`, a `.weights.h5` or a `.keras` archive.
      model: `config.model` of the network.
      head: True asks for the classifier (Dense layers, on average pooling), which must then fit `num_classes` and
        `fc_layers`; False leaves it out; None takes it if it is there and fits, and says so if it does not.

    Returns:
      {'params', 'batch_stats'}, NumPy arrays of the type in the file; without `params['head']` if there is no head.

    Raises:
      InputMissingError: there is no such file.
      BadDataError: it is damaged, refused, or does not fit; the message names what is missing or left over.
    """
    path = Path(path)
    guard.require_file(path)
    imported = import_keras(path, model, head)
    imported.print_notes()
    return imported.variables


def import_keras(path: Path, model: ModelConfig | None, demanded: bool | None) -> Imported:
    """Does what `load_keras` does; without `model` it is inferred from the tensors.

    Raises:
      BadDataError: as `load_keras`.
    """
    where = str(path)
    with open_keras(path) as file:
        model = _infer(file, where) if model is None else resolve_model(model)
        wanted = targets(model)
        _check_epsilon(file, model, len(of_kind(wanted, "norm")), where)
        backbone = find_backbone(file, wanted, tree.describe(model), where)
        tensors, sigmoid, notes = _head(file, backbone, of_kind(wanted, "dense"), demanded, where)
        leaves = {leaf: read(tensor) for leaf, tensor in (backbone.tensors | tensors).items()}
        preprocessing, image_shape, assumed = _preprocessing(file, backbone, model, has_head=bool(tensors))
    shapes = tree.shapes(model)
    leaves = {leaf: value.reshape(shapes[leaf]) for leaf, value in leaves.items()}
    tree.check(leaves, model, where)
    if model.padding != "same":
        assumed = [*assumed, "Keras pads max pools as config.model.padding='same' does; the model says otherwise"]
    variables = tree.unflatten(leaves)
    return Imported(file.form, model, variables, preprocessing, image_shape, (*notes, *assumed), sigmoid)


def _head(
    file: KerasFile, backbone: Backbone, wanted: Sequence[Target], demanded: bool | None, where: str
) -> tuple[dict[str, h5py.Dataset], bool, list[str]]:
    """Returns the tensors of the classifier, none if it is left out; whether it is a sigmoid; and what to tell."""
    foreign = _foreign(backbone.beside)
    if foreign and demanded is not False:
        # Of a network that stands within another we know where it ends. Here it may be a part of another network.
        what = f"the file holds more than the network, left over: {tree.listed(foreign)}"
        raise BadDataError(what, where, "take the network without what is above it: --no-head (head=False)")
    layers = backbone.beside if _dense(backbone.beside) else backbone.outside
    tensors, problem = find_head(layers, wanted)
    fix, sigmoid = "set config.model.num_classes, fc_layers and fc_width as in the file, or leave the head out", False
    if not problem and layers is backbone.outside and _foreign(layers):
        problem = f"not all of its layers are Dense: {tree.listed(_foreign(layers))}"
    if not problem and file.architecture is not None:
        problem, sigmoid = head.judge(file.architecture, len(wanted))
        fix = "leave the head out: --no-head (head=False)"
    if demanded and problem:
        raise BadDataError(f"the head does not fit: {problem}", where, fix)
    left_out = [*foreign, *_dense(backbone.beside), *_dense(backbone.outside), *_foreign(backbone.outside)]
    if demanded is False or problem:
        reason = f" ({problem})" if problem and demanded is None else ""
        return {}, False, [f"left out: {tree.listed(left_out)}{reason}"] if left_out else []
    taken = _dense(layers)
    left_out = [name for name in left_out if name not in taken]
    notes = [f"left out: {tree.listed(left_out)}"] if left_out else []
    if wanted[:-1] and file.architecture is None:
        names = tree.listed(taken[:-1])
        notes.append(f"average pooling is assumed, and hidden Dense layers with the activation relu: {names}")
    return tensors, sigmoid, notes


def _dense(layers: Sequence[Layer]) -> list[str]:
    return [layer.name for layer in chained([layer for layer in layers if layer.kind == "dense"])]


def _foreign(layers: Sequence[Layer]) -> list[str]:
    return [layer.name for layer in layers if layer.kind not in ("dense", "normalization")]


def _check_epsilon(file: KerasFile, model: ModelConfig, count: int, where: str) -> None:
    found = architecture.epsilon(file.architecture, count) if file.architecture is not None else None
    if found is not None and model.batch_norm.epsilon != found:
        what = f"BatchNorm in the file has the epsilon {found}, the model {model.batch_norm.epsilon}"
        raise BadDataError(what, where, f"set config.model.batch_norm.epsilon={found}")


def _preprocessing(
    file: KerasFile, backbone: Backbone, model: ModelConfig, *, has_head: bool
) -> tuple[Preprocessing, tuple[int, int] | None, list[str]]:
    """Returns what the file tells of preprocessing, the shape of images, and notes of what it does not tell."""
    preprocessing = Preprocessing()
    if has_head and model.num_classes != IMAGENET_CLASSES:
        # Whoever trained on own images had them resized whole: Keras' loaders know no central crop.
        preprocessing = dataclasses.replace(preprocessing, crop=1.0)
    adapted = [layer for layer in (*backbone.beside, *backbone.outside) if layer.kind == "normalization"]
    if file.architecture is None:
        text = "the Normalization layer is left out: without the architecture it is not known what it follows"
        return preprocessing, None, [text] if adapted else []
    values = [read(tensor) for tensor in adapted[0].tensors[:2]] if adapted else None
    mean, std, unknown = architecture.scaling(file.architecture, values)
    if mean is not None:
        preprocessing = dataclasses.replace(preprocessing, mean=mean, std=std)
    notes = [f"what {tree.listed(unknown)} does to images is not known: it is left out"] if unknown else []
    interpolation, other = architecture.resizing(file.architecture)
    if other:
        notes.append(f"the Resizing layer is not reproduced in all: {', '.join(other)}; images are resized whole")
    preprocessing = dataclasses.replace(preprocessing, interpolation=interpolation)
    return preprocessing, architecture.image_shape(file.architecture), notes


def _infer(file: KerasFile, where: str) -> ModelConfig:
    """Returns the `config.model` that the layers of a file make likely; whether they fit is found out later."""

    def count(container: Container, kind: str) -> int:
        return sum(layer.kind == kind for layer in container.layers)

    fix = "give the model that the file belongs to (--model)"
    container = max(file.containers, key=lambda each: count(each, "norm"), default=None)
    if container is None or not count(container, "norm"):
        raise BadDataError("the file holds no convolutional network", where, fix)
    norm = next(layer for layer in container.layers if layer.kind == "norm")
    separable = count(container, "separable")
    if separable > _XCEPTION_ENTRY_AND_EXIT:
        model: dict[str, Any] = {"name": "xception", "middle_blocks": (separable - _XCEPTION_ENTRY_AND_EXIT) // 3}
    elif count(container, "conv") >= _INCEPTION_V3:
        biased = any(layer.kind == "conv" and len(layer.tensors) == 2 for layer in container.layers)
        model = {"name": "inception_v3_2016" if biased else "inception_v3"}
    else:
        what = f"with {separable} separable and {count(container, 'conv')} other convolutions the file is neither"
        raise BadDataError(f"{what} Xception nor Inception V3", where, fix)
    model["batch_norm"] = {"scale": len(norm.tensors) == 4}
    epsilon = file.architecture and architecture.epsilon(file.architecture, count(container, "norm"))
    if epsilon is not None:
        model["batch_norm"]["epsilon"] = epsilon
    others = [layer for other in file.containers if other is not container for layer in other.layers]
    dense = [o for o in container.layers if o.kind == "dense"] or [o for o in others if o.kind == "dense"]
    if dense := chained(dense):
        model["num_classes"] = dense[-1].shapes[0][1]
        widths = {layer.shapes[0][1] for layer in dense[:-1]}
        if len(widths) == 1:
            model |= {"fc_layers": len(dense) - 1, "fc_width": widths.pop()}
    return resolve_model(model)
