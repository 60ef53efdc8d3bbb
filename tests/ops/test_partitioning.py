"""Convolutions between regular and depthwise stay local to each of eight devices (openxla/xla#47945)."""

from __future__ import annotations

import pytest

PROGRAM = """
import re
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from xception_jax import ops

assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
by_image = NamedSharding(mesh, PartitionSpec("data"))
everywhere = NamedSharding(mesh, PartitionSpec())

def native(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=segments)

def collectives(conv, segments):
    def loss(x, kernel):
        return jnp.square(conv(x, kernel)).sum()
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), in_shardings=(by_image, everywhere),
                   out_shardings=(everywhere, (by_image, everywhere)))
    x, kernel = jnp.ones((16, 6, 6, 8)), jnp.ones((3, 3, 8 // segments, 8))
    hlo = step.lower(x, kernel).compile().as_text()
    return sorted(set(re.findall(r"all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter", hlo)))

for segments in (1, 2, 4, 8):
    print(segments, *collectives(lambda x, kernel: ops.conv(x, kernel, segments=segments), segments))
segments = 2
print("native", *collectives(native, 2))
"""


@pytest.fixture(scope="module")
def collectives(run_python):
    process = run_python("-c", PROGRAM, devices=8)
    assert process.returncode == 0, process.stderr
    return {line.split()[0]: line.split()[1:] for line in process.stdout.splitlines()}


@pytest.mark.parametrize("segments", ["1", "2", "4", "8"])
def test_only_the_filter_gradient_is_communicated(collectives, segments):
    assert collectives[segments] == ["all-reduce"]


def test_xla_still_gathers_the_batch(collectives):
    """Fails once the workaround is no longer needed: `lowerings._per_tap` may then become `native` on TPU and GPU."""
    assert "all-gather" in collectives["native"]
