"""The plan, for GPUs through the command; and the arithmetic of its interval."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import types

import jax
import pytest

from xception_jax.config import default_config, override, resolve
from xception_jax.data.synthetic import SyntheticSource
from xception_jax.errors import DeviceMemoryError, UsageError
from xception_jax.models import create_model
from xception_jax.parallel import make_mesh
from xception_jax.tools.planning.hlo import Collective
from xception_jax.tools.planning.plan import Memory, _batch_that_fits, _too_large, find_largest_batch
from xception_jax.tools.planning.roofline import Traffic, count_traffic, step_time
from xception_jax.tools.planning.topology import parse_topology
from xception_jax.training.experiment import build_experiment

DEFAULTS = resolve(default_config())


def test_traffic_of_a_small_network():
    model = create_model({"num_classes": 10, "width_multiplier": 1 / 32, "middle_blocks": 0, "stem": "small"})
    traffic = count_traffic(model, 4)
    assert traffic.batch_norms == 2 + 3 * 3 + 3 + 2
    # The first convolution alone: 4 x 4 pixels of 3 channels in, of 1 channel out.
    assert traffic.read > 4 * 4 * 3
    assert traffic.fused == 3 * traffic.read + 2 * traffic.written
    assert traffic.unfused == traffic.fused + traffic.written + 8 * traffic.normalised


def test_xception_moves_what_its_layers_say():
    traffic = count_traffic(create_model(DEFAULTS.model), 299)
    assert traffic == Traffic(33_053_491, 35_825_968, 21_137_152, 40)


def test_the_interval_of_a_step():
    v5e = parse_topology("v5e:16x16")
    reduce = Collective("all-reduce", "-", "backward", 91_000_000, 1, 256)
    time = step_time(v5e, flops=197e12 * 0.010, memory=(819e9 * 0.020, 819e9 * 0.030), collectives={reduce: 2},
                     dtype="bfloat16")  # fmt: skip
    assert time.compute == pytest.approx(0.010)
    assert time.memory == pytest.approx((0.020, 0.030))
    once = 32e-6 + 2 * 91e6 * 255 / 256 / (4 * 50e9)
    assert time.communication == pytest.approx(2 * once)
    assert time.interval == pytest.approx((0.020, 0.030 + 2 * once))


def test_float32_on_a_gpu_takes_twice_the_time():
    h100 = parse_topology("h100:8")
    seconds = [
        step_time(h100, flops=1e12, memory=(0, 0), collectives={}, dtype=dtype).compute
        for dtype in ("bfloat16", "float32")
    ]
    assert seconds[1] == 2 * seconds[0]


@pytest.mark.parametrize(
    ("start", "largest", "kept"),
    [
        *((start, 160, 1000) for start in (8, 64, 160, 1000, 4)),
        (64, 8, 1000),
        (64, 0, 1000),
        (64, 200, 150),
        (128, 240, 150),
    ],
)
def test_the_search_for_the_largest_batch(monkeypatch, start, largest, kept):
    """With a compiler whose memory is not quite proportional, and which refuses what is beyond the largest batch.

    Beyond `kept` images it computes activations anew, so that its memory does not say how many more fit.
    """
    compiled = []

    def make_plan(config, topology, **_):
        batch = config.batch_size // topology.size
        compiled.append(batch)
        if batch > largest:
            raise DeviceMemoryError("too large", "here", "less")
        total = topology.chip.hbm_bytes * (min(batch, kept) + 8) // 175
        memory = types.SimpleNamespace(total=total, temporaries=total - 10**9)
        return types.SimpleNamespace(batch_per_chip=batch, compiled=types.SimpleNamespace(memory=memory))

    monkeypatch.setattr("xception_jax.tools.planning.plan.make_plan", make_plan)
    v5e = parse_topology("v5e:4x4")
    config = override(DEFAULTS, {"batch_size": start * v5e.size})
    if largest == 0:
        with pytest.raises(DeviceMemoryError):
            find_largest_batch(config, v5e, report=lambda line: None)
    else:
        found = find_largest_batch(config, v5e, report=lambda line: None).batch_per_chip
        assert largest - 8 <= found <= largest
    assert len(compiled) <= 8


def test_a_step_that_does_not_fit_says_by_how_much():
    refused = DeviceMemoryError("too large", "here", "less")
    refused.__cause__ = RuntimeError(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (27.97G) exceeds "
        "available HBM (15.75G)."
    )
    error = _too_large(refused, DEFAULTS, parse_topology("v5e:2x2"))
    assert error.what == "the training step does not fit into the memory of a TPU v5e: 27.97G of 15.75G"
    assert error.where.startswith("480 images per chip")


def test_the_search_needs_a_compiler():
    with pytest.raises(UsageError, match="for TPUs only"):
        find_largest_batch(DEFAULTS, parse_topology("h100:8"))


@pytest.fixture(scope="module")
def plan(run_python):
    def run(*arguments):
        return run_python("-m", "xception_jax", "plan", "--config=configs/imagenet.py", *arguments)

    return run


def test_gpus(plan):
    process = plan("--topology=h100:8", "--json")
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)
    assert (answer["chips"], answer["batch_per_chip"], answer["epoch_examples"]) == (8, 240, 1_255_544)
    least, most = answer["seconds"]["step"]
    assert 0 < least < most
    assert answer["images_per_second"] == pytest.approx([1920 / most, 1920 / least])
    assert answer["chip_hours"] == pytest.approx([8 * hours for hours in answer["hours"]])
    assert answer["hours"] == pytest.approx([answer["steps"] * value / 3600 for value in (least, most)])
    assert 0 < answer["mfu"][0] < answer["mfu"][1] < 1
    assert "compiled" not in answer
    assert answer["hosts"]["count"] == 1
    assert answer["cores_for_input"] == pytest.approx([speed / 510 for speed in answer["images_per_second"]])
    copies = 3  # weights, momentum and Polyak average in float32; statistics have no momentum
    assert answer["checkpoint"]["bytes"] == pytest.approx(copies * 4 * 22_900_000, rel=0.01)
    assert answer["checkpoint"]["seconds"] == answer["checkpoint"]["bytes"] / 100e6
    assert answer["stop_seconds"] == pytest.approx([value + answer["checkpoint"]["seconds"] for value in (least, most)])
    assert answer["first_step"] == {"seconds": 116, "cached": 38}
    assert answer["warnings"] == []
    assert answer["launch"] == ["CONFIG=configs/imagenet.py WORKDIR=DIRECTORY bash launch/one_node.sh"]


def test_the_same_in_words(plan):
    process = plan("--topology=a100:16", "--config.batch_size=1600", "--examples=160000", "--bandwidth=10")
    assert process.returncode == 0, process.stderr
    assert "16 x NVIDIA A100" in process.stdout
    assert "1,600 images, 100 per chip, bfloat16" in process.stdout
    assert "16,900 steps (169 epochs of 160,000 images)" in process.stdout
    assert "memory may be more" in process.stdout
    assert "at 10 MB/s from one host" in process.stdout
    assert "2 hosts with 8 chips" in process.stdout
    assert "sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh --config.batch_size=1600\n" in process.stdout
    assert "warnings    A step and a checkpoint take up to 28 s." in process.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--topology=v9:4x4"], 64, "error: there is no topology 'v9:4x4'"),
        (["--topology=h100:7"], 78, "error: config.batch_size=1920 is not divisible by 7 devices"),
        (["--topology=h100:8", "--config.batchsize=8"], 78, "error: there is no field config.batchsize"),
        (["--topology=h100:8", "--config.data.train_split=trainx"], 78, "error: the size of the split 'trainx'"),
        (["--topology=h100:8", "--config.data.train_split=train[:2O%]"], 78, "error: the size of the split"),
        (["--topology=h100:8", "--config.mesh.fsdp=3"], 78, "error: a mesh of data=-1 x fsdp=3 does not fit 8"),
        (["--topology=h100:8", "--config.data.name=mine"], 66, "error: the dataset mine is missing"),
        pytest.param(
            ["--topology=v5e:2x2"],
            66,
            "error: libtpu is not installed",
            marks=pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed"),
        ),
    ],
)
def test_what_goes_wrong_costs_three_lines(plan, arguments, code, what):
    process = plan(*arguments)
    assert process.returncode == code, process.stderr
    first, where, fix = process.stderr.splitlines()
    assert first.startswith(what)
    assert where.startswith("  where: ")
    assert fix.startswith("  fix:   ")


def test_the_batch_that_fills_the_memory():
    activations = Memory(arguments=100, temporaries=400, output=50, alias=50, program=0)
    assert _batch_that_fits(8, activations, 1300) == 8 + 16
    assert _batch_that_fits(8, dataclasses.replace(activations, temporaries=0), 1300) == 8 + 96


def test_an_experiment_is_built_without_computing():
    """The devices of a plan are not here: whatever runs while it is made would end it."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    config = override(DEFAULTS, {"model.width_multiplier": 0.05, "model.middle_blocks": 0, "batch_size": 8})
    jax.clear_caches()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        build_experiment(config, {"train": SyntheticSource(100, "train")}, mesh)
    assert compiled == []
    jax.jit(lambda: 0)()
    assert compiled
