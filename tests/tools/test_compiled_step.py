"""What a training step says to other devices, and in which type it computes, read from the compiled program."""

from __future__ import annotations

import json
import os
import re

import jax
import pytest

from tests.conftest import ROOT
from xception_jax.config import resolve
from xception_jax.data.synthetic import SyntheticSource
from xception_jax.parallel import make_mesh
from xception_jax.training.experiment import build_experiment
from xception_jax.training.state import DROPOUT, seed_bits
from xception_jax.training.step import make_train_step

CASES = {
    "segments": {"model.segments": 2, "model.batch_norm.statistics": "device"},
    "depthwise": {"model.batch_norm.statistics": "device"},
    "fsdp": {"model.segments": 2, "mesh.fsdp": 2},
}

pytestmark = pytest.mark.slow  # all of them compile four programs


@pytest.fixture(scope="module")
def steps(run_python):
    program = ROOT / "tests/tools/step_program.py"
    # What the program communicates is decided before code is made for the processor, and nothing is run here.
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    process = run_python(program, *map(json.dumps, CASES.values()), environment={"XLA_FLAGS": flags})
    assert process.returncode == 0, process.stderr
    return dict(zip(CASES, map(json.loads, process.stdout.splitlines()), strict=True))


def count(step, kind):
    return sum(one["count"] for one in step["collectives"] if one["kind"] == kind)


@pytest.mark.parametrize("case", ["segments", "depthwise"])
def test_nothing_but_sums(steps, case):
    assert {one["kind"] for one in steps[case]["collectives"]} == {"all-reduce"}


@pytest.mark.parametrize("case", ["segments", "depthwise"])
def test_statistics_of_a_device_need_no_communication(steps, case):
    step = steps[case]
    assert count(step, "all-reduce") <= 3
    assert sum(one["bytes"] for one in step["collectives"]) < 1.01 * step["parameter_bytes"]  # statistics and metrics


def test_global_statistics_do(steps):
    assert count(steps["fsdp"], "all-reduce") > 3


def test_fsdp_shards_parameters_and_optimiser_state(steps):
    step = steps["fsdp"]
    assert step["state_bytes_a_device"] == pytest.approx(step["state_bytes"] / 2, rel=0.01)
    assert steps["segments"]["state_bytes_a_device"] == steps["segments"]["state_bytes"]


def test_fsdp_moves_parameters_and_no_activations(steps):
    step = steps["fsdp"]
    assert {one["kind"] for one in step["collectives"]} == {"all-gather", "all-reduce"}
    gathered = sum(one["bytes"] * one["count"] for one in step["collectives"] if one["kind"] == "all-gather")
    assert gathered == pytest.approx(step["parameter_bytes"], rel=0.02)  # and the running averages


def test_convolutions_of_a_bfloat16_step_are_in_bfloat16():
    """For a TPU. That no float32 copy is written to memory either is for the compiler; `plan` reports it."""
    small = {"width_multiplier": 0.1, "middle_blocks": 0, "stem": "small", "residual": False, "dtype": "bfloat16"}
    config = resolve({"model": small, "data": {"image_size": 16}, "batch_size": 2})
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        experiment = build_experiment(config, {"train": SyntheticSource(1000, "train")}, mesh)
        step = make_train_step(experiment.model, experiment.optimizer, experiment.schedule, config)
        traced = jax.jit(step).trace(experiment.abstract, experiment.abstract_batch(), seed_bits(0, DROPOUT))
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    types = [re.findall(r"tensor<([\w]*)>", line) for line in program.splitlines() if "stablehlo.convolution" in line]
    assert len(types) > 20
    assert {name.rpartition("x")[2] for line in types for name in line} == {"bf16"}
    pooled = [line for line in program.splitlines() if re.search("reduce_window|select_and_scatter", line)]
    assert pooled
    products = re.findall(r"stablehlo.dot_general.*: \(tensor<(\w+)>, tensor<(\w+)>\)", program)
    in_float32 = {pair for pair in products if any(name.endswith("f32") for name in pair)}
    assert in_float32
    assert all("1000" in "x".join(pair).split("x") for pair in in_float32)  # the classifier alone
