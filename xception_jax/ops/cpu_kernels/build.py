"""Builds the C++ kernels with the machine's compiler and registers them with XLA.

The compiler is `$CXX`, or the first of g++, clang++ and c++ that is installed. Compiling a library takes 10 to 20 s.
It is kept in `$XDG_CACHE_HOME/xception_jax/kernels` (by default in `~/.cache`), as `native` describes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import jax
import jaxlib

from xception_jax import native

# The FFI handlers of each source file. Two libraries, so that training does not wait for the inference kernels to
# compile.
HANDLERS = {
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
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-trapping-math", "-shared", "-fPIC")


@functools.cache
def register(source: str) -> str | None:
    """Registers the handlers of a source file with XLA.

    Returns:
      The version that the names of its handlers end with, or None if the library cannot be built.
    """
    if (opened := library(source)) is None:
        return None
    # With the version in its name, a program in JAX's compilation cache never calls kernels of another version.
    version = _library_name(source)
    for name in HANDLERS[source]:
        jax.ffi.register_ffi_target(f"{name}_{version}", jax.ffi.pycapsule(getattr(opened, name)), platform="cpu")
    return version


@functools.cache
def library(source: str) -> ctypes.CDLL | None:
    """Opens the library of a source file, and builds it first if needed.

    Returns:
      The library, or None, with a warning, if it cannot be built.
    """
    if not compiler():
        logging.warning("No C++ compiler found: convolutions on this CPU use their slower lowering.")
        return None
    command = functools.partial(compile_command, source)
    try:
        return native.load(_library_name(source), command, f"CPU kernels of {source}.cc")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.warning(
            "The CPU kernels could not be built: convolutions use their slower lowering.\n  where: %s\n  why: %s",
            shlex.join(command(Path(f"{source}.so"))),
            str(reason).strip()[:500],
        )
        return None


def compiler() -> list[str]:
    """Returns the command that runs the C++ compiler, arguments included; an empty one if there is no compiler."""
    command = os.environ.get("CXX")
    if command is None:
        return list(filter(shutil.which, ("g++", "clang++", "c++")))[:1]
    try:
        return shlex.split(command)
    except ValueError:  # an open quote; running it fails, and says what it is
        return [command]


def compile_command(source: str, output: Path) -> list[str]:
    """Returns the command that compiles a source file into a library."""
    return [*compiler(), *_FLAGS, "-isystem", jax.ffi.include_dir(), str(_path(source)), "-o", str(output)]


def processor() -> str:
    """Returns what distinguishes this machine's processor from others, for code that is compiled for exactly it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _path(source: str) -> Path:
    return Path(__file__).parent / f"{source}.cc"


@functools.cache
def _library_name(source: str) -> str:
    """Returns a name with a hash of all that a library depends on: machines with different processors share a cache."""
    texts = [path.read_text() for path in (_path(source), *sorted(_path(source).parent.glob("*.h")))]
    parts = [*texts, *compiler(), *_FLAGS, jaxlib.__version__, platform.platform(), processor()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"cpu_{source}_{digest[:16]}"
