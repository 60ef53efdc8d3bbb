"""Finds the network in a Keras file by the order and shapes of layers. Names differ between versions."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from xception_jax.errors import BadDataError
from xception_jax.weights import tree
from xception_jax.weights.keras_file import FileLayer, KerasFile, Submodel
from xception_jax.weights.keras_layers import BACKBONE, KerasLayer, of_kind

Targets = Sequence[KerasLayer[str]]

# States of the search for the order in a row of tensors, for a whole file. A network with n layers needs at most n * n.
_MAX_STATES = 200_000
_MAX_CHAIN = 256  # Dense layers that are put into order


class Backbone(NamedTuple):
    """The network below its classifier, and all other layers of the file in order."""

    tensors: dict[str, np.ndarray]  # by the name of our variable
    beside: list[FileLayer]  # in the same submodel
    outside: list[FileLayer]  # in other submodels


def find_backbone(file: KerasFile, targets: Targets, network: str, where: str) -> Backbone:
    """Finds the one submodel whose layers have the shapes of the targets; `network` describes it in messages."""
    wanted = of_kind(targets, *BACKBONE)
    states = iter(range(_MAX_STATES))
    found = [(submodel, layers) for submodel in file.submodels if (layers := _match(submodel, wanted, states))]
    if not found:
        raise _not_found(file, wanted, network, where)
    if len(found) > 1:
        names = " and ".join(submodel.name or "the model itself" for submodel, _ in found[:2])
        fix = "save only the one that you want: model.get_layer(name).save_weights('x.weights.h5')"
        raise BadDataError(f"the file holds {network} more than once: {names}", where, fix)
    [(submodel, layers)] = found
    used = {layer.name for layer in layers}
    beside = [layer for layer in submodel.layers if layer.name not in used]
    outside = [layer for other in file.submodels if other is not submodel for layer in other.layers]
    return Backbone(assign(wanted, layers), beside, outside)


def assign(targets: Targets, layers: Sequence[FileLayer]) -> dict[str, np.ndarray]:
    """Returns the tensors of the layers by the names of the targets' variables."""
    pairs = zip(targets, layers, strict=True)
    return {name: tensor for target, layer in pairs for name, tensor in zip(target.leaves, layer.leaves, strict=True)}


def find_dense(beside: Sequence[FileLayer], outside: Sequence[FileLayer]) -> list[FileLayer]:
    """Returns the Dense layers nearest to the network, each taking the output of the previous one.

    A subclassed model stores its layers by attribute, in another order. Layers that form no chain keep their order.
    """
    dense = of_kind(beside, "dense") or of_kind(outside, "dense")
    if len(dense) > _MAX_CHAIN:
        return dense
    widths = [layer.shapes[0] for layer in dense]
    starts = collections.Counter(width for width, _ in widths) - collections.Counter(width for _, width in widths)
    width = next(iter(starts), None)
    chain, rest = [], list(dense)
    while rest:
        fitting = [layer for layer in rest if layer.shapes[0][0] == width]
        if not fitting:
            return dense
        # A layer that keeps the width precedes one that changes it.
        chain.append(min(fitting, key=lambda layer: layer.shapes[0][0] != layer.shapes[0][1]))
        rest.remove(chain[-1])
        width = chain[-1].shapes[0][1]
    return chain


def _match(submodel: Submodel, wanted: Targets, states: Iterator[int]) -> list[FileLayer] | None:
    """Returns layers with the shapes of the targets, in their order, or None."""
    if submodel.splits:
        merges = (_merge(trainable, others, wanted, states) for trainable, others in submodel.splits)
        return next((merged for merged in merges if merged and _numbers_agree(merged)), None)
    found: dict[str, FileLayer] = {}
    for kind in BACKBONE:
        places = of_kind(wanted, kind)
        layers = _neighbours(of_kind(submodel.layers, kind), places)
        if layers is None:
            return None
        found |= {target.name: layer for target, layer in zip(places, layers, strict=True)}
    return [found[target.name] for target in wanted]


def _neighbours(layers: Sequence[FileLayer], places: Targets) -> Sequence[FileLayer] | None:
    """Returns consecutive layers with the shapes of the targets; layers of a larger model may surround them."""
    shapes, wanted = [layer.shapes for layer in layers], [target.shapes for target in places]
    for start in range(len(layers) - len(places) + 1):
        if shapes[start : start + len(places)] == wanted:
            return layers[start : start + len(places)]
    return None


def _merge(
    trainable: Sequence[FileLayer], others: Sequence[FileLayer], wanted: Targets, states: Iterator[int]
) -> list[FileLayer] | None:
    """Merges two parts of one order so that the shapes are those of the targets, by depth-first search.

    A layer in both parts (a trainable BatchNorm, whose running averages are among the others) must be next in both. If
    either part can continue, the one that supplied the previous layer does, as frozen layers are mostly a range. The
    search takes one of `states` for each state, and gives up without any.
    """
    both = {layer.name for layer in trainable} & {layer.name for layer in others}
    visited = set()
    merged: list[FileLayer] = []
    # Positions in both parts, whether the layer before is frozen, the number of layers before it, and that layer.
    stack: list[tuple[int, int, bool, int, FileLayer | None]] = [(0, 0, True, 0, None)]
    while stack and next(states, None) is not None:
        i, j, is_frozen, before, last = stack.pop()
        if last is not None:
            merged[before:] = [last]
        if len(merged) == len(wanted):
            return merged
        if (i, j) in visited:
            continue
        visited.add((i, j))
        one, other = trainable[i : i + 1], others[j : j + 1]
        steps = [(i + 1, j, False, layer) for layer in one if layer.name not in both]
        steps += [(i, j + 1, True, layer) for layer in other if layer.name not in both]
        if one and other and one[0].name == other[0].name:
            steps = [(i + 1, j + 1, False, one[0])]
        steps.sort(key=lambda step: step[2] == is_frozen)  # the last entry of the stack is tried first
        fitting = [step for step in steps if step[3].shapes == wanted[len(merged)].shapes]
        stack += [(i, j, is_frozen, len(merged), layer) for i, j, is_frozen, layer in fitting]
    return None


def _numbers_agree(merged: Sequence[FileLayer]) -> bool:
    """Whether automatic names number the convolutions in the same order as their BatchNorms.

    If single layers of Inception V3 are frozen, layers of equal shape can change places, and the orders differ.
    """
    numbers: dict[str, list[int]] = {"conv2d": [], "batch_normalization": []}
    for layer in merged:
        if match := re.fullmatch(r"(conv2d|batch_normalization)(?:_(\d+))?", layer.keras_name):
            numbers[match[1]].append(int(match[2] or 0))
    convolutions, norms = ([sorted(each).index(number) for number in each] for each in numbers.values())
    return len(convolutions) != len(norms) or convolutions == norms


def _not_found(file: KerasFile, wanted: Targets, network: str, where: str) -> BadDataError:
    if not file.submodels:
        return BadDataError("the file holds no layers with weights", where, "save it again with model.save_weights")
    largest = max(file.submodels, key=lambda submodel: len(of_kind(submodel.layers, *BACKBONE)))
    fix = "give the model that the file belongs to (--model), or save the file again"
    if largest.splits:
        fix = "save it again with base.trainable = True: freezing single layers can lose their order"
    problems = []
    for kind in BACKBONE:
        layers, places = of_kind(largest.layers, kind), of_kind(wanted, kind)
        if _neighbours(layers, places) is None:
            counts = f"{len(layers)} layers of kind {kind} where {len(places)} are needed"
            problems.append(f"{counts}, {_first_difference(layers, places)}")
    unknown = [f"{layer.name} {layer.shapes}" for layer in of_kind(largest.layers, "other")]
    problems += [f"of no known kind: {tree.listed(unknown)}"] if unknown else []
    return BadDataError(f"the file does not hold {network}: {'; '.join(problems)}", where, fix)


def _first_difference(layers: Sequence[FileLayer], places: Targets) -> str:
    keras_names = {layer.keras_name for layer in layers}
    absent = [target.name for target in places if target.name not in keras_names]
    missing = [name for name in absent if "shortcut" not in name]  # Keras numbers shortcuts
    if not missing or 2 * len(absent) >= len(places):  # if most names are Keras' own, they tell what is missing
        for target, layer in zip(places, layers, strict=False):
            if layer.shapes != target.shapes:
                return f"{target.name} needs {target.shapes}, but {layer.name} has {layer.shapes}"
        missing = [target.name for target in places[len(layers) :]]
    return f"missing: {tree.listed(missing)}"
