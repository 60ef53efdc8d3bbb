"""C++ kernels for CPUs as JAX functions: convolution, max pooling, and fused layers for inference.

They take float32 on a host whose only device is its CPU. `build.py` compiles them (`kernels.cc`, `folded.cc`) when a
program first needs them. Where `available` returns False, callers use their slower lowering in plain JAX.

`XCEPTION_JAX_CPU_KERNELS=0` turns the kernels off; `XCEPTION_JAX_CPU_KERNELS=fma` keeps them from using AMX, the matrix
registers of newer Intel processors (`amx.h`).
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from xception_jax.environment import ALLOCATOR, TUNABLES, lacks_allocator
from xception_jax.ops.cpu_kernels import build
from xception_jax.ops.padding import Pads, output_size

log = logging.getLogger(__name__)

# Rows and columns of the kernels that `depthwise` takes: constants of its loops.
DEPTHWISE_SIDES = (3, 5, 7)


def available(*arrays: Array) -> bool:
    """Returns whether the kernels can take these arrays in the program that is being traced.

    Programs for several devices are left to XLA, which cannot partition custom calls; so are those on a mesh whose axes
    are part of the types of arrays.
    """
    return (
        all(array.dtype == jnp.float32 for array in arrays)
        and all(kind == jax.sharding.AxisType.Auto for kind in jax.sharding.get_abstract_mesh().axis_types)
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and os.environ.get("XCEPTION_JAX_CPU_KERNELS", "1") != "0"
        and build.register("kernels") is not None
    )


def conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c_per_segment f"], segments: int, stride: int, pads: Pads
) -> Float[Array, "b oh ow f"]:
    """Convolves each of `segments` equal channel segments with its own share of the filters."""
    rows, columns = output_size(x.shape[1:3], kernel.shape[:2], stride, pads)
    return _call(
        "conv",
        (x.shape[0], rows, columns, kernel.shape[3]),
        x,
        kernel,
        pads=pads,
        use_amx=_use_amx(),
        segments=segments,
        stride=stride,
        transposed=False,
    )


def conv_input_gradient(
    dy: Float[Array, "b oh ow f"], kernel: Float[Array, "kh kw c_per_segment f"], segments: int, pads: Pads
) -> Float[Array, "b h w c"]:
    """Returns the gradient of `conv` for x, at stride 1: convolves dy, padded by `pads`, with the transposed kernel."""
    rows, columns = output_size(dy.shape[1:3], kernel.shape[:2], 1, pads)
    return _call(
        "conv",
        (dy.shape[0], rows, columns, segments * kernel.shape[2]),
        dy,
        kernel,
        pads=pads,
        use_amx=_use_amx(),
        segments=segments,
        stride=1,
        transposed=True,
    )


def conv_filter_gradient(
    x: Float[Array, "b h w c"],
    dy: Float[Array, "b oh ow f"],
    kernel_shape: tuple[int, ...],
    segments: int,
    stride: int,
    pads: Pads,
) -> Float[Array, "kh kw c_per_segment f"]:
    """Returns the gradient of `conv` for its kernel."""
    _mention_allocator()
    return _call(
        "conv_filter_gradient",
        kernel_shape,
        x,
        dy,
        pads=pads,
        use_amx=_use_amx(),
        segments=segments,
        stride=stride,
    )


def depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c_per_segment f"], pads: Pads
) -> Float[Array, "b oh ow f"]:
    """Convolves each channel with its own filter at stride 1, or each small segment of channels with its few filters.

    The latter takes a 3 x 3 kernel, and at most 8 channels and filters in a segment: the lanes of the narrowest vector.
    """
    rows, columns = output_size(x.shape[1:3], kernel.shape[:2], 1, pads)
    return _call("depthwise", (x.shape[0], rows, columns, kernel.shape[3]), x, kernel, pads=pads)


def depthwise_input_gradient(
    dy: Float[Array, "b oh ow f"], kernel: Float[Array, "k k c_per_segment f"], segments: int, pads: Pads
) -> Float[Array, "b h w c"]:
    """Returns the gradient of `depthwise` for x: convolves dy, padded by `pads`, with the transposed kernel."""
    kh, kw, channels, filters = kernel.shape
    by_segment = kernel[::-1, ::-1].reshape(kh, kw, channels, segments, filters // segments)
    transposed = by_segment.swapaxes(2, 4).reshape(kh, kw, filters // segments, segments * channels)
    return depthwise(dy, transposed, pads)


def depthwise_filter_gradient(
    x: Float[Array, "b h w c"], dy: Float[Array, "b oh ow f"], kernel_shape: tuple[int, ...], pads: Pads
) -> Float[Array, "k k c_per_segment f"]:
    """Returns the gradient of `depthwise` for its kernel."""
    _mention_allocator()
    return _call("depthwise_filter_gradient", kernel_shape, x, dy, pads=pads)


def max_pool(x: Float[Array, "b h w c"], window: int, stride: int, pads: Pads) -> Float[Array, "b oh ow c"]:
    """Returns the largest value in each window."""
    rows, columns = output_size(x.shape[1:3], (window, window), stride, pads)
    return _call("max_pool", (x.shape[0], rows, columns, x.shape[3]), x, pads=pads, window=window, stride=stride)


def max_pool_gradient(
    x: Float[Array, "b h w c"],
    y: Float[Array, "b oh ow c"],
    dy: Float[Array, "b oh ow c"],
    window: int,
    stride: int,
    pads: Pads,
) -> Float[Array, "b h w c"]:
    """Returns the gradient of `max_pool`: the first of the largest values in a window gets all of its dy."""
    return _call("max_pool_gradient", x.shape, x, y, dy, pads=pads, window=window, stride=stride)


class PackedConv(NamedTuple):
    """The parameters of a layer with folded BatchNorm, in the order in which `folded_conv` reads them.

    Attributes:
      kernel: packed into panels.
      bias: padded to whole panels.
      depthwise: [k, k, c_per_segment, c], the kernel of the depthwise convolution before; an empty vector for none.
    """

    kernel: Float[Array, " n"]
    bias: Float[Array, " m"]
    depthwise: Array


def folded_available() -> bool:
    """Returns whether `folded_conv` can be used, on float32."""
    return available() and build.register("folded") is not None


def pack_conv(
    kernel: Float[np.ndarray, "kh kw c_per_segment f"],
    bias: Float[np.ndarray, " f"],
    depthwise: Float[np.ndarray, "k k c_per_depthwise_segment c"] | None,
    segments: int,
) -> PackedConv:
    """Packs the parameters of a layer for `folded_conv`, once for all its calls.

    Args:
      kernel: kernel of the convolution.
      bias: bias of the convolution, with the constants of BatchNorm.
      depthwise: the kernel of the depthwise convolution before, if any.
      segments: segments of the convolution.
    """
    kh, kw, channels, filters = kernel.shape
    library, use_amx = build.library("folded"), _use_amx()
    assert library is not None  # callers asked `folded_available`
    arguments = ctypes.c_bool(use_amx), ctypes.c_int64(kh * kw * channels), ctypes.c_int64(filters // segments)
    sizes = library.packed_size(*arguments), library.packed_bias_size(*arguments)
    shapes = [jax.ShapeDtypeStruct((segments * size,), jnp.float32) for size in sizes]
    call = jax.ffi.ffi_call(f"pack_conv_{build.register('folded')}", shapes)
    packed, packed_bias = call(
        jnp.asarray(kernel), jnp.asarray(bias), use_amx=np.bool_(use_amx), segments=np.int64(segments)
    )
    return PackedConv(packed, packed_bias, jnp.zeros(0) if depthwise is None else jnp.asarray(depthwise))


def folded_conv(
    x: Float[Array, "b h w c"],
    packed: PackedConv,
    residual: Float[Array, "b oh ow f"] | None,
    *,
    window: tuple[int, int],
    filters: int,
    segments: int,
    stride: int,
    pads: Pads,
    relu_first: bool,
    relu_last: bool,
) -> Float[Array, "b oh ow f"]:
    """Computes [ReLU] [depthwise convolution] convolution + bias [+ residual] [ReLU] as one kernel.

    Args:
      x: activations.
      packed: from `pack_conv`.
      residual: added after the bias.
      window, filters, segments, stride: those of the convolution, which is 1 x 1 with stride 1 after a depthwise one.
      pads: padding of the depthwise convolution if there is one, else of the convolution.
      relu_first: applies a ReLU to x; only before a depthwise convolution.
      relu_last: applies a ReLU to the result.
    """
    depthwise_window = packed.depthwise.shape[:2] if packed.depthwise.ndim == 4 else None
    rows, columns = output_size(x.shape[1:3], depthwise_window or window, stride, pads)
    return _call(
        "folded_conv",
        (x.shape[0], rows, columns, filters),
        x,
        packed.kernel,
        packed.bias,
        packed.depthwise,
        jnp.zeros(0) if residual is None else residual,
        source="folded",
        pads=pads,
        use_amx=_use_amx(),
        segments=segments,
        stride=stride,
        height=window[0],
        width=window[1],
        relu_first=relu_first,
        relu_last=relu_last,
    )


def _call(
    name: str, shape: tuple[int, ...], *arrays: Array, pads: Pads, source: str = "kernels", **attributes: int | bool
) -> Array:
    """Calls a handler; booleans become boolean attributes, integers 64-bit ones."""
    call = jax.ffi.ffi_call(
        f"{name}_{build.register(source)}", jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential"
    )
    attributes |= {"top": pads[0][0], "left": pads[1][0]}
    typed = {key: np.bool_(value) if isinstance(value, bool) else np.int64(value) for key, value in attributes.items()}
    return call(*arrays, **typed)


@functools.cache
def _mention_allocator() -> None:
    """Says once that a network is trained without the allocator's settings, as a user's own training loop may be."""
    if lacks_allocator():
        log.warning(
            "Training on a CPU is faster with other settings of the memory allocator. `xception-jax train` sets them "
            "itself. For your own program, set them before Python starts: export %s=%s",
            TUNABLES,
            ALLOCATOR,
        )


def _use_amx() -> bool:
    """Returns whether matrix products may use AMX. It is evaluated at trace time."""
    return os.environ.get("XCEPTION_JAX_CPU_KERNELS") != "fma" and _amx_permitted()


@functools.cache
def _amx_permitted() -> bool:
    """Requests AMX's tile registers from Linux, as each process must before it uses them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # <asm/unistd_64.h>, <asm/prctl.h>, Intel's XCR0
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
