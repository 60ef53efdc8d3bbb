"""Lowerings of convolution in JAX, one entry per platform: `on_tpu`, `on_gpu` and `on_cpu`. See the table in `conv.py`.

Each is differentiable, takes x [b, h, w, c] and kernel [kh, kw, c_per_segment, f], and returns [b, oh, ow, f].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from xception_jax.ops.padding import Pads, from_phases, output_size, pad, strided

# On a CPU, a convolution whose patches have at most this many values is computed as patches x matrix.
_MAX_PATCH = 300


def on_tpu(x: Array, kernel: Array, segments: int, stride: int, pads: Pads) -> Array:
    """Convolves on a TPU, and on any platform that has no lowering of its own."""
    x, stride = pixels_read(x, kernel, stride, pads)
    if 1 < segments < x.shape[-1]:
        return _per_tap(x, kernel, segments, stride, pads)
    return _product_or_native(x, kernel, segments, stride, pads)


def on_gpu(x: Array, kernel: Array, segments: int, stride: int, pads: Pads) -> Array:
    """Convolves on GPUs. Over several of them, XLA would gather the whole batch for a native one with segments."""
    if 1 < segments < x.shape[-1] and jax.sharding.get_abstract_mesh().size > 1:
        return _per_tap(x, kernel, segments, stride, pads)
    return _product_or_native(x, kernel, segments, stride, pads)


def on_cpu(x: Array, kernel: Array, segments: int, stride: int, pads: Pads) -> Array:
    """Convolves on a CPU."""
    x, stride = pixels_read(x, kernel, stride, pads)
    if segments == x.shape[-1] > 1:
        return _depthwise(x, kernel, stride, pads)
    if segments > 1:
        return _per_tap(x, kernel, segments, stride, pads)
    if _is_product(kernel, segments, stride, pads):
        return _pointwise(x, kernel[0, 0])
    if kernel.size // kernel.shape[-1] <= _MAX_PATCH:
        return _patches_product(x, kernel, stride, pads)
    return native(x, kernel, segments, stride, pads)


# --- Shared ----------------------------------------------------------------------------------------------------------


def pixels_read(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, int]:
    """Selects the pixels that a 1 x 1 convolution with a stride reads, so that its gradients have no others.

    Returns:
      (these pixels, 1), or (x, stride) for other kernels.
    """
    if kernel.shape[:2] != (1, 1) or pads != ((0, 0), (0, 0)):
        return x, stride
    rows, columns = output_size(x.shape[1:3], (1, 1), stride, pads)
    return strided(x, 0, 0, rows, columns, stride), 1


def input_gradient(
    gradient: Callable[[Array, Array, int, Pads], Array],
    x_shape: tuple[int, ...],
    kernel: Array,
    dy: Array,
    segments: int,
    stride: int,
    pads: Pads,
) -> Array:
    """Assembles the gradient for x, at any stride, from input gradients at stride 1.

    Every stride-th row or column of x meets every stride-th tap only. So the gradient consists of stride x stride
    phases, each of which is the input gradient of a convolution at stride 1 with some of the taps.

    Args:
      gradient: takes (dy, kernel, segments, padding of dy) and returns the input gradient at stride 1.
      x_shape: shape of x, and of the result.
      kernel, dy, segments, stride, pads: those of the convolution.
    """

    def along(axis: int, first: int) -> tuple[int, tuple[int, int], int]:
        """Returns (first tap, padding of dy, number of rows) of the phase that begins at row `first`."""
        skipped, tap = divmod(first + pads[axis][0], stride)
        count = -(-x_shape[1 + axis] // stride)
        taps = -(-(kernel.shape[axis] - tap) // stride)
        return tap, (taps - 1 - skipped, count + skipped - dy.shape[1 + axis]), count

    def phase(i: int, j: int) -> Array:
        (first_row, vertical, rows), (first_column, horizontal, columns) = along(0, i), along(1, j)
        taps = kernel[first_row::stride, first_column::stride]
        if 0 in taps.shape:
            return jnp.zeros((x_shape[0], rows, columns, x_shape[3]), dy.dtype)
        return gradient(dy, taps, segments, (vertical, horizontal))

    return from_phases(phase, x_shape, stride)


def _product_or_native(x: Array, kernel: Array, segments: int, stride: int, pads: Pads) -> Array:
    if _is_product(kernel, segments, stride, pads):
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    return native(x, kernel, segments, stride, pads)


def _is_product(kernel: Array, segments: int, stride: int, pads: Pads) -> bool:
    return kernel.shape[:2] == (1, 1) and segments == stride == 1 and pads == ((0, 0), (0, 0))


def native(x: Array, kernel: Array, segments: int, stride: int, pads: Pads) -> Array:
    """Computes one `conv_general_dilated`."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=segments
    )


def _per_tap(x: Array, kernel: Array, segments: int, stride: int, pads: Pads) -> Array:
    """Computes one matrix product per tap, batched over the segments; local to each device's share of the batch."""
    kh, kw, channels, filters = kernel.shape
    rows, columns = output_size(x.shape[1:3], (kh, kw), stride, pads)
    # Sums over the taps, of y and of the gradient for x, are float32, as in a convolution that XLA computes.
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    padded = pad(x, pads).astype(dtype)
    kernel = kernel.reshape(kh, kw, channels, segments, filters // segments)
    y = jnp.zeros((), dtype)
    for i in range(kh):
        for j in range(kw):
            tap = strided(padded, i, j, rows, columns, stride).astype(x.dtype)
            tap = tap.reshape(x.shape[0], rows, columns, segments, channels)
            y = y + jnp.einsum("bhwsc,csf->bhwsf", tap, kernel[i, j], preferred_element_type=dtype)
    return y.astype(x.dtype).reshape(x.shape[0], rows, columns, filters)


# --- CPU -------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _pointwise(x: Array, kernel: Array) -> Array:
    """Multiplies x [b, h, w, c] with kernel [c, f]."""
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def _pointwise_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _pointwise(x, kernel), (x, kernel)


def _pointwise_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dx = lax.dot_general(dy, kernel, (((3,), (1,)), ((), ())))
    # Without the barrier, XLA's CPU backend fuses a transpose of the activations into the operation before.
    x, dy = lax.optimization_barrier((x, dy))
    return dx, lax.dot_general(x, dy, (((0, 1, 2), (0, 1, 2)), ((), ())))


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Sums over the taps: the shifted input times the tap's weight for each channel."""
    kh, kw, _, filters = kernel.shape
    rows, columns = output_size(x.shape[1:3], (kh, kw), stride, pads)
    padded = jnp.repeat(pad(x, pads), filters // x.shape[-1], axis=-1)
    y = jnp.zeros((), x.dtype)
    for i in range(kh):
        for j in range(kw):
            y = y + strided(padded, i, j, rows, columns, stride) * kernel[i, j, 0]
    return y


def _depthwise_forward(x: Array, kernel: Array, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise(x, kernel, stride, pads), (x, kernel)


def _depthwise_backward(stride: int, pads: Pads, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dx = input_gradient(_depthwise_transposed, x.shape, kernel, dy, x.shape[-1], stride, pads)
    return dx, _depthwise_filter_gradient(x, kernel, dy, stride, pads)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _depthwise_transposed(dy: Array, kernel: Array, segments: int, pads: Pads) -> Array:
    """Returns the gradient for x at stride 1: convolves padded dy with the flipped kernel, sums a channel's filters."""
    dx = _depthwise(dy, kernel[::-1, ::-1], 1, pads)
    return dx.reshape(*dx.shape[:3], segments, -1).sum(-1) if kernel.shape[-1] > segments else dx


def _depthwise_filter_gradient(x: Array, kernel: Array, dy: Array, stride: int, pads: Pads) -> Array:
    """Accumulates all taps for one row of dy after the other, so that each row is read from the cache.

    The taps are a loop as well: nine reductions in its body are as fast, and take twice as long to compile.
    """
    kh, kw, _, filters = kernel.shape
    batch, rows, columns, _ = dy.shape
    multiplier = filters // x.shape[-1]
    padded = lax.optimization_barrier(pad(x, pads))
    # A sum over all rows of the image: bfloat16 would be off by several percent.
    dtype = jnp.promote_types(dy.dtype, jnp.float32)
    shape = (batch, 1, (columns - 1) * stride + 1, x.shape[-1])

    def add_row(row: Array, taps: Array) -> Array:
        dy_row = lax.dynamic_slice_in_dim(dy, row, 1, axis=1).astype(dtype)

        def add_tap(tap: Array, taps: Array) -> Array:
            x_row = lax.dynamic_slice(padded, (0, row * stride + tap // kw, tap % kw, 0), shape)
            x_row = jnp.repeat(strided(x_row, 0, 0, 1, columns, stride).astype(dtype), multiplier, axis=-1)
            return taps.at[tap].add((x_row * dy_row).sum((1, 2)))

        return lax.fori_loop(0, kh * kw, add_tap, taps)

    taps = lax.fori_loop(0, rows, add_row, jnp.zeros_like(dy, shape=(kh * kw, batch, filters), dtype=dtype))
    # Images are summed last: inside the loop, this sum over devices would communicate in each iteration.
    return taps.sum(1).reshape(kernel.shape).astype(kernel.dtype)


def _patches_product(x: Array, kernel: Array, stride: int, pads: Pads) -> Array:
    """Gathers the taps of each output pixel into a row of a matrix, then multiplies once."""
    kh, kw, _, filters = kernel.shape
    rows, columns = output_size(x.shape[1:3], (kh, kw), stride, pads)
    padded = pad(x, pads)
    taps = [strided(padded, i, j, rows, columns, stride) for i in range(kh) for j in range(kw)]
    return _pointwise(jnp.concatenate(taps, axis=-1), kernel.reshape(-1, filters))
