"""Compares every lowering of `ops.conv` with XLA's own convolution, in float64: values and both gradients."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.ops.reference import conv_with_gradients
from xception_jax import ops
from xception_jax.ops import lowerings
from xception_jax.ops.padding import explicit_padding

KERNELS = ((1, 1), (3, 3), (5, 5), (1, 7), (7, 1))
STRIDES = (1, 2, 3)
PADDINGS = ("SAME", "VALID", "SYMMETRIC")
# Rows and columns: each pair has an odd and an even side, and both parities of a remainder modulo 3.
SIZES = ((9, 10), (10, 9), (12, 11))
CHANNELS = 8
# (segments, filters): regular, in between, depthwise, depthwise with multiplier 2, in between with multiplier 2.
SEGMENTS = ((1, 6), (2, 6), (4, 8), (8, 8), (8, 16), (4, 16))


def covering_cases():
    """Yields cases with all pairs of (segments, kernel), (segments, stride), (kernel, padding) and so on."""
    for s, k in itertools.product(range(len(SEGMENTS)), range(len(KERNELS))):
        stride, padding, size = (s + k) % 3, (s // 2 + 2 * k) % 3, (s + k // 2) % 3
        yield *SEGMENTS[s], KERNELS[k], STRIDES[stride], PADDINGS[padding], SIZES[size]


def reference_conv(x, kernel, *, segments, stride, padding):
    """Calls XLA's convolution, with SAME and VALID by name, so that this also tests our padding."""
    if padding == "SYMMETRIC":
        padding = [(k // 2, k // 2) for k in kernel.shape[:2]]
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=segments,
    )


def value_and_gradients(f, *args):
    """Returns f(*args) and the gradients of a random projection of it."""
    y, vjp = jax.vjp(f, *args)
    return y, *vjp(jnp.asarray(cotangent(y.shape), y.dtype))


def cotangent(shape):
    return np.random.default_rng(2).normal(size=shape)


@pytest.fixture
def lowered_for(monkeypatch):
    """Returns a function that makes `platform_dependent` take one branch on any machine."""

    def choose(branch):
        monkeypatch.setattr(
            lax, "platform_dependent", lambda *args, default, **others: others.get(branch, default)(*args)
        )

    return choose


def draw(shape, seed, dtype="float64"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_equals_xla(x, weights, **arguments):
    @jax.jit
    def both(x, weights):
        ours = value_and_gradients(lambda x, k: ops.conv(x, k, **arguments), x, weights)
        return ours, value_and_gradients(lambda x, k: reference_conv(x, k, **arguments), x, weights)

    ours, reference = both(x, weights)
    oracle = conv_with_gradients(x, weights, cotangent, **arguments)
    for name, a, b, c in zip(("value", "input gradient", "filter gradient"), ours, reference, oracle, strict=True):
        assert a.dtype == x.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(c, b, rtol=0, atol=1e-12, err_msg=f"{name} of the oracle in NumPy")


CASES = [(branch, *case) for branch in ("cpu", "default", "cuda") for case in covering_cases()]
# Between regular and depthwise the first two branches are the same; elsewhere the last two, except for 1 x 1 kernels.
CASES = [
    (branch, *case)
    for branch, *case in CASES
    if branch == "cpu"
    or (branch == "default" and case[0] in (1, CHANNELS))
    or (branch == "cuda" and (1 < case[0] < CHANNELS or case[2] == (1, 1)))
]


@pytest.mark.parametrize(("branch", "segments", "filters", "kernel", "stride", "padding", "size"), CASES)
def test_conv_equals_xla(lowered_for, branch, segments, filters, kernel, stride, padding, size):
    lowered_for(branch)
    with jax.enable_x64(True):
        x = draw((2, *size, CHANNELS), 0)
        weights = draw((*kernel, CHANNELS // segments, filters), 1)
        assert_equals_xla(x, weights, segments=segments, stride=stride, padding=padding)


@pytest.mark.parametrize("branch", ["cpu", "default"])
@pytest.mark.parametrize(
    ("channels", "filters", "side", "stride", "padding"),
    [
        (3, 4, 11, 2, "VALID"),  # The stem, by patches on a CPU.
        (64, 2, 6, 1, "SAME"),  # Too many channels for patches.
        (1, 4, 6, 1, "SAME"),  # One channel: neither regular nor depthwise, or both.
    ],
)
def test_regular_conv_by_channels(lowered_for, branch, channels, filters, side, stride, padding):
    lowered_for(branch)
    with jax.enable_x64(True):
        x, weights = draw((2, side, side, channels), 0), draw((3, 3, channels, filters), 1)
        assert_equals_xla(x, weights, segments=1, stride=stride, padding=padding)


def test_patches_end_where_the_kernel_has_many_channels():
    def count(channels):
        # In float32 `cpu_kernels` may compute both.
        x, kernel = jnp.ones((1, 5, 5, channels), jnp.bfloat16), jnp.ones((3, 3, channels, 2), jnp.bfloat16)
        return jax.jit(ops.conv).trace(x, kernel).lower(lowering_platforms=("cpu",)).as_text().count(CONVOLUTION)

    assert count(3) == 0
    assert count(64) == 1


CONVOLUTION = "stablehlo.convolution"
LOWERED = {
    # kind: (kernel, segments, stride, convolutions on a CPU, a TPU, a GPU), forward and backward, over 8 channels.
    "pointwise": ((1, 1), 1, 1, 0, 0, 0),
    "shortcut": ((1, 1), 1, 2, 0, 0, 3),
    "stem": ((3, 3), 1, 2, 0, 3, 3),
    "in between": ((3, 3), 4, 1, 0, 0, 3),
    "depthwise": ((3, 3), 8, 1, 0, 3, 3),
}


@pytest.mark.parametrize("kind", LOWERED)
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_each_platform_gets_its_lowering(kind, platform):
    """`plan` and `export` lower for other platforms than that of the process."""
    kernel, segments, stride, *convolutions = LOWERED[kind]

    def step(x, kernel):
        return value_and_gradients(partial(ops.conv, segments=segments, stride=stride), x, kernel)

    arguments = jnp.ones((2, 6, 6, 8)), jnp.ones((*kernel, 8 // segments, 8))
    lowered = jax.jit(step).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    expected = dict(zip(("cpu", "tpu", "cuda"), convolutions, strict=True))[platform]
    assert lowered.count(CONVOLUTION) == expected
    if segments > 1:
        assert (f"feature_group_count = {segments}" in lowered) == (expected > 0)


@pytest.mark.parametrize("segments", [2, 4])
def test_segments_in_bfloat16_are_summed_over_taps_in_float32(segments):
    """As a convolution of XLA does: y and the gradient for x are rounded once, not once for each tap."""
    x, kernel = draw((2, 19, 19, 16), 0, "float32"), draw((3, 3, 16 // segments, 16), 1, "float32")
    dy = draw((2, 19, 19, 16), 2, "float32")
    x, kernel, dy = (a.astype(jnp.bfloat16) for a in (x + 1, kernel, dy))

    def errors(convolve):
        found = []
        for dtype in ("bfloat16", "float32"):
            y, gradient = jax.vjp(lambda x: convolve(x, kernel.astype(dtype)), x.astype(dtype))  # noqa: B023
            found.append([np.asarray(a, np.float64) for a in (y, gradient(dy.astype(dtype))[0])])
        return [np.square(a - b).mean() / np.square(b).mean() for a, b in zip(*found, strict=True)]

    pads = ((1, 1), (1, 1))
    ours = errors(lambda x, kernel: lowerings.on_tpu(x, kernel, segments, 1, pads))
    native = errors(lambda x, kernel: lowerings.native(x, kernel, segments, 1, pads))
    assert ours[0] <= 1.05 * native[0]
    assert ours[1] <= 2.5 * native[1]  # the products of the taps are rounded


def test_depthwise_filter_gradient_in_bfloat16_is_summed_in_float32():
    """The sum runs over all rows of the image: in bfloat16 late terms would be lost."""
    x, dy = draw((2, 128, 8, 4), 0, "float32"), draw((2, 128, 8, 4), 1, "float32")
    kernel = draw((3, 3, 1, 4), 2, "float32")

    def gradient(dtype):
        x_, dy_, kernel_ = (a.astype(jnp.bfloat16).astype(dtype) for a in (x + 1, dy + 1, kernel))
        return jax.jit(lambda k: jax.vjp(lambda k: ops.conv(x_, k, segments=4), k)[1](dy_)[0])(kernel_)

    exact, rounded = np.asarray(gradient("float32")), np.asarray(gradient("bfloat16"), np.float32)
    # One rounding at the end: half a unit in the last place of eight bits.
    assert np.abs(rounded / exact - 1).max() <= 2**-8


@pytest.mark.parametrize(
    ("kernel", "segments"), [((3, 3, 8, 8), 3), ((3, 3, 2, 6), 4), ((3, 3, 8, 8), 2), ((3, 3, 1, 8), 4)]
)
def test_a_kernel_that_does_not_fit_is_refused(kernel, segments):
    with pytest.raises(ValueError, match=f"{segments} segments"):
        ops.conv(jnp.ones((1, 4, 4, 8)), jnp.ones(kernel), segments=segments)


def test_an_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="'REFLECT'"):
        explicit_padding("REFLECT", (4, 4), (3, 3), 1)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 0, 8, 8), (3, 3, 0, 8)])
def test_an_empty_kernel_is_refused(shape):
    with pytest.raises(ValueError, match="none may be below 1"):
        ops.conv(jnp.ones((1, 4, 4, shape[2])), jnp.ones(shape))


@pytest.mark.parametrize("padding", ["VALID", "SYMMETRIC"])
@pytest.mark.parametrize("op", [ops.conv, ops.max_pool, ops.avg_pool])
def test_an_image_below_the_window_is_refused(op, padding):
    options = {"kernel": jnp.ones((7, 7, 8, 8))} if op is ops.conv else {"window": 7}
    op(jnp.ones((1, 7 if padding == "VALID" else 1, 9, 8)), **options, padding=padding)
    with pytest.raises(ValueError, match="does not fit into an image"):
        op(jnp.ones((1, 6 if padding == "VALID" else 0, 9, 8)), **options, padding=padding)


KINDS = {
    "regular": (1, (3, 3, 8, 8)),
    "segments": (2, (3, 3, 4, 8)),
    "depthwise": (8, (3, 3, 1, 8)),
    "1x1": (1, (1, 1, 8, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients_equal_those_of_xla(kind):
    """As in a gradient penalty, or in a product with the Hessian."""
    segments, shape = KINDS[kind]
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, 6, 8), shape))

    def penalty(conv):
        def loss(x, kernel):
            return jnp.tanh(conv(x, kernel, segments=segments, stride=1, padding="SAME")).sum()

        return lambda x, kernel: sum(jnp.square(g).sum() for g in jax.grad(loss, (0, 1))(x, kernel))

    ours, theirs = (jax.jit(jax.grad(penalty(conv), (0, 1)))(x, kernel) for conv in (ops.conv, reference_conv))
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_shard_map_sums_the_gradient_of_a_replicated_kernel(kind):
    segments, shape = KINDS[kind]
    x, kernel = jnp.ones((2, 5, 6, 8)), jnp.ones(shape)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    step = jax.value_and_grad(lambda x, kernel: jnp.tanh(ops.conv(x, kernel, segments=segments)).sum(), (0, 1))

    def on_each_device(x, kernel):
        value, gradients = step(x, kernel)
        return lax.psum(value, "data"), gradients

    specs = {"in_specs": (P("data"), P()), "out_specs": (P(), (P("data"), P()))}
    found = jax.jit(jax.shard_map(on_each_device, mesh=mesh, **specs))(x, kernel)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, step(x, kernel))
