"""Weights for timm's networks, and a photograph, from rules that both sides can compute: no file has to be shared."""

from __future__ import annotations

import zlib

import numpy as np

# Every sampled endpoint is compared at this many places.
PLACES = 64


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the tensor that timm calls `name`, in PyTorch's layout; it depends on its name and shape alone."""
    random = np.random.RandomState(zlib.crc32(name.encode()))  # whose numbers are the same in every NumPy
    if name.endswith("running_var"):
        value = random.uniform(0.5, 1.5, shape)
    elif len(shape) > 1:
        value = random.standard_normal(shape) * np.sqrt((2.0 if len(shape) == 4 else 1.0) / np.prod(shape[1:]))
    elif name.endswith("weight"):
        value = random.uniform(0.4, 0.9, shape)
    else:
        value = random.standard_normal(shape) * 0.2
    return value.astype(np.float32)


def part(photograph: np.ndarray, size: int) -> np.ndarray:
    """Returns a part of scikit-image's astronaut, [1, size, size, 3] in [-1, 1] and float64: cut out, not resized."""
    return photograph[None, 20 : 20 + size, 150 : 150 + size] / 127.5 - 1


def sample(values: np.ndarray) -> np.ndarray:
    """Returns values at places all over an NHWC array, after its largest magnitude."""
    flat = np.asarray(values, np.float64).ravel()
    places = np.linspace(0, flat.size - 1, PLACES).astype(int)
    return np.concatenate([[np.abs(flat).max()], flat[places]])
