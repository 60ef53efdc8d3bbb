"""The plan of a TPU: the training step as libtpu compiles it; see docs/howto/plan.md."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter

import pytest

PLAN = os.environ.get("PLAN")
pytestmark = pytest.mark.skipif(not PLAN, reason="needs an interpreter with libtpu: make test-plan")

# Libtpu takes minutes for the network of the paper.
SMALL = ("--config=configs/fashion_mnist.py", "--config.model.middle_blocks=1", "--config.model.dtype=bfloat16")
DEVICE = "--config.model.batch_norm.statistics=device"
CASES = {
    "depthwise": (DEVICE,),
    "segments": (DEVICE, "--config.model.segments=4"),
    "global": ("--config.model.batch_norm.statistics=global",),
    "fsdp": (DEVICE, "--config.mesh.fsdp=8"),
}


@pytest.fixture(scope="module")
def compiled(run_python):
    """Returns a function: what `plan --json` says of a case's compiled step."""

    @functools.cache
    def compiled(case: str) -> dict:
        arguments = (*SMALL, "--config.batch_size=512", "--topology=v5e:2x4", "--json", *CASES[case])
        process = run_python("-m", "xception_jax", "plan", *arguments, interpreter=PLAN)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)["compiled"]

    return compiled


def count(compiled: dict) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for collective in compiled["collectives"]:
        kinds[collective["kind"]] += collective["count"]
    return kinds


@pytest.mark.parametrize("case", ["depthwise", "segments", "global"])
def test_no_activation_travels(compiled, case):
    assert set(count(compiled(case))) == {"all-reduce"}


@pytest.mark.parametrize("case", ["depthwise", "segments"])
def test_statistics_of_a_device_need_no_communication(compiled, case):
    assert count(compiled(case))["all-reduce"] <= 3
    assert count(compiled("global"))["all-reduce"] > 3


@pytest.mark.parametrize("case", ["depthwise", "segments", "global"])
def test_no_activation_is_written_in_float32(compiled, case):
    assert compiled(case)["float32_activation_bytes"] == 0


def test_fsdp_moves_parameters_and_no_activations(compiled):
    found = count(compiled("fsdp"))
    assert found["all-gather"] > 0
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_fsdp_shards_the_state(compiled):
    whole, share = (compiled(case)["memory"]["output"] for case in ("depthwise", "fsdp"))
    assert share < 0.5 * whole  # small arrays are whole on each chip, and padded
