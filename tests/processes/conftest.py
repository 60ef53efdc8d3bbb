"""Starts two training processes that know each other."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from tests.conftest import NEWER_CODE, ROOT, free_port
from tests.tiny_run import TINY


@pytest.fixture
def train_pair(shared_environment, tmp_path):
    """Returns a function that starts two hosts with arguments of their own, and a work directory that they share.

    `program` runs instead of train.py.
    """
    environment = shared_environment | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {NEWER_CODE}"}
    environment |= {"GO": str(tmp_path / "go")}
    address = f"localhost:{free_port()}"
    with contextlib.ExitStack() as stack:

        def start(*arguments_of_hosts, program="train.py", heartbeat=8):
            pair = []
            for number, arguments in enumerate(arguments_of_hosts):
                distributed = {"coordinator": address, "num_processes": 2, "process_id": number, "heartbeat": heartbeat}
                fields = [f"--config.distributed.{name}={value}" for name, value in distributed.items()]
                command = [sys.executable, program, *TINY, f"--workdir={tmp_path / 'run'}", *fields, *arguments]
                options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
                process = subprocess.Popen(command, text=True, **options)
                stack.callback(process.kill)
                pair.append(process)
            return pair

        yield start


def ended(pair):
    """Waits for processes, and returns their output, errors and exit codes."""
    return [(*process.communicate(timeout=200), process.returncode) for process in pair]
