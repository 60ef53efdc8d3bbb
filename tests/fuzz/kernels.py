"""Builds the fuzz target of the C++ kernels, which calls them with small shapes under two sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import jax.ffi
import numpy as np

KERNELS = "kernels"
SOURCE = Path(__file__).parent / "kernels.cc"

_INCLUDE = Path(__file__).parents[2] / "xception_jax" / "ops" / "cpu_kernels"
_FLAGS = ("-std=c++20", "-O1", "-g", "-march=native", "-fno-trapping-math", "-fno-omit-frame-pointer", "-pthread")
_SANITIZERS = "-fsanitize=address,undefined"


def build_kernels(directory: Path, *, with_fuzzer: bool = True) -> Path:
    """Builds the target, or with `with_fuzzer=False` a program that runs the inputs in the files of its arguments.

    Raises:
      RuntimeError: there is no compiler with what is needed; the message says what to install.
    """
    compiler = shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("there is no clang++")
    program = directory / ("kernels" if with_fuzzer else "replay_kernels")
    kind = ("-fsanitize=fuzzer",) if with_fuzzer else ("-DREPLAY",)
    includes = (f"-I{_INCLUDE}", f"-I{jax.ffi.include_dir()}")
    command = [compiler, *_FLAGS, _SANITIZERS, "-fno-sanitize-recover=undefined", *kind, *includes, str(SOURCE)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    if done.returncode:
        if "libclang_rt" in done.stderr:
            raise RuntimeError(
                "clang++ lacks its runtimes (Debian: apt install libclang-rt-14-dev, or of your version)"
            )
        raise RuntimeError(f"it does not compile: {done.stderr[:1000]}")
    return program


def kernel_seeds() -> dict[str, bytes]:
    """Returns inputs that call each kernel."""
    rng = np.random.default_rng(0)
    return {f"kernel{kind}_{n}": bytes([kind, *rng.integers(0, 256, 15)]) for kind in range(6) for n in range(2)}
