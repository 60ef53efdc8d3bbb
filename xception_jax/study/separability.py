"""Separability of kernels [kh, kw, c, f] by singular values: the dial of the studies.

A regular kernel equals a depthwise separable convolution if it has rank one in one of two ways:

- *within* filters, pointwise first (figure 4): each filter is one spatial pattern times a weight for each channel;
- *across* filters, depthwise first: in each channel, all filters share one spatial pattern.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

_BLOCK = 1 << 22  # elements that are decomposed in one call, which Ctrl-C cannot interrupt
_NOTHING = 1e-6  # share of a squared norm

Kernel = Float[np.ndarray, "kh kw c f"]
Matrices = Float[np.ndarray, "n taps m"]


def within_filters(kernel: Kernel) -> Matrices:
    """Returns a matrix [taps, c] for each filter."""
    kh, kw, c, f = kernel.shape
    return kernel.reshape(kh * kw, c, f).transpose(2, 0, 1)


def across_filters(kernel: Kernel) -> Matrices:
    """Returns a matrix [taps, f] for each channel."""
    kh, kw, c, f = kernel.shape
    return kernel.reshape(kh * kw, c, f).transpose(1, 0, 2)


FAMILIES: dict[str, Callable[[Kernel], Matrices]] = {"within": within_filters, "across": across_filters}
"""The two ways of being separable: what is of rank one."""


def blocks(matrices: Matrices) -> list[Matrices]:
    """Returns the matrices in parts that are small enough to be decomposed in one call."""
    rows = max(1, _BLOCK // matrices[0].size)
    return [matrices[start : start + rows] for start in range(0, len(matrices), rows)]


def component_energies(matrices: Matrices) -> Float[np.ndarray, "n rank"]:
    """Returns the squared singular values of each matrix, the largest one first."""
    return np.concatenate([np.square(np.linalg.svd(part, compute_uv=False)) for part in blocks(matrices)])


def dial(kernel: Kernel, family: str) -> float:
    """Returns the place of a kernel on the dial: 1 - share of its squared norm in the best rank-one parts.

    It is 0 if the kernel is separable.

    Args:
      kernel: not zero.
      family: 'within' or 'across' filters.
    """
    energy = component_energies(FAMILIES[family](kernel))
    return float(energy[:, 1:].sum() / energy.sum())


def rank(kernel: Kernel, family: str) -> int:
    """Returns the most patterns that a filter (a channel) needs for all but a millionth of its squared norm.

    Args:
      kernel: no filter (channel) is zero.
      family: 'within' or 'across' filters.
    """
    energy = component_energies(FAMILIES[family](kernel))
    left = 1 - energy.cumsum(1) / energy.sum(1, keepdims=True)
    return 1 + int((left > _NOTHING).sum(1).max())
