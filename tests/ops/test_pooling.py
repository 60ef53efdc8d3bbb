"""Compares max and average pooling with `lax.reduce_window` and NumPy: values and gradients."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from xception_jax import ops

# (window, stride, padding, (rows, columns)): odd and even sides with each.
CASES = [
    (3, 2, "SAME", (9, 10)),
    (3, 2, "SAME", (10, 9)),
    (3, 2, "SYMMETRIC", (9, 10)),
    (3, 2, "SYMMETRIC", (10, 9)),
    (3, 2, "VALID", (9, 10)),
    (2, 2, "SAME", (9, 10)),
    (3, 1, "SAME", (7, 8)),
    (5, 3, "VALID", (12, 11)),
    (3, 3, "SAME", (10, 11)),
    (2, 3, "SAME", (10, 11)),
]


def reference_max_pool(x, window, stride, padding):
    pads = padding
    if padding == "SYMMETRIC":
        pads = ((0, 0), (window // 2, window // 2), (window // 2, window // 2), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), pads)


@pytest.mark.parametrize("branch", ["cpu", "cuda", "default"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("window", "stride", "padding", "size"), CASES)
def test_max_pool_equals_xla(monkeypatch, branch, ties, window, stride, padding, size):
    """With ties, which ReLU makes common, the first of the largest values gets the whole gradient."""
    monkeypatch.setattr(lax, "platform_dependent", lambda *x, default, **others: others.get(branch, default)(*x))
    rng = np.random.default_rng(0)
    values = rng.integers(-1, 2, (2, *size, 3)) if ties else rng.normal(size=(2, *size, 3))
    with jax.enable_x64(True):
        x = jnp.asarray(values, jnp.float64)

        @jax.jit
        def both(x):
            ours, our_vjp = jax.vjp(lambda x: ops.max_pool(x, window, stride, padding), x)
            theirs, their_vjp = jax.vjp(lambda x: reference_max_pool(x, window, stride, padding), x)
            dy = jnp.sin(jnp.arange(theirs.size, dtype=x.dtype)).reshape(theirs.shape)
            return (ours, *our_vjp(dy)), (theirs, *their_vjp(dy))

        for name, a, b in zip(("value", "gradient"), *both(x), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_gradient_of_max_pool_on_each_platform(platform):
    gradient = jax.jit(jax.grad(lambda x: ops.max_pool(x).sum()))
    lowered = gradient.trace(jnp.ones((1, 8, 8, 2))).lower(lowering_platforms=(platform,)).as_text()
    assert ("select_and_scatter" in lowered) == (platform == "tpu")


def test_symmetric_padding_differs_from_same_at_even_sides_only():
    rng = np.random.default_rng(0)
    for side, equal in ((37, True), (74, False)):
        x = rng.normal(size=(1, side, side, 1)).astype(np.float32)
        same, symmetric = (np.asarray(ops.max_pool(x, padding=p)) for p in ("SAME", "SYMMETRIC"))
        assert same.shape == symmetric.shape == (1, 37 if side == 74 else 19, 37 if side == 74 else 19, 1)
        assert np.array_equal(same, symmetric) == equal


def numpy_avg_pool(x, window, stride, padding, count_padding):
    """Loops over the windows; positions outside the image are counted or not."""
    batch, rows, columns, channels = x.shape
    places = []
    for side in (rows, columns):
        if padding == "VALID":
            starts = range(0, side - window + 1, stride)
        elif padding == "SYMMETRIC":
            starts = range(-(window // 2), side + 2 * (window // 2) - window // 2 - window + 1, stride)
        else:
            outputs = -(-side // stride)
            first = -(max((outputs - 1) * stride + window - side, 0) // 2)
            starts = range(first, first + outputs * stride, stride)
        places.append(list(starts))
    y = np.zeros((batch, len(places[0]), len(places[1]), channels))
    for i, top in enumerate(places[0]):
        for j, left in enumerate(places[1]):
            inside = x[:, max(top, 0) : max(top + window, 0), max(left, 0) : max(left + window, 0)]
            count = window**2 if count_padding else inside.shape[1] * inside.shape[2]
            y[:, i, j] = inside.sum((1, 2)) / count
    return y


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize(("window", "stride", "padding", "size"), [*CASES, (3, 1, "SYMMETRIC", (7, 8))])
def test_avg_pool_equals_numpy(window, stride, padding, size, count_padding):
    x = np.random.default_rng(0).normal(size=(2, *size, 3))
    expected = numpy_avg_pool(x, window, stride, padding, count_padding)
    with jax.enable_x64(True):
        pool = jax.jit(
            partial(ops.avg_pool, window=window, stride=stride, padding=padding, count_padding=count_padding)
        )
        np.testing.assert_allclose(pool(jnp.asarray(x)), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("window", "stride", "padding", "size"), [*CASES, (2, 1, "SAME", (5, 4))])
def test_gradient_of_avg_pool_is_its_transpose(window, stride, padding, size):
    """<dy, pool(v)> = <dx, v> for any v."""
    rng = np.random.default_rng(0)
    v = rng.normal(size=(2, *size, 3))
    expected = numpy_avg_pool(v, window, stride, padding, count_padding=False)
    dy = rng.normal(size=expected.shape)
    with jax.enable_x64(True):
        pool = partial(ops.avg_pool, window=window, stride=stride, padding=padding)
        (dx,) = jax.jit(lambda x, dy: jax.vjp(pool, x)[1](dy))(jnp.zeros_like(v), dy)
    np.testing.assert_allclose((np.asarray(dx) * v).sum(), (dy * expected).sum(), rtol=0, atol=1e-12)


def test_gradient_of_avg_pool():
    """Each pixel receives its share from every window that contains it."""
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(lambda x: ops.avg_pool(x).sum()))(jnp.ones((1, 3, 3, 1)))[0, :, :, 0]
    # Corner windows hold 4 pixels, edges 6, the centre 9.
    corner, edge, centre = 1 / 4 + 2 / 6 + 1 / 9, 2 / 4 + 3 / 6 + 1 / 9, 4 / 4 + 4 / 6 + 1 / 9
    expected = [[corner, edge, corner], [edge, centre, edge], [corner, edge, corner]]
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-15)


def test_gradients_of_gradients_of_max_pool_equal_those_of_xla():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 7, 8)), jnp.float32)

    def penalty(pool):
        loss = jax.grad(lambda x: jnp.square(pool(x, 3, 2, "SAME")).sum())
        return jax.jit(jax.grad(lambda x: jnp.square(loss(x)).sum()))

    np.testing.assert_allclose(penalty(ops.max_pool)(x), penalty(reference_max_pool)(x), rtol=1e-6)


def test_max_pool_in_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 7, 8)), jnp.float32)
    step = jax.grad(lambda x: jnp.square(ops.max_pool(x)).sum())
    found = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)
    np.testing.assert_allclose(found, step(x), rtol=1e-6)
