"""The kernels of kernels.cc and folded.cc as JAX functions: float32, on a host whose only device is its CPU.

They are compiled by the machine's C++ compiler ($CXX, g++ or clang++) when a program first needs them (10 to 20 s), and
kept in $XDG_CACHE_HOME/xception_jax (by default ~/.cache/xception_jax). Where `available` says no, callers take their
lowering in plain JAX, which gives the same values, slower. XCEPTION_JAX_CPU_KERNELS=0 turns the kernels off, and =fma
those products that use the tile registers of newer Intel processors (amx.h).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jaxtyping import Array, Float

from xception_jax.ops.padding import Pads, output_size

# Each source is a library of its own: who trains does not wait for what inference needs.
_NAMES = {
    "kernels": (
        "conv",
        "conv_filter_gradient",
        "depthwise",
        "depthwise_filter_gradient",
        "max_pool",
        "max_pool_gradient",
    ),
    "folded": ("pack_conv", "folded_conv"),
}
# Rows and columns of the kernels that `depthwise` takes: they are constants in its loops.
DEPTHWISE_SIDES = (3, 5, 7)


def available(*arrays: Array) -> bool:
    """Whether the kernels can take these arrays in the program that is being traced.

    A program for several devices is left to XLA, which cuts its own operations into shares but not foreign ones.
    """
    return (
        all(array.dtype == jnp.float32 for array in arrays)
        and jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and os.environ.get("XCEPTION_JAX_CPU_KERNELS", "1") != "0"
        and _register("kernels") is not None
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
        segments=segments,
        stride=stride,
        turned=False,
    )


def conv_input_gradient(
    dy: Float[Array, "b oh ow f"], kernel: Float[Array, "kh kw c_per_segment f"], segments: int, pads: Pads
) -> Float[Array, "b h w c"]:
    """The gradient of `conv` for x, at stride 1: convolves dy, padded by `pads`, with the kernel turned round."""
    rows, columns = output_size(dy.shape[1:3], kernel.shape[:2], 1, pads)
    shape = (dy.shape[0], rows, columns, segments * kernel.shape[2])
    return _call("conv", shape, dy, kernel, pads=pads, segments=segments, stride=1, turned=True)


def conv_filter_gradient(x, dy, kernel_shape: tuple[int, ...], segments: int, stride: int, pads: Pads):
    """The gradient of `conv` for its kernel."""
    return _call("conv_filter_gradient", kernel_shape, x, dy, pads=pads, segments=segments, stride=stride)


def depthwise(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c_per_segment f"], pads: Pads
) -> Float[Array, "b oh ow f"]:
    """Convolves each channel with its own filter, stride 1; or each segment of a few channels with a few filters.

    The latter needs a 3 x 3 kernel, and at most 8 channels and filters a segment: the lanes of the narrowest vector.
    """
    rows, columns = output_size(x.shape[1:3], kernel.shape[:2], 1, pads)
    return _call("depthwise", (x.shape[0], rows, columns, kernel.shape[3]), x, kernel, pads=pads)


def depthwise_input_gradient(
    dy: Float[Array, "b oh ow f"], kernel: Float[Array, "k k c_per_segment f"], segments: int, pads: Pads
) -> Float[Array, "b h w c"]:
    """The gradient of `depthwise` for x: convolves dy, padded by `pads`, with the kernel turned round."""
    kh, kw, channels, filters = kernel.shape
    of_segments = kernel[::-1, ::-1].reshape(kh, kw, channels, segments, filters // segments)
    turned = of_segments.swapaxes(2, 4).reshape(kh, kw, filters // segments, segments * channels)
    return depthwise(dy, turned, pads)


def depthwise_filter_gradient(x, dy, kernel_shape: tuple[int, ...], pads: Pads) -> Float[Array, "k k c_per_segment f"]:
    """The gradient of `depthwise` for its kernel."""
    return _call("depthwise_filter_gradient", kernel_shape, x, dy, pads=pads)


def max_pool(x: Float[Array, "b h w c"], window: int, stride: int, pads: Pads) -> Float[Array, "b oh ow c"]:
    """The largest value in each window."""
    rows, columns = output_size(x.shape[1:3], (window, window), stride, pads)
    return _call("max_pool", (x.shape[0], rows, columns, x.shape[3]), x, pads=pads, window=window, stride=stride)


def max_pool_gradient(x, y, dy, window: int, stride: int, pads: Pads) -> Float[Array, "b h w c"]:
    """The gradient of `max_pool`: the first of the largest values in a window takes all of dy."""
    return _call("max_pool_gradient", x.shape, x, y, dy, pads=pads, window=window, stride=stride)


class PackedConv(NamedTuple):
    """What a layer of a network without BatchNorm computes with, as `folded_conv` reads it.

    Attributes:
      kernel, bias: in panels as wide as a tile of the product.
      depthwise: [k, k, c_per_segment, c], of the convolution before that `depthwise` computes; empty for none.
    """

    kernel: Float[Array, " n"]
    bias: Float[Array, " m"]
    depthwise: Array


def folded_available() -> bool:
    """Whether `folded_conv` can be used, on float32."""
    return available() and _register("folded") is not None


def pack_conv(kernel, bias, depthwise, segments: int) -> PackedConv:
    """Brings the parameters of a layer into the order in which `folded_conv` reads them, once for all its calls.

    Args:
      kernel: [kh, kw, c_per_segment, f].
      bias: [f].
      depthwise: [k, k, c_per_segment, c], or None.
      segments: of the convolution.
    """
    kh, kw, channels, filters = kernel.shape
    library = _library("folded")
    assert library is not None  # `folded_available` said so
    sides = ctypes.c_int64(kh * kw * channels), ctypes.c_int64(filters // segments)
    of_segment = library.packed_size(*sides), library.packed_bias_size(*sides)
    shapes = [jax.ShapeDtypeStruct((segments * size,), jnp.float32) for size in of_segment]
    call = jax.ffi.ffi_call(f"pack_conv_{_register('folded')}", shapes)
    packed, packed_bias = call(jnp.asarray(kernel), jnp.asarray(bias), segments=np.int64(segments))
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
    """[ReLU] [depthwise convolution] convolution + bias [+ residual] [ReLU], in one pass.

    Args:
      x: activations.
      packed: by `pack_conv`. With a depthwise convolution, `window` is (1, 1), `stride` 1, and `pads` are of that.
      residual: added behind the bias.
      window, filters, segments, stride, pads: of the convolution.
      relu_first: takes the ReLU of x; only before a depthwise convolution.
      relu_last: takes the ReLU of the sum.
    """
    side = packed.depthwise.shape[0] if packed.depthwise.ndim == 4 else 0
    rows, columns = output_size(x.shape[1:3], (side, side) if side else window, stride, pads)
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
        side=side,
        segments=segments,
        stride=stride,
        height=window[0],
        width=window[1],
        relu_first=relu_first,
        relu_last=relu_last,
    )


def _call(name: str, shape: tuple[int, ...], *arrays, pads: Pads, source: str = "kernels", **attributes: int):
    attributes |= {"top": pads[0][0], "left": pads[1][0]}
    target, result = f"{name}_{_register(source)}", jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.ffi.ffi_call(target, result, vmap_method="sequential")
    return call(*arrays, **{key: np.int64(value) for key, value in attributes.items()})


@functools.cache
def _register(source: str) -> str | None:
    """Makes the kernels of a source known to XLA; returns what their names there end with, or None without them."""
    if (library := _library(source)) is None:
        return None
    version = Path(library._name).stem
    for name in _NAMES[source]:
        # The version in the name keeps a program in JAX's compilation cache from meeting kernels of another source.
        jax.ffi.register_ffi_target(f"{name}_{version}", jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return version


@functools.cache
def _library(source: str) -> ctypes.CDLL | None:
    """Opens the library of a source, which it builds if need be; None where that cannot be."""
    compiler = _compiler()
    if compiler is None:
        logging.warning("No C++ compiler found: convolutions on this CPU take their slower lowering.")
        return None
    path_of_source = Path(__file__).parent / f"{source}.cc"
    flags = ["-std=c++20", "-O3", "-march=native", "-fno-trapping-math", "-shared", "-fPIC", "-w"]
    command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", str(path_of_source)]
    # A directory for caches may be shared by machines of different make.
    sources = (path.read_text() for path in [path_of_source, *sorted(path_of_source.parent.glob("*.h"))])
    parts = [*sources, compiler, *flags, jaxlib.__version__, platform.platform(), _processor()]
    version = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xception_jax"
    path = cache / f"cpu_{source}_{version}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                built = Path(scratch) / path.name
                subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
                built.replace(path)
        library = ctypes.CDLL(str(path))
        ctypes.c_int64.in_dll(library, "may_use_amx").value = _amx_allowed()
        return library
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.warning(
            "The CPU kernels could not be built: convolutions take their slower lowering.\n  where: %s\n  why: %s",
            " ".join(command),
            str(reason).strip()[:500],
        )
        return None


def _compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)


def _amx_allowed() -> bool:
    """Asks Linux for the tile registers of AMX, as each process has to before it may use them."""
    linux = platform.system() == "Linux" and platform.machine() == "x86_64"
    if not linux or os.environ.get("XCEPTION_JAX_CPU_KERNELS") == "fma":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # <asm/unistd_64.h>, <asm/prctl.h>, Intel's XCR0
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _processor() -> str:
    """What distinguishes this machine's processor from others, for code that is compiled for exactly it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
