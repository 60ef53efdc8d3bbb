"""Finds the network in a Keras file, by order and shape: names differ between versions and mean nothing."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence

import h5py

from xception_jax.errors import BadDataError
from xception_jax.weights import tree
from xception_jax.weights.keras_file import Container, KerasFile, Layer
from xception_jax.weights.keras_layers import Target, of_kind

BACKBONE = ("conv", "separable", "norm")
_TOLD = 0.5  # share of the layers whose names must be Keras' own before a message goes by names


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The layers of a file that are the network below the classifier.

    Attributes:
      tensors: by the name of our variable.
      beside: all other layers in the same container, in order.
      outside: the layers of all other containers, in order.
    """

    tensors: dict[str, h5py.Dataset]
    beside: tuple[Layer, ...]
    outside: tuple[Layer, ...]


def find_backbone(file: KerasFile, targets: Sequence[Target], network: str, where: str) -> Backbone:
    """Finds the one container whose layers have the shapes of the targets.

    Args:
      file: that is searched.
      targets: in the order of Keras' `model.layers`.
      network: what is looked for, in words.
      where: the file, for messages.

    Raises:
      BadDataError: there is none, or there are two.
    """
    found = [match for container in file.containers if (match := _match(container, targets)) is not None]
    if not found:
        raise _not_found(file, targets, network, where)
    if len(found) > 1:
        names = " and ".join(container.name or "the model itself" for container, _ in found[:2])
        fix = "save the one that you mean on its own: model.get_layer(name).save_weights('x.weights.h5')"
        raise BadDataError(f"the file holds {network} more than once: {names}", where, fix)
    container, matched = found[0]
    tensors = {
        leaf: tensor for target, layer in matched for leaf, tensor in zip(target.leaves, layer.tensors, strict=True)
    }
    used = {layer.name for _, layer in matched}
    outside = (layer for other in file.containers if other is not container for layer in other.layers)
    return Backbone(tensors, tuple(o for o in container.layers if o.name not in used), tuple(outside))


def find_head(layers: Sequence[Layer], targets: Sequence[Target]) -> tuple[dict[str, h5py.Dataset], str]:
    """Returns the tensors of the classifier, or none and why the Dense layers are not the targets."""
    dense = chained([layer for layer in layers if layer.kind == "dense"])
    if [layer.shapes for layer in dense] == [target.shapes for target in targets]:
        pairs = (zip(target.leaves, layer.tensors, strict=True) for target, layer in zip(targets, dense, strict=True))
        return {leaf: tensor for pair in pairs for leaf, tensor in pair}, ""
    needed, found = ([" + ".join(map(str, each.shapes)) for each in side] for side in (targets, dense))
    return (
        {},
        f"the model's classifier is {', '.join(needed)}; the file's Dense layers are {', '.join(found) or 'none'}",
    )


def chained(dense: Sequence[Layer]) -> list[Layer]:
    """Returns Dense layers so that each takes what the one before gives; as they are where they form no chain.

    In a subclassed model they are called by its attributes, whose order is not that of the computation.
    """
    widths = [layer.shapes[0] for layer in dense]
    starts = collections.Counter(width for width, _ in widths) - collections.Counter(width for _, width in widths)
    order, rest = [], list(dense)
    width = next(iter(starts), None)
    while rest:
        fitting = [layer for layer in rest if layer.shapes[0][0] == width]
        if not fitting:
            return list(dense)
        # One that keeps the width comes before the one that changes it.
        following = min(fitting, key=lambda layer: layer.shapes[0][0] != layer.shapes[0][1])
        order.append(following)
        rest.remove(following)
        width = following.shapes[0][1]
    return order


def _match(container: Container, targets: Sequence[Target]) -> tuple[Container, list] | None:
    if container.row:
        wanted = [target for target in targets if target.kind in BACKBONE]
        for trainable, others in container.parts():
            merged = _merge(_of_backbone(trainable), _of_backbone(others), wanted)
            if merged is not None and _numbers_agree(merged):
                return container, list(zip(wanted, merged, strict=True))
        return None
    matched: list[tuple[Target, Layer]] = []
    for kind in BACKBONE:
        window = _window([layer for layer in container.layers if layer.kind == kind], of_kind(targets, kind))
        if window is None:
            return None
        matched += zip(of_kind(targets, kind), window, strict=True)
    return container, matched


def _merge(trainable: Sequence[Layer], others: Sequence[Layer], wanted: Sequence[Target]) -> list[Layer] | None:
    """Merges two parts of one order so that kinds and shapes are those of the targets.

    A layer in both (BatchNorm that can be trained, with its running averages) must be the next of both. Where either
    part could go on, the one goes on that did so before: frozen layers are mostly a range. Wrong turns are taken back.
    """
    both = {layer.name for layer in trainable} & {layer.name for layer in others}

    def following(i: int, j: int, frozen: bool) -> Iterator[tuple[int, int, bool, Layer]]:
        one, other = trainable[i : i + 1], others[j : j + 1]
        if one and other and one[0].name == other[0].name:
            yield i + 1, j + 1, False, one[0]
        steps = [(i + 1, j, False, layer) for layer in one if layer.name not in both]
        steps += [(i, j + 1, True, layer) for layer in other if layer.name not in both]
        yield from sorted(steps, key=lambda step: step[2] != frozen)

    merged: list[Layer] = []
    visited = set()
    stack = [following(0, 0, True)]
    while stack:
        step = next(stack[-1], None)
        if step is None:
            stack.pop()
            del merged[len(stack) - 1 :]
            continue
        i, j, frozen, layer = step
        target = wanted[len(merged)]
        if (i, j) in visited or (layer.kind, layer.shapes) != (target.kind, target.shapes):
            continue
        visited.add((i, j))
        merged.append(layer)
        if len(merged) == len(wanted):
            return merged
        stack.append(following(i, j, frozen))
    return None


def _numbers_agree(merged: Sequence[Layer]) -> bool:
    """Says whether automatic names, where there are any, number convolutions as they number their BatchNorms.

    Where single layers of Inception V3 are frozen here and there, layers of equal shape can change places. In each
    order of the layers the BatchNorms come as their convolutions do, and so do their numbers.
    """
    numbers: dict[str, list[int]] = {"conv2d": [], "batch_normalization": []}
    for layer in merged:
        match = re.fullmatch(r"(conv2d|batch_normalization)(?:_(\d+))?", layer.own_name)
        if match:
            numbers[match[1]].append(int(match[2] or 0))
    ranks = [[sorted(each).index(number) for number in each] for each in numbers.values()]
    return len(ranks[0]) != len(ranks[1]) or ranks[0] == ranks[1]


def _of_backbone(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.kind in BACKBONE]


def _window(layers: Sequence[Layer], targets: Sequence[Target]) -> Sequence[Layer] | None:
    """Returns the neighbours that have the shapes of the targets; layers of a larger model may surround them."""
    for start in range(len(layers) - len(targets) + 1):
        window = layers[start : start + len(targets)]
        if all(layer.shapes == target.shapes for layer, target in zip(window, targets, strict=True)):
            return window
    return None


def _not_found(file: KerasFile, targets: Sequence[Target], network: str, where: str) -> BadDataError:
    fix = "give the model that the file belongs to (--model), or save the file again"
    if not file.containers:
        return BadDataError("the file holds no layers with weights", where, "save it again with model.save_weights")
    largest = max(file.containers, key=lambda each: sum(layer.kind in BACKBONE for layer in each.layers))
    if largest.row:
        fix = "save it again with base.trainable = True: where layers are frozen here and there, their order is lost"
    problems = []
    for kind in BACKBONE:
        layers = [layer for layer in largest.layers if layer.kind == kind]
        if _window(layers, of_kind(targets, kind)) is None:
            problems.append(_difference(layers, of_kind(targets, kind), kind))
    unknown = [f"{layer.name} {layer.shapes}" for layer in largest.layers if layer.kind == "other"]
    problems += [f"of no known kind: {tree.listed(unknown)}"] if unknown else []
    return BadDataError(f"the file does not hold {network}: {'; '.join(problems)}", where, fix)


def _difference(layers: Sequence[Layer], targets: Sequence[Target], kind: str) -> str:
    counts = f"{len(layers)} layers of kind {kind} where {len(targets)} are needed"
    names, own_names = [target.name for target in targets], {layer.own_name for layer in layers}
    known = [name for name in names if name in own_names]
    if len(known) > _TOLD * len(names) and len(known) < len(names):
        missing = [name for name in names if name not in own_names and "shortcut" not in name]
        if missing:
            return f"{counts}, missing: {tree.listed(missing)}"
    for target, layer in zip(targets, layers, strict=False):
        if layer.shapes != target.shapes:
            return f"{counts}; {target.name} needs {target.shapes}, and {layer.name} with {layer.shapes} stands there"
    if len(layers) < len(targets):
        return f"{counts}, missing: {tree.listed(names[len(layers) :])}"
    return f"{counts}, left over: {tree.listed([layer.name for layer in layers[len(targets) :]])}"
