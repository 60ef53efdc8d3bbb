"""A run goes on with another number of devices or processes: the same state, the same batches, the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import NEWER_CODE, ROOT, free_port
from tests.tiny_run import TINY
from xception_jax.logs.metrics_log import read_metrics

LEG = 3  # steps
# In float64, because a network of so few channels makes of a rounding error another loss within a few steps.
FLAGS = [*TINY, "--config.model.dtype=float64", "--config.log_every=1 steps"]
FLAGS += ["--config.evaluation.every=100 steps", "--config.evaluation.batch_size=96"]  # divisible by 8 devices

pytestmark = pytest.mark.faults


@pytest.fixture
def train(shared_environment, tmp_path):
    """Returns a function that trains to step `end` of `total`, on some devices in some processes."""
    address = f"localhost:{free_port()}"

    def run(workdir: str, end: int, total: int, *, devices: int, processes: int = 1) -> str:
        last = end == total
        flags = f"{os.environ['XLA_FLAGS']} {NEWER_CODE} --xla_force_host_platform_device_count={devices // processes}"
        environment = shared_environment | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1", "GO": str(tmp_path / "never")}
        started = []
        for number in range(processes):
            fields = [f"--config.duration={total} steps"]
            if processes > 1:
                given = {"coordinator": address, "num_processes": processes, "process_id": number, "heartbeat": 10}
                fields += [f"--config.distributed.{name}={value}" for name, value in given.items()]
            program = ["tests/processes/stalling_train.py", *FLAGS, f"--workdir={tmp_path / workdir}", *fields]
            command = [sys.executable, *program, f"train:{10_000 if last else LEG + 1}"]
            options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen(command, text=True, **options))
        if not last:
            # It records a step when the next one is under way, for which the last batch before the stall is needed.
            while losses(tmp_path / workdir)[-1:] < [(end - 1, 0.0)]:
                assert all(process.poll() is None for process in started), started[0].communicate()
                time.sleep(0.05)
            started[-1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=200)[0] for process in started]
        assert [process.returncode for process in started] == [0 if last else 75] * processes, said
        return said[0]

    return run


def losses(workdir: Path) -> list[tuple[int, float]]:
    if not (workdir / "metrics.jsonl").exists():
        return []
    return [
        (entry["step"], entry["loss"]) for entry in read_metrics(workdir / "metrics.jsonl") if entry["split"] == "train"
    ]


@pytest.mark.parametrize(
    "legs",
    [
        pytest.param([(8, 1), (4, 1), (2, 1), (1, 1), (2, 1), (4, 1), (8, 1)], id="8-4-2-1-2-4-8"),
        pytest.param([(2, 1), (2, 2), (1, 1)], id="one process, two, one"),
        pytest.param([(1, 1), (4, 2), (2, 1), (2, 2)], id="more processes and other devices"),
    ],
)
def test_a_run_that_moves_is_the_run_that_stays(train, tmp_path, legs):
    total, saved = LEG * len(legs), 0
    for number, (devices, processes) in enumerate(legs):
        end = total if number == len(legs) - 1 else saved + LEG
        said = train("moves", end, total, devices=devices, processes=processes)
        assert f"devices  {devices} x cpu, {processes} process(es)" in said
        assert "damaged" not in said  # the restored arrays were compared with the digest of those that were saved
        if saved:
            assert f"resumed at {saved}" in said
        before, saved = saved, max(int(step.name) for step in (tmp_path / "moves/checkpoints").glob("[0-9]*"))
        assert before < saved <= end
    train("stays", total, total, devices=1)
    moves, stays = losses(tmp_path / "moves"), losses(tmp_path / "stays")
    assert [step for step, _ in moves] == [step for step, _ in stays] == list(range(1, total + 1))
    assert [loss for _, loss in moves] == pytest.approx([loss for _, loss in stays], rel=1e-5)
