"""Convolution with any number of channel segments, from a regular one (1) to a depthwise one (all channels).

`conv` is the one entry. Each kind of convolution has the lowering that its platform runs well:

| kernel | TPU, GPU | CPU |
|---|---|---|
| 1 x 1, one segment | matrix product | matrix product, activations kept from being transposed |
| depthwise | `feature_group_count` | a kernel of our own (cpu_kernels.py), or shifted multiply-adds |
| 1 < segments < channels | batched matrix products, one for each tap | the same |
| few input channels (the stem) | native | patches x matrix |
| otherwise | native | native |

The choice is made when the program is lowered (`lax.platform_dependent`), not by the devices of this process, so
that a program exported or planned for a TPU on a CPU host gets the TPU's. On a CPU, XLA runs the native depthwise
convolution 10 to 30 times too slow and turns its filter gradient into a dense C x C convolution; and for a number
of segments that is neither 1 nor C, XLA's partitioner gathers the whole batch on every device (openxla/xla#47945).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from xception_jax.ops import cpu_kernels
from xception_jax.ops.padding import Padding, Pads, explicit_padding, pad, strided

# On a CPU, a convolution whose patches have no more values than this is a product of patches and a matrix.
_MAX_PATCH = 300


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c_per_segment f"],
    *,
    segments: int = 1,
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "b oh ow f"]:
    """Convolves each of `segments` equal channel segments of x with its own share of the filters.

    Args:
      x: images or activations, NHWC.
      kernel: HWIO, where I counts the channels of one segment. Output channel j belongs to segment
        j // (f / segments), as with `feature_group_count`.
      segments: 1 is a regular convolution, c a depthwise one (section 1.2 of the paper).
      stride: of rows and columns.
      padding: 'SAME', 'VALID' or 'SYMMETRIC'.

    Raises:
      ValueError: the channels or filters are not divisible by the segments, or do not fit the kernel.
    """
    channels, filters = x.shape[-1], kernel.shape[-1]
    if channels % segments or filters % segments or kernel.shape[2] * segments != channels:
        raise ValueError(f"{segments} segments of x {x.shape} do not fit a kernel of shape {kernel.shape}")
    window = kernel.shape[:2]
    pads = explicit_padding(padding, x.shape[1:3], window, stride)
    if window == (1, 1) and segments == 1 and pads == ((0, 0), (0, 0)):
        return _pointwise(strided(x, 0, 0, -(-x.shape[1] // stride), -(-x.shape[2] // stride), stride), kernel[0, 0])
    if segments == channels > 1:
        return _depthwise(x, kernel, stride, pads)
    if segments > 1:
        return _per_tap(x, kernel, segments, stride, pads)
    if kernel.size // filters <= _MAX_PATCH:
        by_patches = partial(_patches_product, stride=stride, pads=pads)
        return lax.platform_dependent(x, kernel, cpu=by_patches, default=partial(_native, stride=stride, pads=pads))
    return _native(x, kernel, stride, pads)


def _native(x, kernel, stride: int, pads: Pads, segments: int = 1):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=segments
    )


def _output_size(x, window: tuple[int, int], stride: int, pads: Pads) -> tuple[int, int]:
    rows, columns = (
        (n + sum(low_high) - k) // stride + 1 for n, k, low_high in zip(x.shape[1:3], window, pads, strict=True)
    )
    return rows, columns


# --- 1 x 1 -----------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def _pointwise(x, kernel):
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def _pointwise_forward(x, kernel):
    return _pointwise(x, kernel), (x, kernel)


def _pointwise_backward(residuals, dy):
    x, kernel = residuals
    dx = lax.dot_general(dy, kernel, (((3,), (1,)), ((), ())))

    def filter_gradient(x, dy):
        return lax.dot_general(x, dy, (((0, 1, 2), (0, 1, 2)), ((), ())))

    def behind_barrier(x, dy):
        # Without the barrier, XLA's CPU backend fuses a transpose of the activations into the pass before it.
        return filter_gradient(*lax.optimization_barrier((x, dy)))

    return dx, lax.platform_dependent(x, dy, cpu=behind_barrier, default=filter_gradient)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


# --- depthwise -------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, stride: int, pads: Pads):
    def on_cpu(x, kernel):
        if _fits_cpu_kernels(x, kernel, stride):
            return cpu_kernels.depthwise(x, kernel, pads)
        return _depthwise_shifted(x, kernel, stride, pads)

    native = partial(_native, stride=stride, pads=pads, segments=x.shape[-1])
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=native)


def _depthwise_forward(x, kernel, stride: int, pads: Pads):
    return _depthwise(x, kernel, stride, pads), (x, kernel)


def _depthwise_backward(stride: int, pads: Pads, residuals, dy):
    def native(x, kernel, dy):
        forward = partial(_native, stride=stride, pads=pads, segments=x.shape[-1])
        return jax.vjp(forward, x, kernel)[1](dy)

    def on_cpu(x, kernel, dy):
        if _fits_cpu_kernels(x, kernel, stride):
            side = kernel.shape[0]
            (top, bottom), (left, right) = pads
            transposed = ((side - 1 - top, side - 1 - bottom), (side - 1 - left, side - 1 - right))
            dx = cpu_kernels.depthwise(dy, kernel[::-1, ::-1], transposed)
            return dx, cpu_kernels.depthwise_filter_gradient(x, dy, side, pads)
        dx = _depthwise_input_gradient(x, kernel, dy, stride, pads)
        return dx, _depthwise_filter_gradient(x, kernel, dy, stride, pads)

    return lax.platform_dependent(*residuals, dy, cpu=on_cpu, default=native)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _fits_cpu_kernels(x, kernel, stride: int) -> bool:
    kh, kw, _, filters = kernel.shape
    fits = stride == 1 and kh == kw and kh in cpu_kernels.SIDES and filters == x.shape[-1]
    return fits and cpu_kernels.available(x, kernel)


def _depthwise_shifted(x, kernel, stride: int, pads: Pads):
    """The sum over taps of the shifted input times the tap's weight for each channel."""
    kh, kw, _, filters = kernel.shape
    rows, columns = _output_size(x, (kh, kw), stride, pads)
    padded = jnp.repeat(pad(x, pads), filters // x.shape[-1], axis=-1)
    taps = ((i, j) for i in range(kh) for j in range(kw))
    return sum(strided(padded, i, j, rows, columns, stride) * kernel[i, j, 0] for i, j in taps)


def _depthwise_input_gradient(x, kernel, dy, stride: int, pads: Pads):
    """The transpose of `_depthwise_shifted`: a stride-1 convolution of the dilated dy with the flipped kernel."""
    kh, kw, _, filters = kernel.shape
    _, rows, columns, channels = x.shape
    low = [k - 1 - before for k, (before, _) in zip((kh, kw), pads, strict=True)]
    size = [n + sum(low_high) - k + 1 for n, k, low_high in zip((rows, columns), (kh, kw), pads, strict=True)]
    gaps = [((n - 1) * stride + 1) for n in dy.shape[1:3]]
    high = [n + k - 1 - g - lo for n, k, g, lo in zip((rows, columns), (kh, kw), gaps, low, strict=True)]
    assert all(g <= s for g, s in zip(gaps, size, strict=True))
    zero = jnp.zeros((), dy.dtype)
    dilated = lax.pad(dy, zero, [(0, 0, 0), (low[0], high[0], stride - 1), (low[1], high[1], stride - 1), (0, 0, 0)])
    taps = ((i, j) for i in range(kh) for j in range(kw))
    dx = sum(strided(dilated, i, j, rows, columns, 1) * kernel[kh - 1 - i, kw - 1 - j, 0] for i, j in taps)
    return dx.reshape(*x.shape, filters // channels).sum(-1) if filters > channels else dx


def _depthwise_filter_gradient(x, kernel, dy, stride: int, pads: Pads):
    """Accumulates all taps while walking over the rows of dy, so that each row is read from the cache.

    The taps are a loop too: as nine reductions in the body it is as fast, and takes twice as long to compile.
    """
    kh, kw, _, filters = kernel.shape
    batch, rows, columns, _ = dy.shape
    multiplier = filters // x.shape[-1]
    padded = lax.optimization_barrier(pad(x, pads))
    # A sum over all rows of the image: in bfloat16 it would be wrong by percents.
    dtype = jnp.promote_types(dy.dtype, jnp.float32)
    shape = (batch, 1, (columns - 1) * stride + 1, x.shape[-1])

    def add_row(row, taps):
        dy_row = lax.dynamic_slice_in_dim(dy, row, 1, axis=1).astype(dtype)

        def add_tap(tap, taps):
            x_row = lax.dynamic_slice(padded, (0, row * stride + tap // kw, tap % kw, 0), shape)
            x_row = jnp.repeat(strided(x_row, 0, 0, 1, columns, stride).astype(dtype), multiplier, axis=-1)
            return taps.at[tap].add((x_row * dy_row).sum((0, 1, 2)))

        return lax.fori_loop(0, kh * kw, add_tap, taps)

    taps = lax.fori_loop(0, rows, add_row, jnp.zeros((kh * kw, filters), dtype))
    return taps.reshape(kernel.shape).astype(kernel.dtype)


# --- between regular and depthwise -----------------------------------------------------------------------------------


def _per_tap(x, kernel, segments: int, stride: int, pads: Pads):
    """One product of matrices for each tap, batched over the segments; local to each device's share of the batch."""
    kh, kw, channels, filters = kernel.shape
    rows, columns = _output_size(x, (kh, kw), stride, pads)
    padded = pad(x, pads)
    kernel = kernel.reshape(kh, kw, channels, segments, filters // segments)
    y = jnp.zeros((), x.dtype)
    for i in range(kh):
        for j in range(kw):
            tap = strided(padded, i, j, rows, columns, stride).reshape(x.shape[0], rows, columns, segments, channels)
            y = y + jnp.einsum("bhwsc,csf->bhwsf", tap, kernel[i, j])
    return y.reshape(x.shape[0], rows, columns, filters)


# --- few input channels ----------------------------------------------------------------------------------------------


def _patches_product(x, kernel, stride: int, pads: Pads):
    """Gathers the taps of each output pixel into one row of a matrix, then multiplies once."""
    kh, kw, _, filters = kernel.shape
    rows, columns = _output_size(x, (kh, kw), stride, pads)
    padded = pad(x, pads)
    taps = [strided(padded, i, j, rows, columns, stride) for i in range(kh) for j in range(kw)]
    return _pointwise(jnp.concatenate(taps, axis=-1), kernel.reshape(-1, filters))
