from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from xception_jax.environment import ALLOCATOR, TUNABLES

ROOT = Path(__file__).parent.parent

# With JAX and Keras in memory, garbage collection at its default frequency takes a tenth of the time.
gc.set_threshold(50_000)

# A shell without job control lets its background processes ignore SIGINT, and their children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Most programs in the tests run once, so optimising them would take longer than running them unoptimised. JAX reads the
# flags when it first compiles, here and in the processes that tests start.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
# XLA's older code generator takes two thirds of the time for a short run. On one device both compute the same values up
# to rounding. On several devices, losses differed by 0.2 % after five steps. jax 0.12 has only the newer one.
OLDER_CODE, NEWER_CODE = (
    f"--xla_cpu_use_fusion_emitters={newer}" if version("jaxlib").startswith("0.10.") else ""
    for newer in ("false", "true")
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION} {OLDER_CODE}"
# Programs without the Python line of each operation are lowered faster: a short run takes 8 % less CPU time.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"


def run_command(command: ModuleType, *arguments: object) -> int:
    """Runs a command, which is a module of `xception_jax.cli`, in this process, and returns its exit code."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*map(str, arguments)]))


# Ordered by duration.
LONG_FILES = (
    "test_train.py",
    "test_train_kinds.py",
    "test_configs.py",
    "test_docs.py",
    "test_parity_with_keras.py",
    "test_finetuning.py",
    "test_export.py",
    "test_runner.py",
    "test_cpu_kernels.py",
    "test_keras_files.py",
    "test_compiled_step.py",
    "test_checkpoint.py",
    "test_train_bad_input.py",
    "test_plan.py",
    "test_smoke.py",
    "test_install.py",
    "test_step.py",
    "test_networks.py",
    "test_parity_catches.py",
)


def pytest_xdist_auto_num_workers():
    """Returns one worker more than there are cores, because a test often waits for a process that it started."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """Puts the longest files first. Workers take whole files, and a long one at the end would leave the others idle."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


_ports = itertools.count(127 * os.getpid())


def free_port() -> int:
    """Returns a port that nobody uses, and whose successor is free too: there the processes of a run call the roll.

    It is not one of the ports that the system gives to any program at any time.
    """
    while True:
        port = 10_000 + 2 * (next(_ports) % 10_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)), socket.create_server(("", port + 1)):
            return port


@pytest.fixture(scope="session", autouse=True)
def mentioned_allocator():
    """Lets the note about the allocator appear here, not in the output of the first test that computes a gradient."""
    from xception_jax.ops import cpu_kernels

    cpu_kernels._mention_allocator()


@pytest.fixture(scope="session")
def shared_environment(tmp_path_factory) -> dict[str, str]:
    """Returns the environment of the processes that tests start.

    All workers of a session share the compiled programs. Each worker prepares datasets in a directory of its own.
    """
    worker = tmp_path_factory.getbasetemp()
    session = worker.parent if "PYTEST_XDIST_WORKER" in os.environ else worker
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(session / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "TFDS_DATA_DIR": str(worker / "tensorflow_datasets"),
        "PYTHONPATH": str(ROOT),
        TUNABLES: ALLOCATOR,  # otherwise each training would restart itself to get them
    }


@pytest.fixture(scope="session")
def run_python(shared_environment):
    """Returns a function that runs `python ARGUMENTS` in the root of the repository and waits for it to end.

    `devices` is the number of simulated devices. `environment` overrides variables of `shared_environment`. Tests that
    need other packages pass the `interpreter` of another virtual environment.
    """

    def run(
        *arguments: object,
        devices: int = 1,
        environment: dict[str, str] | None = None,
        interpreter: str = sys.executable,
        **kwargs,
    ) -> subprocess.CompletedProcess:
        environment = shared_environment | (environment or {})
        if devices > 1:
            flags = f"{os.environ['XLA_FLAGS']} {NEWER_CODE} --xla_force_host_platform_device_count={devices}"
            environment |= {"XLA_FLAGS": flags}
        command = [interpreter, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, **kwargs)

    return run
