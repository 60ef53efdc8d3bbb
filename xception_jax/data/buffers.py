"""Memory for the images of batches."""

from __future__ import annotations

import collections
import math
import weakref

import numpy as np
from jaxtyping import Float32


class Buffers:
    """Allocates arrays and reuses their memory once they are no longer referenced.

    The 34 MB of a batch of 32 images at 299 pixels would otherwise return to the operating system, which maps and
    clears fresh memory page by page: with glibc's default settings, that costs half of the images per second.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = collections.defaultdict(list)  # by size in bytes

    def __reduce__(self) -> tuple:
        """Pickles as empty buffers: each worker process has its own."""
        return Buffers, ()

    def array(self, shape: tuple[int, ...]) -> Float32[np.ndarray, ...]:
        """Returns an uninitialised array. Its memory is reused when the array and all views of it are gone."""
        size = 4 * math.prod(shape)
        free = self._free[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8).data
        # NumPy makes every view refer to `flat`, not to `memory`, because the base of `flat` is not an array.
        flat = np.frombuffer(memory, np.float32)
        weakref.finalize(flat, free.append, memory).atexit = False
        return flat.reshape(shape)
