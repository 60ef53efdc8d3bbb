"""Convolution with any number of channel segments, from a regular one (1) to a depthwise one (all channels).

`conv` is the only entry. Each kind of convolution has the lowering that its platform runs well:

| kernel | TPU | GPU | CPU: `cpu_kernels`, or where they are not available |
|---|---|---|---|
| 1 x 1, one segment | matrix product | the same | matrix product, activations kept from being transposed |
| 1 x 1 with a stride | of the pixels that it reads | native | of the pixels that it reads |
| depthwise | `feature_group_count` | the same | shifted multiply-adds, filter gradient row by row |
| 1 < segments < channels | one batched product per tap | native on one GPU, as on a TPU in a mesh | as on a TPU |
| few input channels (the stem) | native | native | patches x matrix |
| otherwise | native | native | native |

`lowerings.py` has all of these in JAX. `cpu_kernels` leave depthwise convolutions with a stride, or with another kernel
than 3 x 3, 5 x 5 or 7 x 7, to them.

The lowering is chosen when the program is lowered (`lax.platform_dependent`), not by the devices of this process, so
that a program that is exported or planned for a TPU on a CPU host gets the TPU's. The reasons: on a CPU, XLA runs the
native depthwise convolution 10 to 30 times too slowly and turns its filter gradient into a dense C x C convolution; for
a number of segments that is neither 1 nor C, XLA's partitioner gathers the whole batch on every device
(openxla/xla#47945); on a GPU, a product of every second pixel crashes the compiler (jaxlib 0.11.2:
`triton_tiling_propagation.cc`, in inference only), and the native convolution with segments is 1.3 to 8 times as fast
as one product per tap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from xception_jax.ops import cpu_kernels, lowerings
from xception_jax.ops.lowerings import input_gradient, pixels_read
from xception_jax.ops.padding import Padding, Pads, explicit_padding

# On a CPU, segments of up to this many channels and filters are not computed as matrix products: those would leave most
# lanes of a vector idle. It is the number of lanes of the narrowest vectors that the kernels use.
_SMALL_SEGMENT = 8


def conv(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c_per_segment f"],
    *,
    segments: int = 1,
    stride: int = 1,
    padding: Padding = "SAME",
) -> Float[Array, "b oh ow f"]:
    """Convolves each of `segments` equal channel segments of x with its own share of the filters.

    Differentiable any number of times, in reverse mode only: `jax.jvp` and `jax.hessian` raise a TypeError. Works in
    `jax.shard_map`, and on a mesh with axes of type Auto.

    Args:
      x: images or activations, NHWC.
      kernel: HWIO, where I counts the channels of one segment. Output channel j belongs to segment
        j // (f / segments), as with `feature_group_count`.
      segments: 1 is a regular convolution, c a depthwise one (section 1.2 of the paper).
      stride: stride of rows and columns.
      padding: 'SAME', 'VALID' or 'SYMMETRIC'.

    Raises:
      ValueError: the channels or filters are not divisible by the segments, or do not fit the kernel; or a dimension of
        the kernel is 0, or the padded images are smaller than the kernel.
    """
    channels, filters = x.shape[-1], kernel.shape[-1]
    if 0 in kernel.shape[:3] or segments < 1 or stride < 1:
        raise ValueError(f"a kernel of shape {kernel.shape}, {segments} segments, stride {stride}: none may be below 1")
    if channels % segments or filters % segments or kernel.shape[2] * segments != channels:
        raise ValueError(f"{segments} segments of x {x.shape} do not fit a kernel of shape {kernel.shape}")
    pads = explicit_padding(padding, x.shape[1:3], kernel.shape[:2], stride)
    if jax.sharding.get_abstract_mesh().manual_axes:
        # Both vary over the same axes, so that JAX sums the gradient of a replicated kernel.
        x, kernel = x + jnp.zeros_like(kernel, shape=()), kernel + jnp.zeros_like(x, shape=())
    return _conv(x, kernel, segments, stride, pads)


def has_small_segments(kernel_shape: tuple[int, ...], segments: int, stride: int) -> bool:
    """Returns whether `cpu_kernels.depthwise` computes this convolution: depthwise, or few channels and filters."""
    kh, kw, channels, filters = kernel_shape
    largest = max(channels, filters // segments)
    if stride != 1 or kh != kw:
        return False
    return kh in cpu_kernels.DEPTHWISE_SIDES if largest == 1 else kh == 3 and largest <= _SMALL_SEGMENT


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x: Array, kernel: Array, segments: int, stride: int, pads: Pads) -> Array:
    return _value(x, kernel, segments, stride, pads, cpu_kernels.available(x, kernel))


def _conv_forward(x: Array, kernel: Array, segments: int, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _conv(x, kernel, segments, stride, pads), (x, kernel)


def _conv_backward(
    segments: int, stride: int, pads: Pads, residuals: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    return _conv_gradients(*residuals, dy, segments, stride, pads)


_conv.defvjp(_conv_forward, _conv_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _conv_gradients(x: Array, kernel: Array, dy: Array, segments: int, stride: int, pads: Pads) -> tuple[Array, Array]:
    return _gradients(x, kernel, dy, segments, stride, pads, cpu_kernels.available(x, kernel, dy))


def _conv_gradients_forward(
    x: Array, kernel: Array, dy: Array, segments: int, stride: int, pads: Pads
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    return _conv_gradients(x, kernel, dy, segments, stride, pads), (x, kernel, dy)


def _conv_gradients_backward(
    segments: int, stride: int, pads: Pads, residuals: tuple[Array, Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    # A gradient of the kernels' gradients would need kernels of its own.
    without_kernels = partial(_gradients, segments=segments, stride=stride, pads=pads, use_kernels=False)
    return jax.vjp(without_kernels, *residuals)[1](cotangents)


_conv_gradients.defvjp(_conv_gradients_forward, _conv_gradients_backward)

# Layers of equal shapes share one trace, which saves a third of the time to trace a network.
_traced_once = partial(jax.jit, inline=True, static_argnames=("segments", "stride", "pads", "use_kernels"))


@_traced_once
def _value(x: Array, kernel: Array, segments: int, stride: int, pads: Pads, use_kernels: bool) -> Array:
    def on_cpu(x: Array, kernel: Array) -> Array:
        if not use_kernels or _is_unsupported_depthwise(kernel.shape, segments, stride):
            return lowerings.on_cpu(x, kernel, segments, stride, pads)
        if has_small_segments(kernel.shape, segments, stride):
            return cpu_kernels.depthwise(x, kernel, pads)
        read, step = pixels_read(x, kernel, stride, pads)
        return cpu_kernels.conv(read, kernel, segments, step, pads)

    gpu, tpu = (partial(f, segments=segments, stride=stride, pads=pads) for f in (lowerings.on_gpu, lowerings.on_tpu))
    return lax.platform_dependent(x, kernel, cpu=on_cpu, cuda=gpu, rocm=gpu, default=tpu)


@_traced_once
def _gradients(
    x: Array, kernel: Array, dy: Array, segments: int, stride: int, pads: Pads, use_kernels: bool
) -> tuple[Array, Array]:
    def gradients_of(lowering: Callable, x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        return jax.vjp(partial(lowering, segments=segments, stride=stride, pads=pads), x, kernel)[1](dy)

    def on_cpu(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        if not use_kernels or _is_unsupported_depthwise(kernel.shape, segments, stride):
            return gradients_of(lowerings.on_cpu, x, kernel, dy)
        if has_small_segments(kernel.shape, segments, stride):
            dx = input_gradient(cpu_kernels.depthwise_input_gradient, x.shape, kernel, dy, segments, stride, pads)
            return dx, cpu_kernels.depthwise_filter_gradient(x, dy, kernel.shape, pads)
        read, gradient_of_read, step = jax.vjp(lambda x: pixels_read(x, kernel, stride, pads), x, has_aux=True)
        dread = input_gradient(cpu_kernels.conv_input_gradient, read.shape, kernel, dy, segments, step, pads)
        (dx,) = gradient_of_read(dread)
        return dx, cpu_kernels.conv_filter_gradient(read, dy, kernel.shape, segments, step, pads)

    gpu, tpu = partial(gradients_of, lowerings.on_gpu), partial(gradients_of, lowerings.on_tpu)
    return lax.platform_dependent(x, kernel, dy, cpu=on_cpu, cuda=gpu, rocm=gpu, default=tpu)


def _is_unsupported_depthwise(kernel_shape: tuple[int, ...], segments: int, stride: int) -> bool:
    """Returns whether the kernels could compute this depthwise convolution only as one matrix product per channel."""
    _, _, channels, filters = kernel_shape
    return channels == 1 and 1 < segments == filters and not has_small_segments(kernel_shape, segments, stride)
