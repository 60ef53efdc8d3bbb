"""Several processes on this machine, started for real by launch/local_processes.sh."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from tests.conftest import NEWER_CODE, ROOT
from tests.tiny_run import TINY


@pytest.mark.launch
def test_two_processes_here_train_one_network(shared_environment, command_folder, tmp_path):
    variables = {
        "PATH": f"{command_folder}:{os.environ['PATH']}",
        "CONFIG": "fashion_mnist",
        "PROCESSES": "2",
        "WORKDIR": str(tmp_path / "run"),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {NEWER_CODE}",
    }
    fields = [argument for argument in TINY if not argument.startswith("--config=")]
    process = subprocess.run(
        ["bash", "launch/local_processes.sh", *fields, "--config.duration=4 steps"],
        cwd=ROOT,
        env=shared_environment | variables,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert process.returncode == 0, process.stderr
    assert "2 x cpu, 2 process(es)" in process.stdout + process.stderr, process.stderr
    assert len(set(re.findall("state sha256: [0-9a-f]{64}", process.stdout))) == 1
