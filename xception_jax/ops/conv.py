"""Convolution with any number of channel segments, from a regular one (1) to a depthwise one (all channels).

`conv` is the one entry. Each kind of convolution has the lowering that its platform runs well:

| kernel | TPU | GPU | CPU: `cpu_kernels`, or where they are not available |
|---|---|---|---|
| 1 x 1, one segment | matrix product | the same | matrix product, activations kept from being transposed |
| 1 x 1 with a stride | of the pixels that it reads | native | of the pixels that it reads |
| depthwise | `feature_group_count` | the same | shifted multiply-adds, filter gradient row by row |
| 1 < segments < channels | one batched product a tap | native on one GPU, else as on a TPU | as on a TPU |
| few input channels (the stem) | native | native | patches x matrix |
| otherwise | native | native | native |

`cpu_kernels` leave depthwise convolutions with a stride, or with another kernel than 3 x 3, 5 x 5 or 7 x 7, to the
lowering in plain JAX.

The choice is made when the program is lowered (`lax.platform_dependent`), not by the devices of this process, so
that a program exported or planned for a TPU on a CPU host gets the TPU's. On a CPU, XLA runs the native depthwise
convolution 10 to 30 times too slow and turns its filter gradient into a dense C x C convolution; and for a number
of segments that is neither 1 nor C, XLA's partitioner gathers the whole batch on every device (openxla/xla#47945).
On a GPU, a product of every second pixel ends the compiler (jaxlib 0.11.2: `triton_tiling_propagation.cc`, in
inference only), and the native convolution with segments is 1.3 to 8 times as fast as one product for each tap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from xception_jax.ops import cpu_kernels
from xception_jax.ops.padding import Padding, Pads, explicit_padding, from_phases, output_size, pad, strided

# On a CPU, segments of up to so many channels are not products of matrices: those leave most lanes of a vector idle.
_FEW_CHANNELS = 8
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
    return _conv(x, kernel, segments, stride, explicit_padding(padding, x.shape[1:3], kernel.shape[:2], stride))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, kernel, segments: int, stride: int, pads: Pads):
    return _value(x, kernel, segments, stride, pads, cpu_kernels.available(x, kernel))


def _conv_forward(x, kernel, segments: int, stride: int, pads: Pads):
    return _conv(x, kernel, segments, stride, pads), (x, kernel)


def _conv_backward(segments: int, stride: int, pads: Pads, residuals, dy):
    x, kernel = residuals
    return _gradients(x, kernel, dy, segments, stride, pads, cpu_kernels.available(x, kernel, dy))


# Layers of the same shape share what is traced for the first; that saves a third of the time to trace a network.
_traced_once = partial(jax.jit, inline=True, static_argnames=("segments", "stride", "pads", "kernels"))


@_traced_once
def _value(x, kernel, segments: int, stride: int, pads: Pads, kernels: bool):
    def on_cpu(x, kernel):
        if not kernels or _is_other_depthwise(kernel.shape, segments, stride):
            return _plain(x, kernel, segments, stride, pads)
        if has_small_segments(kernel.shape, segments, stride):
            return cpu_kernels.depthwise(x, kernel, pads)
        read, step = _pixels_read(x, kernel, stride, pads)
        return cpu_kernels.conv(read, kernel, segments, step, pads)

    gpu, tpu = (partial(lowering, segments=segments, stride=stride, pads=pads) for lowering in (_on_gpu, _on_tpu))
    return lax.platform_dependent(x, kernel, cpu=on_cpu, cuda=gpu, rocm=gpu, default=tpu)


@_traced_once
def _gradients(x, kernel, dy, segments: int, stride: int, pads: Pads, kernels: bool):
    def gradient_of(forward, x, kernel, dy):
        return jax.vjp(partial(forward, segments=segments, stride=stride, pads=pads), x, kernel)[1](dy)

    def on_cpu(x, kernel, dy):
        if not kernels or _is_other_depthwise(kernel.shape, segments, stride):
            return gradient_of(_plain, x, kernel, dy)
        if has_small_segments(kernel.shape, segments, stride):
            dx = _input_gradient(cpu_kernels.depthwise_input_gradient, x.shape, kernel, dy, segments, stride, pads)
            return dx, cpu_kernels.depthwise_filter_gradient(x, dy, kernel.shape, pads)
        read, spread, step = jax.vjp(lambda x: _pixels_read(x, kernel, stride, pads), x, has_aux=True)
        dx = _input_gradient(cpu_kernels.conv_input_gradient, read.shape, kernel, dy, segments, step, pads)
        return *spread(dx), cpu_kernels.conv_filter_gradient(read, dy, kernel.shape, segments, step, pads)

    gpu, tpu = partial(gradient_of, _on_gpu), partial(gradient_of, _on_tpu)
    return lax.platform_dependent(x, kernel, dy, cpu=on_cpu, cuda=gpu, rocm=gpu, default=tpu)


_conv.defvjp(_conv_forward, _conv_backward)


def has_small_segments(kernel_shape: tuple[int, ...], segments: int, stride: int) -> bool:
    """Whether `cpu_kernels.depthwise` computes this convolution: a depthwise one, or with few channels and filters."""
    kh, kw, channels, filters = kernel_shape
    largest = max(channels, filters // segments)
    if stride != 1 or kh != kw:
        return False
    return kh in cpu_kernels.DEPTHWISE_SIDES if largest == 1 else kh == 3 and largest <= _FEW_CHANNELS


def _is_other_depthwise(kernel_shape: tuple[int, ...], segments: int, stride: int) -> bool:
    """Whether this is a depthwise convolution that the kernels could only compute as a product for each channel."""
    _, _, channels, filters = kernel_shape
    return channels == 1 and 1 < segments == filters and not has_small_segments(kernel_shape, segments, stride)


def _input_gradient(gradient: Callable, x_shape: tuple[int, ...], kernel, dy, segments: int, stride: int, pads: Pads):
    """Returns the gradient for x, put together from what gradient(dy, kernel, segments, padding of dy) is at stride 1.

    Every stride-th row or column of x sees every stride-th tap.
    """

    def along(axis: int, place: int) -> tuple[int, tuple[int, int], int]:
        """Returns (the first tap, the padding of dy, how many rows there are) of those from `place` on."""
        skipped, tap = divmod(place + pads[axis][0], stride)
        count = -(-x_shape[1 + axis] // stride)
        taps = -(-(kernel.shape[axis] - tap) // stride)
        return tap, (taps - 1 - skipped, count + skipped - dy.shape[1 + axis]), count

    def phase(i: int, j: int):
        (first_row, vertical, rows), (first_column, horizontal, columns) = along(0, i), along(1, j)
        taps = kernel[first_row::stride, first_column::stride]
        if 0 in taps.shape:
            return jnp.zeros((x_shape[0], rows, columns, x_shape[3]), dy.dtype)
        return gradient(dy, taps, segments, (vertical, horizontal))

    return from_phases(phase, x_shape, stride)


# --- TPU and GPU -----------------------------------------------------------------------------------------------------


def _on_tpu(x, kernel, segments: int, stride: int, pads: Pads):
    x, stride = _pixels_read(x, kernel, stride, pads)
    if 1 < segments < x.shape[-1]:
        return _per_tap(x, kernel, segments, stride, pads)
    return _product_or_native(x, kernel, segments, stride, pads)


def _on_gpu(x, kernel, segments: int, stride: int, pads: Pads):
    if 1 < segments < x.shape[-1] and jax.device_count() > 1:
        return _per_tap(x, kernel, segments, stride, pads)
    return _product_or_native(x, kernel, segments, stride, pads)


def _pixels_read(x, kernel, stride: int, pads: Pads):
    """Returns (x, stride), for a 1 x 1 kernel without the pixels that a stride passes over, and 1.

    The gradients then have a quarter of the products.
    """
    if kernel.shape[:2] != (1, 1) or pads != ((0, 0), (0, 0)):
        return x, stride
    rows, columns = output_size(x.shape[1:3], (1, 1), stride, pads)
    return strided(x, 0, 0, rows, columns, stride), 1


def _product_or_native(x, kernel, segments: int, stride: int, pads: Pads):
    if _is_product(kernel, segments, stride, pads):
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    return _native(x, kernel, segments, stride, pads)


def _is_product(kernel, segments: int, stride: int, pads: Pads) -> bool:
    return kernel.shape[:2] == (1, 1) and segments == stride == 1 and pads == ((0, 0), (0, 0))


def _native(x, kernel, segments: int, stride: int, pads: Pads):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=segments
    )


def _per_tap(x, kernel, segments: int, stride: int, pads: Pads):
    """One product of matrices for each tap, batched over the segments; local to each device's share of the batch."""
    kh, kw, channels, filters = kernel.shape
    rows, columns = output_size(x.shape[1:3], (kh, kw), stride, pads)
    padded = pad(x, pads)
    kernel = kernel.reshape(kh, kw, channels, segments, filters // segments)
    y = jnp.zeros((), x.dtype)
    for i in range(kh):
        for j in range(kw):
            tap = strided(padded, i, j, rows, columns, stride).reshape(x.shape[0], rows, columns, segments, channels)
            y = y + jnp.einsum("bhwsc,csf->bhwsf", tap, kernel[i, j])
    return y.reshape(x.shape[0], rows, columns, filters)


# --- CPU, in plain JAX -----------------------------------------------------------------------------------------------


def _plain(x, kernel, segments: int, stride: int, pads: Pads):
    x, stride = _pixels_read(x, kernel, stride, pads)
    if segments == x.shape[-1] > 1:
        return _depthwise(x, kernel, stride, pads)
    if segments > 1:
        return _per_tap(x, kernel, segments, stride, pads)
    if _is_product(kernel, segments, stride, pads):
        return _pointwise(x, kernel[0, 0])
    if kernel.size // kernel.shape[-1] <= _MAX_PATCH:
        return _patches_product(x, kernel, stride, pads)
    return _native(x, kernel, segments, stride, pads)


@jax.custom_vjp
def _pointwise(x, kernel):
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def _pointwise_forward(x, kernel):
    return _pointwise(x, kernel), (x, kernel)


def _pointwise_backward(residuals, dy):
    x, kernel = residuals
    dx = lax.dot_general(dy, kernel, (((3,), (1,)), ((), ())))
    # Without the barrier, XLA's CPU backend fuses a transpose of the activations into the pass before it.
    x, dy = lax.optimization_barrier((x, dy))
    return dx, lax.dot_general(x, dy, (((0, 1, 2), (0, 1, 2)), ((), ())))


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, stride: int, pads: Pads):
    """The sum over taps of the shifted input times the tap's weight for each channel."""
    kh, kw, _, filters = kernel.shape
    rows, columns = output_size(x.shape[1:3], (kh, kw), stride, pads)
    padded = jnp.repeat(pad(x, pads), filters // x.shape[-1], axis=-1)
    taps = ((i, j) for i in range(kh) for j in range(kw))
    return sum(strided(padded, i, j, rows, columns, stride) * kernel[i, j, 0] for i, j in taps)


def _depthwise_forward(x, kernel, stride: int, pads: Pads):
    return _depthwise(x, kernel, stride, pads), (x, kernel)


def _depthwise_backward(stride: int, pads: Pads, residuals, dy):
    x, kernel = residuals
    dx = _input_gradient(_depthwise_turned, x.shape, kernel, dy, x.shape[-1], stride, pads)
    return dx, _depthwise_filter_gradient(x, kernel, dy, stride, pads)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _depthwise_turned(dy, kernel, segments: int, pads: Pads):
    """The gradient for x at stride 1: of dy, padded, with the kernel turned round; summed over a channel's filters."""
    dx = _depthwise(dy, kernel[::-1, ::-1], 1, pads)
    return dx.reshape(*dx.shape[:3], segments, -1).sum(-1) if kernel.shape[-1] > segments else dx


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
            return taps.at[tap].add((x_row * dy_row).sum((1, 2)))

        return lax.fori_loop(0, kh * kw, add_tap, taps)

    taps = lax.fori_loop(0, rows, add_row, jnp.zeros((kh * kw, batch, filters), dtype))
    # The images are summed last: a sum over devices in the loop would be one in each of its turns.
    return taps.sum(1).reshape(kernel.shape).astype(kernel.dtype)


def _patches_product(x, kernel, stride: int, pads: Pads):
    """Gathers the taps of each output pixel into one row of a matrix, then multiplies once."""
    kh, kw, _, filters = kernel.shape
    rows, columns = output_size(x.shape[1:3], (kh, kw), stride, pads)
    padded = pad(x, pads)
    taps = [strided(padded, i, j, rows, columns, stride) for i in range(kh) for j in range(kw)]
    return _pointwise(jnp.concatenate(taps, axis=-1), kernel.reshape(-1, filters))
