"""Padding, output sizes and strided slices of images, NHWC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Padding = Literal["SAME", "VALID", "SYMMETRIC"]
Pads = tuple[tuple[int, int], tuple[int, int]]


def explicit_padding(padding: Padding, size: tuple[int, ...], window: tuple[int, ...], stride: int) -> Pads:
    """Returns ((top, bottom), (left, right)) for an image of `size` (height, width).

    SAME is TensorFlow's: the output has ceil(size / stride) rows, and where the number of padded rows is odd
    the extra one is at the bottom. SYMMETRIC pads `window // 2` on each side, as PyTorch ports do. The two differ
    for stride 2 wherever the side is even. VALID does not pad.

    Raises:
      ValueError: the padding is unknown, or a window is larger than the padded image.
    """
    if padding in ("VALID", "SYMMETRIC"):
        ends = [0 if padding == "VALID" else k // 2 for k in window]
        if any(n + 2 * end < k for n, k, end in zip(size, window, ends, strict=True)):
            raise ValueError(
                f"a window of {tuple(window)} does not fit into an image of {tuple(size)}, padding {padding}"
            )
        return (ends[0], ends[0]), (ends[1], ends[1])
    if padding != "SAME":
        raise ValueError(f"padding is {padding!r}; it must be 'SAME', 'VALID' or 'SYMMETRIC'")
    total = [max((-(-n // stride) - 1) * stride + k - n, 0) for n, k in zip(size, window, strict=True)]
    return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)


def output_size(size: tuple[int, ...], window: tuple[int, ...], stride: int, pads: Pads) -> tuple[int, int]:
    """Returns (rows, columns) of the output of windows over a padded image of `size` (height, width)."""
    rows, columns = ((n + sum(ends) - k) // stride + 1 for n, k, ends in zip(size, window, pads, strict=True))
    return rows, columns


def strided(x: Array, top: int, left: int, rows: int, columns: int, stride: int) -> Array:
    """Returns every `stride`-th row and column of x [b, h, w, c] from (top, left): [b, rows, columns, c]."""
    limits = (x.shape[0], top + (rows - 1) * stride + 1, left + (columns - 1) * stride + 1, x.shape[3])
    return lax.slice(x, (0, top, left, 0), limits, (1, stride, stride, 1))


def from_phases(
    phase: Callable[[int, int], Array], shape: tuple[int, ...], stride: int, top: int = 0, left: int = 0
) -> Array:
    """Interleaves stride x stride phases and crops the result.

    Args:
      phase: phase(i, j) returns rows i, i + stride, ... and columns j, j + stride, ... of the interleaved array.
      shape: [b, h, w, c] of the result.
      stride: number of phases along each axis.
      top, left: where the result begins in the interleaved array.
    """
    phases = jnp.stack([jnp.stack([phase(i, j) for j in range(stride)], 3) for i in range(stride)], 2)
    batch, down, _, across, _, channels = phases.shape
    whole = phases.reshape(batch, down * stride, across * stride, channels)
    return lax.slice(whole, (0, top, left, 0), (batch, top + shape[1], left + shape[2], channels))


def pad(x: Array, pads: Pads, value: float = 0.0) -> Array:
    """Returns x [b, h, w, c] with rows and columns of `value` around it."""
    return lax.pad(x, jnp.asarray(value, x.dtype), ((0, 0, 0), (*pads[0], 0), (*pads[1], 0), (0, 0, 0)))
