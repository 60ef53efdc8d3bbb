"""Max and average pooling."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from xception_jax.ops import cpu_kernels
from xception_jax.ops.padding import Padding, Pads, explicit_padding, from_phases, output_size, pad, strided


def max_pool(
    x: Float[Array, "b h w c"], window: int = 3, stride: int = 2, padding: Padding = "SAME"
) -> Float[Array, "b oh ow c"]:
    """Returns the largest value in each window; of equal ones the first gets the gradient, in reverse mode only."""
    return _max_pool(x, window, stride, explicit_padding(padding, x.shape[1:3], (window, window), stride))


def _reduce_window_max(x: Array, window: int, stride: int, pads: Pads) -> Array:
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), ((0, 0), *pads, (0, 0))
    )


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: Array, window: int, stride: int, pads: Pads) -> Array:
    reduce_window = partial(_reduce_window_max, window=window, stride=stride, pads=pads)

    def on_cpu(x: Array) -> Array:
        if cpu_kernels.available(x):
            return cpu_kernels.max_pool(x, window, stride, pads)
        return reduce_window(x)

    return lax.platform_dependent(x, cpu=on_cpu, default=reduce_window)


def _max_pool_forward(x: Array, window: int, stride: int, pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    y = _max_pool(x, window, stride, pads)
    return y, (x, y)


def _max_pool_backward(window: int, stride: int, pads: Pads, residuals: tuple[Array, Array], dy: Array) -> tuple[Array]:
    return (_max_pool_gradient(*residuals, dy, window, stride, pads),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _max_pool_gradient(x: Array, y: Array, dy: Array, window: int, stride: int, pads: Pads) -> Array:
    def select_and_scatter(x: Array, y: Array, dy: Array) -> Array:
        return jax.vjp(lambda x: _reduce_window_max(x, window, stride, pads), x)[1](dy)[0]

    first_hit = partial(_first_hit_gradient, window=window, stride=stride, pads=pads)

    # XLA's CPU backend runs select-and-scatter one element at a time. On a GPU it takes four times as long, and its
    # additions have no fixed order.
    def on_cpu(x: Array, y: Array, dy: Array) -> Array:
        if cpu_kernels.available(x, dy):
            return cpu_kernels.max_pool_gradient(x, y, dy, window, stride, pads)
        return first_hit(x, y, dy)

    return lax.platform_dependent(x, y, dy, cpu=on_cpu, cuda=first_hit, rocm=first_hit, default=select_and_scatter)


def _max_pool_gradient_forward(
    x: Array, y: Array, dy: Array, window: int, stride: int, pads: Pads
) -> tuple[Array, tuple[Array, Array, Array]]:
    return _max_pool_gradient(x, y, dy, window, stride, pads), (x, y, dy)


def _max_pool_gradient_backward(
    window: int, stride: int, pads: Pads, residuals: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, Array]:
    # The gradient is linear in dy. Which value is the largest does not depend on it.
    x, y, dy = residuals
    gradient = partial(_first_hit_gradient, x, y, window=window, stride=stride, pads=pads)
    return jnp.zeros_like(x), jnp.zeros_like(y), jax.vjp(gradient, dy)[1](cotangent)[0]


_max_pool_gradient.defvjp(_max_pool_gradient_forward, _max_pool_gradient_backward)


def _first_hit_gradient(x: Array, y: Array, dy: Array, window: int, stride: int, pads: Pads) -> Array:
    """Gives dy to the first tap of each window that equals the maximum.

    Each of the stride x stride phases of dx is a sum of shifted copies of dy, masked by that tap; `from_phases`
    interleaves them.
    """
    batch, rows, columns, channels = y.shape
    padded = pad(x, pads, -jnp.inf)
    taps = [(i, j) for i in range(window) for j in range(window)]
    number = np.min_scalar_type(len(taps))
    first = jnp.full(y.shape, len(taps), number)
    for i, j in reversed(taps):
        hit = strided(padded, i, j, rows, columns, stride) == y
        first = jnp.where(hit, jnp.asarray(i * window + j, number), first)
    first = lax.optimization_barrier(first)  # so that XLA does not compute it again for each tap

    zero = jnp.zeros((), dy.dtype)
    down, across = (-(-size // stride) for size in padded.shape[1:3])

    def phase(top: int, left: int) -> Array:
        dx = jnp.zeros((batch, down, across, channels), dy.dtype)
        for i in range(top, window, stride):
            for j in range(left, window, stride):
                above, before = i // stride, j // stride
                places = ((above, down - rows - above), (before, across - columns - before))
                dx += pad(jnp.where(first == i * window + j, dy, zero), places)
        return dx

    return from_phases(phase, x.shape, stride, pads[0][0], pads[1][0])


def avg_pool(
    x: Float[Array, "b h w c"],
    window: int = 3,
    stride: int = 1,
    padding: Padding = "SAME",
    *,
    count_padding: bool = False,
) -> Float[Array, "b oh ow c"]:
    """Returns the mean of each window; padded positions count as zeros only with `count_padding` (PyTorch)."""
    pads = explicit_padding(padding, x.shape[1:3], (window, window), stride)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # a sum in bfloat16 is rounded at every term
    counts: Array | int = window**2
    if not count_padding:
        counts = _reduce_window_sum(jnp.ones((1, *x.shape[1:3], 1), wide.dtype), window, stride, pads)
    return (_window_sum(wide, window, stride, pads) / counts).astype(x.dtype)


def _reduce_window_sum(x: Array, window: int, stride: int, pads: Pads) -> Array:
    return lax.reduce_window(x, 0.0, lax.add, (1, window, window, 1), (1, stride, stride, 1), ((0, 0), *pads, (0, 0)))


def _window_sum(x: Array, window: int, stride: int, pads: Pads) -> Array:
    reduce_window = partial(_reduce_window_sum, window=window, stride=stride, pads=pads)
    # XLA's CPU backend computes reduce_window one element at a time.
    on_cpu = partial(_shifted_sum, window=window, pads=pads) if stride == 1 else reduce_window
    return lax.platform_dependent(x, cpu=on_cpu, default=reduce_window)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _shifted_sum(x: Array, window: int, pads: Pads) -> Array:
    """Sums the shifted input over the taps of a window."""
    rows, columns = output_size(x.shape[1:3], (window, window), 1, pads)
    padded = lax.optimization_barrier(pad(x, pads))
    y = jnp.zeros((), x.dtype)
    for i in range(window):
        for j in range(window):
            y = y + strided(padded, i, j, rows, columns, 1)
    return y


def _shifted_sum_forward(x: Array, window: int, pads: Pads) -> tuple[Array, None]:
    return _shifted_sum(x, window, pads), None


def _shifted_sum_backward(window: int, pads: Pads, _: None, dy: Array) -> tuple[Array]:
    (top, bottom), (left, right) = pads
    last = window - 1
    return (_shifted_sum(dy, window, ((last - top, last - bottom), (last - left, last - right))),)


_shifted_sum.defvjp(_shifted_sum_forward, _shifted_sum_backward)
