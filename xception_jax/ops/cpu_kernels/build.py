"""Builds the C++ kernels with the machine's compiler and registers them with XLA.

The compiler is `$CXX`, or the first of g++, clang++ and c++ that is installed. Compiling a library takes 10 to 20 s.
It is kept in `$XDG_CACHE_HOME/xception_jax` (by default `~/.cache/xception_jax`).
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
import sys
import tempfile
from pathlib import Path

import jax
import jaxlib
from tqdm import tqdm

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
    version = Path(opened._name).stem
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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xception_jax"
    path = cache / f"cpu_{source}_{_version(source)}.so"
    try:
        if not path.exists():
            tqdm.write(f"building the CPU kernels of {source}.cc, once: 10 to 20 s ...", file=sys.stderr)
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                built = Path(scratch) / path.name
                subprocess.run(compile_command(source, built), check=True, capture_output=True, text=True)
                built.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.warning(
            "The CPU kernels could not be built: convolutions use their slower lowering.\n  where: %s\n  why: %s",
            shlex.join(compile_command(source, path)),
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


def _version(source: str) -> str:
    """Hashes all that a library depends on: machines with different processors may share a cache directory."""
    texts = [path.read_text() for path in (_path(source), *sorted(_path(source).parent.glob("*.h")))]
    parts = [*texts, *compiler(), *_FLAGS, jaxlib.__version__, platform.platform(), processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
