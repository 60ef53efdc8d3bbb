"""The kernels of kernels.cc as JAX functions: float32, on a host whose only device is its CPU.

They are compiled by the machine's C++ compiler ($CXX, g++ or clang++) when a program first needs them (10 s), and kept
in $XDG_CACHE_HOME/xception_jax (by default ~/.cache/xception_jax). Where `available` says no, callers take their
lowering in plain JAX, which gives the same values, slower. XCEPTION_JAX_CPU_KERNELS=0 turns the kernels off.
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

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jaxtyping import Array, Float

from xception_jax.ops.padding import Pads, output_size

_SOURCE = Path(__file__).parent / "kernels.cc"
_NAMES = ("conv", "conv_filter_gradient", "depthwise", "depthwise_filter_gradient", "max_pool", "max_pool_gradient")
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
        and _register() is not None
    )


def conv(
    x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c_per_segment f"], segments: int, stride: int, pads: Pads
) -> Float[Array, "b oh ow f"]:
    """Convolves each of `segments` equal channel segments with its own share of the filters."""
    rows, columns = output_size(x.shape[1:3], kernel.shape[:2], stride, pads)
    return _call(
        "conv", (x.shape[0], rows, columns, kernel.shape[3]), x, kernel, pads=pads, segments=segments, stride=stride
    )


def conv_filter_gradient(x, dy, kernel_shape: tuple[int, ...], segments: int, stride: int, pads: Pads):
    """The gradient of `conv` for its kernel."""
    return _call("conv_filter_gradient", kernel_shape, x, dy, pads=pads, segments=segments, stride=stride)


def depthwise(x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"], pads: Pads) -> Float[Array, "b oh ow c"]:
    """Convolves each channel with its own filter, stride 1."""
    rows, columns = output_size(x.shape[1:3], kernel.shape[:2], 1, pads)
    return _call("depthwise", (x.shape[0], rows, columns, x.shape[3]), x, kernel, pads=pads)


def depthwise_filter_gradient(x, dy, side: int, pads: Pads) -> Float[Array, "k k 1 c"]:
    """The gradient of `depthwise` for its kernel of `side` rows and columns."""
    shape = (side, side, 1, x.shape[3])
    return _call("depthwise_filter_gradient", shape, x, dy, pads=pads)


def max_pool(x: Float[Array, "b h w c"], window: int, stride: int, pads: Pads) -> Float[Array, "b oh ow c"]:
    """The largest value in each window."""
    rows, columns = output_size(x.shape[1:3], (window, window), stride, pads)
    return _call("max_pool", (x.shape[0], rows, columns, x.shape[3]), x, pads=pads, window=window, stride=stride)


def max_pool_gradient(x, y, dy, window: int, stride: int, pads: Pads) -> Float[Array, "b h w c"]:
    """The gradient of `max_pool`: the first of the largest values in a window takes all of dy."""
    return _call("max_pool_gradient", x.shape, x, y, dy, pads=pads, window=window, stride=stride)


def _call(name: str, shape: tuple[int, ...], *arrays, pads: Pads, **attributes: int):
    attributes |= {"top": pads[0][0], "left": pads[1][0]}
    call = jax.ffi.ffi_call(f"{name}_{_register()}", jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential")
    return call(*arrays, **{key: np.int64(value) for key, value in attributes.items()})


@functools.cache
def _register() -> str | None:
    """Makes the kernels known to XLA; returns what their names there end with, or None where they cannot be built."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        logging.warning("No C++ compiler found: convolutions on this CPU take their slower lowering.")
        return None
    flags = ["-std=c++20", "-O3", "-march=native", "-fno-trapping-math", "-shared", "-fPIC", "-w"]
    command = [compiler, *flags, f"-I{jax.ffi.include_dir()}", str(_SOURCE)]
    # A directory for caches may be shared by machines of different make.
    sources = (path.read_text() for path in sorted(_SOURCE.parent.glob("*.[ch]*")))
    parts = [*sources, compiler, *flags, jaxlib.__version__, platform.platform(), _processor()]
    version = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xception_jax"
    path = cache / f"cpu_kernels_{version}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                built = Path(scratch) / path.name
                subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
                built.replace(path)
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.warning(
            "The CPU kernels could not be built: convolutions take their slower lowering.\n  where: %s\n  why: %s",
            " ".join(command),
            str(reason).strip()[:500],
        )
        return None
    for name in _NAMES:
        # The version in the name keeps a program in JAX's compilation cache from meeting kernels of another source.
        jax.ffi.register_ffi_target(f"{name}_{version}", jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return version


def _processor() -> str:
    """What distinguishes this machine's processor from others, for code that is compiled for exactly it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
