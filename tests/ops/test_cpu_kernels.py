"""Compares the C++ kernels in float32 with NumPy and XLA in float64: values and gradients, through `ops`."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.reference import conv_with_gradients
from tests.ops.test_conv import cotangent, covering_cases, draw, value_and_gradients
from tests.ops.test_pooling import CASES as POOLS
from tests.ops.test_pooling import reference_max_pool
from xception_jax import ops
from xception_jax.environment import ALLOCATOR, TUNABLES, lacks_allocator
from xception_jax.ops import cpu_kernels
from xception_jax.ops.cpu_kernels import build

# Not `cpu_kernels.available`: kernels that do not compile shall fail here.
pytestmark = pytest.mark.skipif(
    not build.compiler()
    or os.environ.get("XCEPTION_JAX_CPU_KERNELS") == "0"
    or (jax.default_backend(), jax.device_count()) != ("cpu", 1),
    reason="needs a C++ compiler and a CPU as the only device",
)


def test_the_kernels_can_be_built():
    assert all(build.library(source) for source in build.HANDLERS)


def custom_calls(f, *args) -> int:
    return jax.jit(f).lower(*args).as_text().count("stablehlo.custom_call @")


def assert_equals_numpy(x_shape, kernel_shape, calls=3, kind="", **arguments):
    f = partial(ops.conv, **arguments)
    x, kernel = draw(x_shape, 0, "float32"), draw(kernel_shape, 1, "float32")
    lowered = jax.jit(partial(value_and_gradients, f)).lower(x, kernel)
    assert lowered.as_text().count("stablehlo.custom_call @" + kind) == calls
    got = lowered.compile()(x, kernel)
    expected = conv_with_gradients(x, kernel, cotangent, **arguments)
    for name, a, b in zip(("value", "input gradient", "filter gradient"), got, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize(("segments", "filters", "kernel", "stride", "padding", "size"), list(covering_cases()))
def test_conv_equals_numpy(segments, filters, kernel, stride, padding, size):
    calls = 2 + min(stride, kernel[0]) * min(stride, kernel[1])  # the input gradient is computed phase by phase
    if segments == filters and (stride > 1 or kernel not in ((3, 3), (5, 5))):
        calls = 0  # a depthwise convolution that the kernels do not support
    shapes = (2, *size, 8), (*kernel, 8 // segments, filters)
    assert_equals_numpy(*shapes, calls, segments=segments, stride=stride, padding=padding)


@pytest.fixture(params=["fma", "amx"])
def product(request, monkeypatch):
    """Which matrix products the kernels use; AMX only for matrices that are large enough."""
    if request.param == "amx" and not (cpu_kernels._amx_permitted() and "amx_bf16" in build.processor()):
        pytest.skip("needs a processor with AMX")
    monkeypatch.setenv("XCEPTION_JAX_CPU_KERNELS", "fma" if request.param == "fma" else "1")
    jax.clear_caches()  # of programs that were traced with the other ones
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize(
    ("x", "kernel", "segments"),
    [
        ((2, 31, 29, 3), (3, 3, 3, 32), 1),  # the stem: few channels at many taps, sums in parts
        ((1, 10, 10, 800), (1, 1, 800, 40), 1),  # several blocks of the depth
        ((1, 5, 5, 150), (3, 3, 150, 17), 1),  # the same, cut within a tap
        ((3, 7, 9, 60), (3, 3, 20, 57), 3),  # several panels, the last one cut, in each segment
        ((2, 30, 29, 70), (3, 3, 70, 40), 1),  # a filter gradient in several blocks and parts
        ((1, 1, 1, 5), (1, 1, 5, 1), 1),
        # From 64 channels on, products may use AMX.
        ((2, 13, 11, 64), (1, 1, 64, 64), 1),  # whole registers; several blocks of pixels
        # Three blocks of the depth, which are not multiples of a step; half a panel.
        ((1, 10, 10, 1601), (1, 1, 1601, 75), 1),
        ((1, 5, 5, 150), (3, 3, 150, 81), 1),  # cut within a tap; one pixel more than whole registers have rows
        ((2, 7, 9, 140), (3, 3, 70, 194), 2),  # segments
        ((2, 30, 29, 100), (3, 3, 100, 66), 1),  # a filter gradient in several blocks and parts
        ((1, 1, 1, 65), (1, 1, 65, 64), 1),
        # Many small images, most of whose taps lie in the padding: they are interleaved.
        ((70, 4, 3, 24), (3, 3, 12, 42), 2),  # in two groups, whose last tiles are cut
        ((33, 1, 2, 96), (3, 3, 48, 100), 2),
        ((67, 5, 4, 100), (5, 5, 100, 66), 1),
        ((16, 1, 1, 91), (3, 3, 91, 17), 1),
        # A result that is written with non-temporal stores, unless the last-level cache is larger than 32 MB.
        ((1, 300, 232, 1), (3, 3, 1, 64), 1),
    ],
)
def test_conv_of_odd_sizes_equals_numpy(product, x, kernel, segments):
    assert_equals_numpy(x, kernel, segments=segments, stride=1, padding="SAME")


def test_each_call_says_which_product_it_uses(product):
    text = jax.jit(ops.conv).lower(jnp.ones((1, 2, 2, 64)), jnp.ones((1, 1, 64, 64))).as_text()
    assert f"use_amx = {str(product == 'amx').lower()}" in text


@pytest.mark.parametrize("draw", ["normal", "positive", "wide"])
def test_products_are_as_exact_as_float32(product, draw):
    """Compares with float64: three parts and six products are as exact as products of float32.

    Relative errors of XLA's product are 2e-7 to 4e-7, depending on its version; without one of the six products, 3e-6.
    """
    rng = np.random.default_rng(0)
    values = {
        "normal": lambda shape: rng.normal(size=shape),
        "positive": lambda shape: rng.uniform(size=shape),
        "wide": lambda shape: rng.normal(size=shape) * np.exp(3 * rng.normal(size=shape)),
    }[draw]
    x, kernel = values((300, 728)).astype(np.float32), values((728, 160)).astype(np.float32)
    exact = x.astype(np.float64) @ kernel.astype(np.float64)

    def error(y) -> float:
        return np.linalg.norm(np.asarray(y, np.float64).reshape(exact.shape) - exact) / np.linalg.norm(exact)

    assert 0 < error(jax.jit(ops.conv)(x[None, None], kernel[None, None])) < 6e-7
    _, gradient = jax.vjp(lambda kernel: ops.conv(x.T[None, None], kernel), jnp.zeros((1, 1, 300, 160)))
    assert 0 < error(gradient(jnp.asarray(kernel)[None, None])[0]) < 6e-7


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001])
def test_nan_stays_nan_in_products(product, bits):
    nan = np.array([bits], np.uint32).view(np.float32)[0]
    x, kernel = np.ones((1, 2, 2, 64), np.float32), np.ones((1, 1, 64, 64), np.float32)
    x[0, 0, 1, 5] = nan
    np.testing.assert_array_equal(np.isnan(ops.conv(x, kernel)[0, :, :, 3]), [[False, True], [False, False]])
    kernel[0, 0, 40, 7] = nan
    assert np.isnan(ops.conv(jnp.ones_like(x), kernel)).sum() == 4


# Channels below, at and above whole vectors; widths below and above whole tiles; more rows than a part has.
@pytest.mark.parametrize("side", [3, 5, 7])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "SYMMETRIC"])
@pytest.mark.parametrize("shape", [(2, 9, 10, 3), (1, 7, 24, 16), (3, 13, 8, 37), (2, 70, 11, 8), (1, 7, 7, 64)])
def test_depthwise_equals_numpy(shape, padding, side):
    assert_equals_numpy(shape, (side, side, 1, shape[-1]), segments=shape[-1], stride=1, padding=padding)


def test_a_large_depthwise_result_equals_numpy():
    assert_equals_numpy((1, 300, 232, 64), (3, 3, 1, 64), segments=64, stride=1, padding="SAME")


# Whole vectors, and vectors that whole segments do not fill; widths below, at and above whole tiles; many rows.
@pytest.mark.parametrize(
    ("per_segment", "channels", "filters"),
    [
        *((2, 16, 16), (4, 48, 48), (8, 80, 80), (8, 8, 8), (2, 38, 38), (3, 9, 9), (6, 54, 54), (7, 21, 21)),
        # More filters than channels, and fewer.
        *((1, 19, 38), (1, 9, 36), (1, 5, 40), (2, 14, 42), (3, 24, 64), (4, 36, 9), (8, 32, 12)),
    ],
)
@pytest.mark.parametrize("padding", ["SAME", "VALID", "SYMMETRIC"])
@pytest.mark.parametrize("size", [(2, 9, 10), (1, 3, 3), (2, 70, 13)])
def test_small_segments_equal_numpy(size, padding, per_segment, channels, filters):
    shape, kernel, segments = (*size, channels), (3, 3, per_segment, filters), channels // per_segment
    assert_equals_numpy(shape, kernel, kind="depthwise", segments=segments, stride=1, padding=padding)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("window", "stride", "padding", "size"), POOLS)
def test_max_pool_equals_xla(window, stride, padding, size, ties):
    rng = np.random.default_rng(0)
    values = rng.integers(-1, 2, (2, *size, 19)) if ties else rng.normal(size=(2, *size, 19))
    x = jnp.asarray(values, jnp.float32)
    ours = partial(ops.max_pool, window=window, stride=stride, padding=padding)
    assert custom_calls(partial(value_and_gradients, ours), x) == 2
    theirs = partial(reference_max_pool, window=window, stride=stride, padding=padding)
    for a, b in zip(value_and_gradients(ours, x), value_and_gradients(theirs, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_nan_stays_nan():
    x = jnp.zeros((1, 8, 8, 9)).at[0, 3, 3, 4].set(jnp.nan)
    assert bool(jnp.isnan(ops.max_pool(x)[0, :, :, 4]).any())
    assert bool(jnp.isnan(ops.conv(x, jnp.ones((3, 3, 1, 9)), segments=9)[0, :, :, 4]).any())


@pytest.fixture
def run_tests_with(run_python, tmp_path):
    """Returns a function that runs tests of this file and of the fused layers, with kernels from another compiler.

    `options` are added to what the kernels are compiled with, `environment` to that of the tests.
    """

    def run(compiler: str, options: Sequence[str], tests: str, environment: dict[str, str] | None = None):
        script = tmp_path / "c++"
        script.write_text(f'#!/bin/sh\nexec {compiler} "$@" {shlex.join(options)}\n')
        script.chmod(0o755)
        environment = {"CXX": str(script), "XDG_CACHE_HOME": str(tmp_path)} | (environment or {})
        files = ("tests/ops/test_cpu_kernels.py", "tests/export/test_export.py")
        process = run_python(
            "-m", "pytest", "--numprocesses=0", "--capture=no", "-k", tests, *files, environment=environment
        )
        assert process.returncode == 0, process.stdout + process.stderr

    return run


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("source", build.HANDLERS)
def test_the_kernels_have_no_warnings(compiler, source, monkeypatch, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    monkeypatch.setenv("CXX", compiler)
    command = [
        *build.compile_command(source, tmp_path / "unused.so"),
        *WARNINGS,
        "-fsyntax-only",
        "-Wno-unused-command-line-argument",
    ]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


# Of each kind of kernel the cases that reach all of its code; the last is of the fused layers.
REPRESENTATIVE = "odd_sizes or large or (SAME and (depthwise or small_segments and size0)) or lets_nan_through"
WARNINGS = ("-Wall", "-Wextra", "-Werror")


@pytest.mark.kernels
@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++")
def test_the_kernels_of_clang_equal_xla(run_tests_with):
    run_tests_with("clang++", WARNINGS, f"can_be_built or {REPRESENTATIVE}")


@pytest.mark.kernels
@pytest.mark.skipif(not shutil.which("g++") or " avx2 " not in build.processor(), reason="needs g++ and AVX2")
def test_the_kernels_for_avx2_equal_xla(run_tests_with):
    """Vectors of 8 lanes, which no machine with AVX-512 would compile."""
    run_tests_with("g++", ["-march=x86-64-v3", *WARNINGS], f"can_be_built or ({REPRESENTATIVE}) and not amx")


@pytest.mark.kernels
@pytest.mark.skipif(not shutil.which("g++"), reason="needs the address sanitizer of g++")
def test_nothing_outside_of_an_array_is_read_or_written(run_tests_with):
    """Runs tests with kernels that end the process if they do."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("g++ has no address sanitizer here")
    environment = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    run_tests_with("g++", ["-O0", "-fsanitize=address"], REPRESENTATIVE, environment)


def test_the_same_bits_every_time():
    x, dy = draw((8, 40, 40, 24), 0, "float32"), draw((8, 40, 40, 24), 1, "float32")
    pads = ((1, 1), (1, 1))
    depthwise = partial(cpu_kernels.depthwise_filter_gradient, kernel_shape=(3, 3, 1, 24))
    regular = partial(cpu_kernels.conv_filter_gradient, kernel_shape=(3, 3, 24, 24), segments=1, stride=1)
    for gradient in (jax.jit(partial(f, pads=pads)) for f in (depthwise, regular)):
        first = np.asarray(gradient(x, dy))
        for _ in range(20):
            np.testing.assert_array_equal(gradient(x, dy), first)


GRADIENT = """
import os
{before}
import hashlib, jax, numpy as np
from xception_jax.ops import cpu_kernels
from xception_jax.ops.cpu_kernels import build
for channels in (24, 64):
    x, dy = np.random.default_rng(0).normal(size=(2, 4, 50, 50, channels)).astype("float32")
    kernel = (3, 3, channels, channels)
    f = jax.jit(lambda x, dy: cpu_kernels.conv_filter_gradient(x, dy, kernel, 1, 1, ((1, 1), (1, 1))))
    print(hashlib.sha256(np.asarray(f(x, dy))).hexdigest())
"""


def test_the_same_bits_with_any_number_of_threads(run_python):
    one_core = "os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])"
    digests = [run_python("-c", GRADIENT.format(before=before)).stdout for before in ("", one_core)]
    assert [len(digest) for digest in digests[0].split()] == [64, 64]
    assert digests[0] == digests[1]


def test_other_types_platforms_and_kernels_keep_their_lowering():
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
    conv = partial(ops.conv, segments=4)
    assert custom_calls(conv, x, kernel) == 1
    assert custom_calls(conv, x.astype("bfloat16"), kernel.astype("bfloat16")) == 0
    lowered = jax.jit(conv).trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
    assert "feature_group_count = 4" in lowered
    assert "custom_call" not in lowered


PROGRAM = """
import jax, jax.numpy as jnp
from xception_jax import ops
f = jax.jit(lambda x, k: ops.max_pool(ops.conv(x, k, segments=4)))
x, k = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
print(f.lower(x, k).as_text().count("custom_call @"), float(f(x, k).sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "calls", "warning"),
    [
        ({}, 2, None),
        ({"CXX": "env c++ -pipe"}, 2, None),  # with arguments, and by way of another program, as with ccache
        ({"XCEPTION_JAX_CPU_KERNELS": "0"}, 0, None),
        ({"CXX": "/nowhere/c++"}, 0, "could not be built"),
        ({"CXX": "/bin/false"}, 0, "could not be built"),
        ({"CXX": "c++ '"}, 0, "could not be built"),
        ({"PATH": "/nowhere"}, 0, "No C++ compiler"),
    ],
)
def test_without_a_compiler_the_answer_is_the_same(run_python, tmp_path, environment, calls, warning):
    process = run_python("-c", PROGRAM, environment={"XDG_CACHE_HOME": str(tmp_path)} | environment)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [str(calls), "576.0"]
    assert (warning or "") in process.stderr
    assert len(list(tmp_path.glob("xception_jax/kernels/*.so"))) == (calls > 0)
    if warning is None:
        assert "kernels could not be built" not in process.stderr


def test_several_devices_are_left_to_xla(run_python):
    process = run_python("-c", PROGRAM, devices=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["0", "576.0"]


def test_training_says_once_that_it_lacks_the_settings_of_the_allocator(caplog):
    cpu_kernels._mention_allocator.cache_clear()
    x, kernel = jnp.ones((1, 5, 7, 3)), jnp.ones((3, 3, 3, 2))
    ops.conv(x, kernel)
    assert not caplog.records  # inference gains less
    for stride in (1, 2):
        jax.grad(lambda kernel, stride=stride: ops.conv(x, kernel, stride=stride).sum())(kernel)
    mentioned = [record.getMessage() for record in caplog.records]
    assert len(mentioned) == lacks_allocator()
    assert all(f"export {TUNABLES}={ALLOCATOR}" in line for line in mentioned)
