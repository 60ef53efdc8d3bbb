"""Makes banks of templates, [classes, 3, 3, channels], whose separability is set by a dial, and measures it.

A bank is separable in two ways, each of which one order of a separable convolution represents exactly:

- *within* filters: each template is one spatial pattern times a weight for each channel (pointwise first);
- *across* filters: in each channel, all templates share one spatial pattern (depthwise first).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from xception_jax.study.separability import dial, rank

CLASSES = CHANNELS = 12
SIDE = 3
_TAPS = SIDE * SIDE
FREE = 90.0

Bank = Float[np.ndarray, "k 3 3 c"]


@dataclasses.dataclass(frozen=True)
class BankSpec:
    """Names a bank; with a seed, it is drawn.

    Attributes:
      family: 'within' or 'across'.
      dial: an angle in degrees, from 0 (separable) to 90 (free), or a rank, from 1 (separable) to 9.
      unit: unit of the dial: 'angle' or 'rank'.
    """

    family: str
    dial: float
    unit: str = "angle"

    @property
    def name(self) -> str:
        """Returns its name in tables: 'within_0', 'across_rank4'; 'free', which both families share."""
        if self.unit == "angle" and self.dial == FREE:
            return "free"
        return f"{self.family}_{'rank' if self.unit == 'rank' else ''}{self.dial:g}"

    @property
    def is_valid(self) -> bool:
        """Returns whether there is such a bank."""
        dials = {"angle": 0 <= self.dial <= FREE, "rank": self.dial in range(1, _TAPS + 1)}
        return self.family in _OF_RANK and dials.get(self.unit, False)


def make_bank(spec: BankSpec, seed: int) -> Bank:
    """Draws a bank. Every template has a norm of one.

    The banks of one seed and family differ only in the dial: they mix the same separable and free templates. Both
    families share the free ones.
    """
    free = np.random.default_rng((seed, 0)).normal(size=(CLASSES, _TAPS, CHANNELS))
    rng = np.random.default_rng((seed, 1 + list(_OF_RANK).index(spec.family)))
    if spec.unit == "rank":
        bank = _OF_RANK[spec.family](rng, round(spec.dial))
    else:
        angle = math.radians(spec.dial)
        separable = _normalized(_OF_RANK[spec.family](rng, 1))
        bank = math.sin(angle) * _normalized(free)
        if spec.dial < FREE:
            bank = bank + math.cos(angle) * separable
    return _normalized(bank).reshape(CLASSES, SIDE, SIDE, CHANNELS)


def _within(rng: np.random.Generator, rank: int) -> np.ndarray:
    """Returns templates [k, taps, c] that each have `rank` equal singular values as a matrix of taps and channels."""
    return np.stack([_orthonormal(rng, _TAPS, rank) @ _orthonormal(rng, CHANNELS, rank).T for _ in range(CLASSES)])


def _across(rng: np.random.Generator, rank: int) -> np.ndarray:
    """Returns templates [k, taps, c] with `rank` spatial patterns in each channel, which all classes share.

    The weights of the classes are Gaussian: orthonormal ones would give all templates of rank one the same energy in
    each channel.
    """
    patterns = np.stack([_orthonormal(rng, _TAPS, rank) for _ in range(CHANNELS)])  # [c, taps, rank]
    weights = rng.normal(size=(CHANNELS, CLASSES, rank))
    if rank > 1:
        weights = np.linalg.qr(weights)[0]  # equal singular values
    return np.einsum("ctr,ckr->ktc", patterns, weights)


_OF_RANK: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {"within": _within, "across": _across}


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


def _normalized(bank: np.ndarray) -> np.ndarray:
    return bank / np.sqrt(np.square(bank).sum((1, 2), keepdims=True))


@dataclasses.dataclass(frozen=True)
class Dial:
    """The measured dial of a bank or of filters: 0 is separable; the more, the less so.

    Attributes:
      within: 1 - share of the squared norm in the best single pattern of each filter.
      across: 1 - share of the squared norm in the best single pattern of each channel.
      rank_within: patterns of a filter that hold all but 1e-6 of its squared norm, at most.
      rank_across: patterns of a channel that hold all but 1e-6 of its squared norm, at most.
    """

    within: float
    across: float
    rank_within: int
    rank_across: int


def measure(bank: Bank) -> Dial:
    """Measures the separability of a bank within and across its filters."""
    kernel = np.asarray(bank, np.float64).transpose(1, 2, 3, 0)
    return Dial(dial(kernel, "within"), dial(kernel, "across"), rank(kernel, "within"), rank(kernel, "across"))
