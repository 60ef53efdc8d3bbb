"""Measures the separability of one regular kernel [kh, kw, c, f], and of random kernels as the null hypothesis.

The two ways of being separable and the dial are those of `study.separability`. Two more measures are of the literature:

- BSConv (Haase and Amthor 2020, arXiv 2003.13549) measures the share of a filter's squared norm in its best spatial
  pattern (blueprint). Here no mean is subtracted, so that one minus this share is the squared relative error of the
  replacement.
- With r spatial kernels per channel, a kernel is a sum of r depthwise separable convolutions, which is exact if r is
  the number of taps: one of the two decompositions of Network Decoupling (Guo et al. 2018, arXiv 1808.05517).

Random kernels also have a first component, so they are the null hypothesis.
One null has the shape of the kernel only. The other one also has its energies (squared norms) for each tap, each
channel and each filter: a kernel whose centre is strong, or whose filters are mostly dead, is nearer to rank one
without being separable.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from xception_jax.models.layers import glorot_uniform
from xception_jax.study.separability import (
    FAMILIES,
    Kernel,
    Matrices,
    across_filters,
    blocks,
    component_energies,
    within_filters,
)

_DRAWS = 20  # random kernels of each null
_EXACT, _MOST_ROUNDS = 1e-10, 500  # of fitting the energies


@dataclasses.dataclass(frozen=True)
class Spread:
    """A measure over random kernels: its mean, and the ends of its central 95 % range."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Float[np.ndarray, " n"]) -> Spread:
        """Returns the spread of some values."""
        low, high = np.quantile(values, (0.025, 0.975))
        return cls(float(values.mean()), float(low), float(high))


def first_component(kernel: Kernel) -> Float[np.ndarray, " f"]:
    """Returns the share of each filter's squared norm in its best blueprint, in [1/taps, 1]; NaN for a zero filter."""
    energy = component_energies(within_filters(kernel))
    total = energy.sum(1)
    return np.divide(energy[:, 0], total, out=np.full(len(energy), np.nan), where=total > 0)


def rank_errors(kernel: Kernel) -> Float[np.ndarray, " taps"]:
    """Returns the relative error of the best sum of 1, 2, ... separable convolutions, up to the number of taps."""
    taps = kernel.shape[0] * kernel.shape[1]
    values = component_energies(across_filters(kernel)).sum(0)
    energy = np.zeros(taps)
    energy[: len(values)] = values
    left = np.append(energy[::-1].cumsum()[::-1][1:], 0.0)
    return np.sqrt(left / energy.sum()) if energy.sum() > 0 else np.full(taps, np.nan)


@functools.cache
def random_kernels(shape: tuple[int, ...]) -> tuple[Spread, tuple[float, ...]]:
    """Returns (first component, mean rank errors) of random kernels of a shape, drawn by the initializer."""
    keys = jax.random.split(jax.random.key(0), _DRAWS)
    kernels = [np.asarray(glorot_uniform(key, shape, jnp.float32), np.float64) for key in keys]
    firsts = np.array([first_component(kernel).mean() for kernel in kernels])
    return Spread.of(firsts), tuple(np.mean([rank_errors(kernel) for kernel in kernels], axis=0).tolist())


def random_dials(kernel: Kernel) -> dict[str, Spread]:
    """Returns the dials of random kernels that have the energies of this one, within and across filters."""
    rng = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for _ in range(_DRAWS):
        other = draw_alike(rng, kernel)
        for family, matrices in FAMILIES.items():
            drawn[family].append(max(0.0, 1 - _first_share(matrices(other))))
    return {family: Spread.of(np.array(values)) for family, values in drawn.items()}


def _first_share(matrices: Matrices) -> float:
    """Returns the share of the squared norm of all matrices in their best rank-one parts.

    It is computed from products of each matrix with itself: much faster than singular values, and exact enough for
    matrices that are far from rank one.
    """
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.transpose(0, 2, 1)
    first = sum(float(np.linalg.eigvalsh(part @ part.transpose(0, 2, 1))[:, -1].sum()) for part in blocks(matrices))
    return first / float(np.square(matrices).sum())


def draw_alike(rng: np.random.Generator, kernel: Kernel) -> Kernel:
    """Draws a random kernel that has the energies of another one: for each tap, each channel and each filter.

    Independent Gaussian numbers are multiplied by a factor for each tap, one for each channel and one for each filter.
    The factors are fitted in turn until all energies agree (iterative proportional fitting of the squares).
    """
    kh, kw, c, f = kernel.shape
    wanted = energies(kernel)
    noise = rng.normal(size=(kh * kw, c, f))
    squares = np.square(noise)
    factors = [np.ones(len(each)) for each in wanted]
    for _ in range(_MOST_ROUNDS):
        off = 0.0
        for axis, target in enumerate(wanted):
            sums = factors[axis] * _weighted(squares, factors, axis)
            off = max(off, float(np.abs(sums - target).max()))
            factors[axis] *= np.divide(target, sums, out=np.zeros_like(sums), where=sums > 0)
        if off <= _EXACT * wanted[0].sum():
            break
    a, b, d = map(np.sqrt, factors)
    return (noise * a[:, None, None] * b[:, None] * d).reshape(kernel.shape)


def energies(kernel: Kernel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the energies of a kernel: of its taps, its channels and its filters."""
    squares = np.square(kernel).reshape(-1, *kernel.shape[2:])
    return squares.sum((1, 2)), squares.sum((0, 2)), squares.sum((0, 1))


def _weighted(squares: Float[np.ndarray, "t c f"], factors: list[np.ndarray], axis: int) -> np.ndarray:
    """Returns the sums of squares along one axis, weighted with the factors of both other axes."""
    if axis == 2:
        return factors[1] @ np.tensordot(factors[0], squares, 1)
    by_tap = squares @ factors[2]  # [t, c]
    return by_tap @ factors[1] if axis == 0 else factors[0] @ by_tap
