"""Finds the regular kernels in a weight file of any network.

Nothing but names and shapes of the tensors is known. Libraries order the four axes of a kernel differently, so the
order is decided by which one makes sense of most tensors of the file, and the report states why.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.weights.content import SAFETENSORS, Content
from xception_jax.weights.keras_layers import natural
from xception_jax.weights.limits import COPY_AGAIN

AXES = {"hwio": (0, 1, 2, 3), "oihw": (2, 3, 1, 0), "ohwi": (1, 2, 3, 0)}
"""Orders of axes, and where height, width, input and output are: Keras and Flax; PyTorch; MLX and TensorFlow Lite."""

ONE_BY_ONE, DEPTHWISE, GROUPED = "1 x 1", "depthwise or with one input channel", "grouped"
NO_KERNEL = "neither a square nor a line of at most 16 pixels"
NOT_FLOATS, ZERO, LARGE = "not floating-point", "zero", "of over 2^24 numbers"

_LONGEST_SIDE = 16  # of a regular kernel: AlexNet has 11, the patches of ViT have 16
_MOST_ELEMENTS = 1 << 24
_CLEAR = 0.8  # share of the tensors that must make sense
_IMAGE_CHANNELS = 3
_KERNEL_NAMES = {"hwio": re.compile(r"kernel(:0)?$"), "oihw": re.compile(r"weight$")}


@dataclasses.dataclass(frozen=True)
class KernelSet:
    """The regular kernels of one network.

    Attributes:
      kernels: [kh, kw, c, f] in float64, by path of the layer.
      left_out: names of the other kernels, by reason.
      axes: how the order of the axes was found; '' where it is known.
    """

    kernels: Mapping[str, np.ndarray]
    left_out: Mapping[str, Sequence[str]]
    axes: str = ""


def find_kernels(content: Content[np.ndarray], where: str, axes: str | None = None) -> KernelSet:
    """Returns the regular kernels among the tensors of a file.

    Args:
      content: what the file contains.
      where: its path, for messages.
      axes: one of `AXES`; by default it is decided by the shapes and names of the tensors.

    Raises:
      InputMissingError: there is no tensor with four axes.
      BadDataError: a kernel holds numbers that are not finite.
      UsageError: the order of the axes cannot be decided.
    """
    tensors = {
        f"{group.name}/{name}" if group.name else name: tensor
        for group in content.groups
        for name, tensor in zip(group.names, group.tensors, strict=True)
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor.ndim == 4 and tensor.size}
    if not shapes:
        fix = "name a file with convolutions: tensors with four axes"
        raise InputMissingError("there is no tensor with four axes in the weight file", where, fix)
    order, evidence = (axes, "as --axes says") if axes else _decide(content, tensors, shapes, where)
    kernels: dict[str, np.ndarray] = {}
    left_out: dict[str, list[str]] = {}
    for name, reason in _sorted_out(tensors, shapes, AXES[order]):
        if not reason:
            kernels[name] = _scaled(tensors[name].transpose(AXES[order]), name, where)
            reason = "" if kernels[name].any() else ZERO
        if reason:
            kernels.pop(name, None)
            left_out.setdefault(reason, []).append(name)
    return KernelSet(kernels, left_out, f"{order}, {evidence}")


def _scaled(kernel: np.ndarray, name: str, where: str) -> np.ndarray:
    """Returns a kernel in float64 whose largest number is one, so that no square overflows."""
    values = np.asarray(kernel, np.float64)
    largest = float(np.abs(values).max())
    if not np.isfinite(largest):
        raise BadDataError(f"{name} holds non-finite values", where, COPY_AGAIN)
    return values / largest if largest > 0 else values


def _is_possible(shape: Sequence[int], axes: Sequence[int]) -> bool:
    """Returns whether a shape is that of a convolution in this order: a square of pixels, or a line of them."""
    height, width = (shape[axis] for axis in axes[:2])
    return max(height, width) <= _LONGEST_SIDE and (height == width or min(height, width) == 1)


def _decide(
    content: Content[np.ndarray], tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[str, str]:
    """Returns (order of the axes, the evidence in words)."""
    if content.format != SAFETENSORS:
        return "hwio", "as in all files of Keras"
    possible = {order: sum(_is_possible(shape, axes) for shape in shapes.values()) for order, axes in AXES.items()}
    most = max(possible.values())
    best = [order for order, count in possible.items() if count == most]
    if most < _CLEAR * len(shapes):
        counts = ", ".join(f"{order} {count}" for order, count in possible.items())
        what = f"the order of the axes is not clear: of {len(shapes)} tensors with four axes, kernels are {counts}"
        raise UsageError(what, where, f"if you know it, set --axes to one of {', '.join(AXES)}")
    share = f"{most} of {len(shapes)} tensors with four axes"
    if len(best) == 1:
        others = max(count for order, count in possible.items() if order not in best)
        return best[0], f"in which {share} can be kernels; in any other order {others} at most"
    for name, votes in (
        (
            "the biases of their layers have as many numbers as there are filters",
            _votes_of_sizes(tensors, shapes),
        ),
        ("they are named like that", _votes_of_names(shapes)),
    ):
        given = [order for order in best if votes[order] == max(votes[each] for each in best) > 0]
        if len(given) == 1:
            return given[0], f"because {name} ({votes[given[0]]} of {len(shapes)}); shapes allow {' and '.join(best)}"
    what = f"the order of the axes is not clear: all {most} kernels can be {' or '.join(best)}"
    raise UsageError(what, where, f"set --axes to one of {', '.join(best)}")


def _votes_of_sizes(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> Counter[str]:
    """Counts the kernels whose filters, in each order, are as many as the numbers of a vector of the same layer."""
    vectors: dict[str, set[int]] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            vectors.setdefault(_parent(name), set()).add(len(tensor))
    votes: Counter[str] = Counter()
    for name, shape in shapes.items():
        sizes = vectors.get(_parent(name), set())
        fitting = [order for order, axes in AXES.items() if shape[axes[3]] in sizes]
        if len({shape[AXES[order][3]] for order in fitting}) == 1:
            votes.update(fitting)
    return votes


def _votes_of_names(shapes: Mapping[str, tuple[int, ...]]) -> Counter[str]:
    return Counter(order for name in shapes for order, pattern in _KERNEL_NAMES.items() if pattern.search(name))


def _parent(name: str) -> str:
    """Returns the layer of a tensor: its name without what follows the last dot or slash."""
    return re.split(r"[./][^./]*$", name)[0]


def _sorted_out(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], axes: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """Yields (name, why the kernel is left out, or '' for a regular one), in natural order of the names."""
    produced = Counter(shape[axes[3]] for shape in shapes.values())
    before = 0  # channels that the kernel before this one produces
    for name in sorted(shapes, key=natural):
        shape = shapes[name]
        height, width, channels, filters = (shape[axis] for axis in axes)
        if not _is_possible(shape, axes):
            yield name, NO_KERNEL
            continue
        if tensors[name].dtype.kind in "iub":
            reason = NOT_FLOATS
        elif height == width == 1:
            reason = ONE_BY_ONE
        elif _is_depthwise(name, channels, filters):
            reason = DEPTHWISE
        elif _is_grouped(channels, filters, before, produced[channels] > (filters == channels)):
            reason = GROUPED
        else:
            reason = LARGE if tensors[name].size > _MOST_ELEMENTS else ""
        yield name, reason
        before = filters


def _is_depthwise(name: str, channels: int, filters: int) -> bool:
    """Returns whether a kernel is depthwise; the last axis of those of Keras is the multiplier, which is mostly one."""
    return channels == 1 or filters == 1 or re.search(r"depthwise|separable", name, re.IGNORECASE) is not None


def _is_grouped(channels: int, filters: int, before: int, others_match: bool) -> bool:
    """Returns whether a kernel reads a part of the channels that the kernel before it produces.

    A file does not say how convolutions are connected, so this is a guess. It is right for networks whose layers follow
    each other in the order of their names, such as ResNeXt and RegNet. Other networks halve their maps in layers whose
    names come late, or split their channels in two: a kernel that reads half is regular if others match.

    Args:
      channels: how many the kernel reads.
      filters: how many it produces.
      before: how many the kernel before it produces.
      others_match: whether another kernel produces as many as it reads.
    """
    if channels == _IMAGE_CHANNELS or before <= channels or before % channels:
        return False
    groups = before // channels
    return filters % groups == 0 and not (groups == 2 and others_match)
