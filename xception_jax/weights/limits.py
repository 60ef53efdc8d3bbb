"""States the limits under which weight files are read. One environment variable raises them all."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import mmap
import os
import resource
from collections.abc import Iterator

from xception_jax.errors import ConfigError

COPY_AGAIN = "copy or download the file again"
VARIABLE = "XCEPTION_JAX_LIMITS"
RAISE = f"if you trust the file, raise all limits tenfold: {VARIABLE}=10"

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What reading one weight file may take.

    A good file stays far below: Inception V3 has 1,100 objects and a config of 150 kB, and 91 MB of Keras' Xception are
    read in 0.2 s.

    Attributes:
      objects: number of groups, arrays, names or members.
      text: bytes of all strings together, as they expand.
      tensor: bytes of one array.
      tensors: bytes of all arrays together.
      memory: bytes of address space beyond what Python and the libraries take.
      cpu: seconds of processor time.
      wall: seconds.
    """

    objects: int
    text: int
    tensor: int
    tensors: int
    memory: int
    cpu: int
    wall: int

    @classmethod
    def of(cls, file_bytes: int) -> Limits:
        """Returns the limits for a file of some size. Tensors may be eight times as large: pruned ones compress well.

        Raises:
          ConfigError: the environment variable is not a number of at least 1.
        """
        factor = _factor()
        scaled = {
            "objects": 20_000,
            "text": 16 * _MIB,
            "tensor": 2048 * _MIB,
            "tensors": 256 * _MIB + 8 * file_bytes,
            "memory": 512 * _MIB + 10 * file_bytes,
            "cpu": 10 + file_bytes // (20 * _MIB),
            "wall": 30 + file_bytes // (5 * _MIB),
        }
        return cls(**{name: int(factor * value) for name, value in scaled.items()})


def _factor() -> float:
    text = os.environ.get(VARIABLE) or "1"
    try:
        factor = float(text)
        if not 1 <= factor <= 1e6:  # also NaN
            raise ValueError
    except ValueError:
        raise ConfigError(f"{VARIABLE} is {text!r}", VARIABLE, "set it to a number from 1 to 1000000") from None
    return factor


def elements(shape: tuple[int, ...]) -> int:
    """Returns the number of elements, where an empty side counts as one: an empty array can claim any other side."""
    return math.prod(max(1, side) for side in shape)


def address_space() -> int | None:
    """Returns the bytes of address space that this process takes, or None if the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * mmap.PAGESIZE
    except OSError:
        return None


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Lets this process take at most `size` more bytes of memory, where the system can do this."""
    used, (soft, hard) = address_space(), resource.getrlimit(resource.RLIMIT_AS)
    if used is None or (soft != resource.RLIM_INFINITY and soft <= used + size):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
