"""What the parser finds in programs whose communication is known, because they ask for it by name."""

from __future__ import annotations

import json

import pytest

from xception_jax.tools.planning.hlo import Collective, arrays_in_memory, collectives

PROGRAM = """
import dataclasses, json
from functools import partial
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P
from xception_jax.tools.planning.hlo import collectives

mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

@partial(jax.shard_map, mesh=mesh, in_specs=P(("x", "y")), out_specs=P(("x", "y")), check_vma=False)
def program(x):  # [2, 16] on each device, float32
    with jax.named_scope("norm"):
        x = x / jnp.sqrt(lax.psum(jnp.square(x), ("x", "y")))
    with jax.named_scope("gather"):
        x = x + lax.all_gather(x, "y").sum(0)
    with jax.named_scope("scatter"):
        x = x + lax.psum_scatter(jnp.tile(x, (4, 1)), "y", scatter_dimension=0, tiled=True)
    with jax.named_scope("shift"):
        x = x + lax.ppermute(x.astype(jnp.bfloat16), "x", [(0, 1), (1, 0)]).astype(jnp.float32)
    with jax.named_scope("loop"):
        x = lax.fori_loop(0, 5, lambda i, x: jnp.sin(lax.pmax(x, "x")) + i, x)
    return x

hlo = jax.jit(program).lower(jnp.ones((16, 16))).compile().as_text()
found = [dataclasses.asdict(one) | {"count": count} for one, count in collectives(hlo, 8).items()]
print(json.dumps({"found": found}))
"""


@pytest.fixture(scope="module")
def program(run_python):
    process = run_python("-c", PROGRAM, devices=8)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize(
    ("layer", "kind", "num_bytes", "devices", "count"),
    [
        ("norm", "all-reduce", 2 * 16 * 4, 8, 1),
        ("gather", "all-gather", 4 * 2 * 16 * 4, 4, 1),
        ("scatter", "reduce-scatter", 4 * 2 * 16 * 4, 4, 1),
        ("loop", "all-reduce", 2 * 16 * 4, 2, 5),
    ],
)
def test_a_compiled_program(program, layer, kind, num_bytes, devices, count):
    (one,) = [one for one in program["found"] if one["layer"] == layer]
    assert (one["kind"], one["bytes"], one["devices"], one["count"]) == (kind, num_bytes, devices, count)


def test_a_permutation(program):
    (one,) = [one for one in program["found"] if one["kind"] == "collective-permute"]
    assert len(program["found"]) == 5
    assert (one["layer"], one["count"]) == ("shift", 1)
    assert one["bytes"] in (2 * 16 * 2, 2 * 16 * 4)  # a CPU may send bfloat16 as float32


# As libtpu writes it: layouts with tiles in brackets, collectives in two halves, several arrays sent together.
TPU = """
HloModule jit_step, is_scheduled=true

%fused_computation (param_0: bf16[8,4,4,2]) -> f32[2] {
  %param_0 = bf16[8,4,4,2]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %convert.1 = f32[8,4,4,2]{3,2,1,0:T(8,128)} convert(%param_0)
  ROOT %reduce.1 = f32[2]{0:T(128)} reduce(%convert.1, %zero), dimensions={0,1,2}, to_apply=%add
}

ENTRY %main.9 (p0: bf16[8,4,4,2]) -> f32[8,4,4,2] {
  %p0 = bf16[8,4,4,2]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %fusion.1 = f32[2]{0:T(128)S(1)} fusion(%p0), kind=kInput, calls=%fused_computation
  %all-reduce.1 = (f32[2]{0:T(128)S(1)}, bf16[3,4]{1,0:T(8,128)(2,1)S(1)}) all-reduce(%fusion.1, %p1), channel_id=1, \
replica_groups=[1,4]<=[4], to_apply=%add, metadata={op_name="jit(step)/transpose(jvp(Net))/conv1/dot" stack_frame_id=4}
  %all-gather-start.1 = (f32[2]{0}, f32[8]{0:T(128)}) all-gather-start(%fusion.1), \
replica_groups={{0,1,2,3}}, dimensions={0}
  %all-gather-done.1 = f32[8]{0:T(128)} all-gather-done(%all-gather-start.1)
  %collective-permute-start.1 = (f32[2]{0}, f32[2]{0}, u32[], u32[]) collective-permute-start(%fusion.1), \
source_target_pairs={{0,1}}
  ROOT %fusion.2 = f32[8,4,4,2]{3,2,1,0:T(8,128)} fusion(%p0, %all-gather-done.1), kind=kLoop, calls=%other
}
"""


def test_the_text_of_libtpu():
    assert collectives(TPU, 4) == {
        Collective("all-reduce", "conv1", "backward", 2 * 4 + 12 * 2, 2, 4): 1,
        Collective("all-gather", "-", "update", 8 * 4, 1, 4): 1,
        Collective("collective-permute", "-", "update", 2 * 4, 1, 4): 1,
    }


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['x'=2,'y'=4] {'y'}", 4),
        ("mesh['x'=2,'y'=4] {'x','y'}", 8),
        ("mesh['x'=2,'y'=4] {'y':(2)2}", 2),
        ("{}", 8),
    ],
)
def test_every_notation_of_groups(groups, devices):
    line = f"  %sum.1 = f32[2]{{0}} all-reduce(%p0), replica_groups={groups}, to_apply=%add"
    (one,) = collectives(f"ENTRY %main.1 (p0: f32[2]) -> f32[2] {{\n{line}\n}}", 8)
    assert one.devices == devices


def test_what_is_inside_a_fusion_is_not_in_memory():
    assert arrays_in_memory(TPU, "f32")[8, 4, 4, 2] == 1
    assert not arrays_in_memory(TPU, "bf16")[8, 4, 4, 2]


def test_bytes_sent():
    def sent(kind):
        return Collective(kind, "-", "update", 1000, 1, 4).bytes_sent

    assert sent("all-reduce") == 2 * 750
    assert sent("all-gather") == sent("reduce-scatter") == 750
    assert sent("collective-permute") == 1000
