"""Turns images: multiplies each block of 2 x 2 pixels and 3 channels by an orthogonal matrix, which loses nothing.

The 12 values of a block are a vector over (channel, tap). It is multiplied by Q(t) = exp(t A) with A skew-symmetric, so
that distances, norms and the error of the best possible classifier stay what they are, and exp(-t A) turns back. Two
kinds of A have the same norm, but differ in what they do to separability:

'kronecker'  A = A_c x 1 + 1 x A_s, so that Q = Q_c x Q_s: channels and taps are turned apart. What is separable into
             channels and space stays so.
'free'       A is orthogonal to all matrices of that form: channels and taps are mixed with each other.

Both are drawn from one seed: a random skew-symmetric matrix is split into its part of the first form and the rest, so
each direction is uniformly distributed within its kind.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32
from scipy.linalg import expm

from xception_jax.config import DataConfig
from xception_jax.errors import ConfigError

BLOCK = 2
CHANNELS = 3
TAPS = BLOCK * BLOCK
SIZE = CHANNELS * TAPS

RMS_ANGLE = math.pi / 2
"""Root mean square of the angles, in radians, by which Q(1) turns: half of that of the farthest matrix, -1."""

Square = Float[np.ndarray, "d d"]


def kronecker_part(matrix: Square, channels: int = CHANNELS) -> Square:
    """Returns the orthogonal projection of a skew-symmetric matrix to those of the form A_c x 1 + 1 x A_s."""
    taps = len(matrix) // channels
    blocks = matrix.reshape(channels, taps, channels, taps)
    of_channels, of_taps = np.einsum("ctdt->cd", blocks) / taps, np.einsum("ctcu->tu", blocks) / channels
    return np.kron(of_channels, np.eye(taps)) + np.kron(np.eye(channels), of_taps)


KINDS: dict[str, Callable[[Square], Square]] = {
    "kronecker": kronecker_part,
    "free": lambda matrix: matrix - kronecker_part(matrix),
}
"""What is kept of a random skew-symmetric matrix, by the value of `config.data.turn`."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of images.

    Attributes:
      kind: one of `KINDS`.
      angle: t in Q(t) = exp(t A); 0 changes nothing, and -t turns back what t has turned.
      seed: draws A.
    """

    kind: str
    angle: float
    seed: int

    @classmethod
    def of(cls, data: DataConfig) -> Turn | None:
        """Returns the turn of `config.data`, or None if images stay as they are."""
        if data.turn not in KINDS or data.turn_angle == 0:
            return None
        return cls(data.turn, data.turn_angle, data.turn_seed)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Turn:
        """Builds the turn that a file describes.

        Raises:
          ValueError, TypeError: a field is unknown, has the wrong type or is out of range.
        """
        new = cls(**fields)
        if not isinstance(new.kind, str) or new.kind not in KINDS:
            raise ValueError(f"the kind of a turn must be one of {', '.join(KINDS)}")
        if isinstance(new.angle, bool) or not isinstance(new.angle, int | float) or not abs(new.angle) <= 1:
            raise ValueError("the angle of a turn must be from -1 to 1")
        if isinstance(new.seed, bool) or not isinstance(new.seed, int) or new.seed < 0:
            raise ValueError("the seed of a turn must be a whole number of at least 0")
        return new

    def back(self) -> Turn:
        """Returns the turn that undoes this one."""
        return dataclasses.replace(self, angle=-self.angle)

    def generator(self) -> Square:
        """Returns A: skew-symmetric, of rows and columns (channel, tap), with the channel first."""
        drawn = np.random.default_rng(self.seed).normal(size=(SIZE, SIZE))
        kept = KINDS[self.kind](drawn - drawn.T)
        return kept * (RMS_ANGLE * math.sqrt(SIZE) / np.linalg.norm(kept))

    def matrix(self) -> Square:
        """Returns Q(t), in float64."""
        return expm(self.angle * self.generator())

    def __call__(self, image: Float32[np.ndarray, "h w 3"]) -> None:
        """Turns an image in place.

        Raises:
          ConfigError: a side of the image is odd.
        """
        require_even(*image.shape[:2])
        rows, columns = image.shape[0] // BLOCK, image.shape[1] // BLOCK
        blocks = image.reshape(rows, BLOCK, columns, BLOCK, CHANNELS).transpose(0, 2, 4, 1, 3)
        turned = blocks.reshape(-1, SIZE) @ _factor(self)
        turned = turned.reshape(rows, columns, CHANNELS, BLOCK, BLOCK).transpose(0, 3, 1, 4, 2)
        image[...] = turned.reshape(image.shape)


@functools.lru_cache(maxsize=64)
def _factor(turn: Turn) -> Float32[np.ndarray, "12 12"]:
    """Returns what rows of blocks are multiplied by."""
    return np.ascontiguousarray(turn.matrix().T, np.float32)


def require_even(*sides: int) -> None:
    """Raises ConfigError if the sides of an image cannot be divided into blocks."""
    if any(side % BLOCK for side in sides):
        size = " x ".join(map(str, sides))
        raise ConfigError(
            f"images of {size} pixels cannot be turned, because blocks of {BLOCK} x {BLOCK} pixels do not fill them",
            "config.data.image_size with config.data.turn",
            f"set an even size, such as {max(BLOCK, sides[0] // BLOCK * BLOCK)}, or turn='none'",
        )
