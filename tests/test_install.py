"""The wheel, installed into an environment of its own and used in another directory, and the restart of `train`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import xception_jax
from tests.conftest import ROOT
from tests.tiny_run import TINY
from xception_jax.config.shipped import shipped_names
from xception_jax.environment import ALLOCATOR, TUNABLES, _has_glibc, command, program, with_allocator

needs_glibc = pytest.mark.skipif(not _has_glibc(), reason="only glibc has these settings")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Returns the directory of the programs of an environment with the wheel, which sees the packages of this one."""
    directory = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    # A copy, because setuptools leaves a build directory beside the sources.
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (directory / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / "source" / name).write_bytes((ROOT / name).read_bytes())
    options = ["--no-build-isolation", "--no-deps", "--no-index"]
    run = [*pip, "wheel", *options, "--wheel-dir", str(directory / "wheel"), str(directory / "source")]
    subprocess.run(run, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory / "venv")], check=True)
    python = directory / "venv" / "bin" / "python"
    wheel = next((directory / "wheel").glob("*.whl"))
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(directory / "venv")}))
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "shared.pth").write_text("\n".join(paths) + "\n")
    return python.parent


@pytest.fixture
def run_installed(installed, shared_environment, tmp_path):
    """Returns a function that runs `xception-jax ARGUMENTS` in an empty directory, far from the repository."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        variables = {name: value for name, value in shared_environment.items() if name != "PYTHONPATH"} | environment
        program = [str(installed / "xception-jax"), *arguments]
        return subprocess.run(program, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600)

    return run


def test_the_wheel_has_its_version_commands_and_configs(run_installed):
    assert run_installed("--version").stdout == f"xception_jax {xception_jax.__version__}\n"
    text = run_installed("train", "--help").stdout
    assert text.startswith("usage: xception-jax train")
    missing = run_installed("train", "--config=nothing", "--workdir=x")
    assert missing.returncode == 66
    assert f"choose one of {', '.join(shipped_names())}, or" in missing.stderr
    missing = run_installed("study", "run", "studies/nothing", "--workdir=x")
    assert f"choose one of {', '.join(shipped_names('study'))}, or" in missing.stderr


def test_the_wheel_trains_a_shipped_config(run_installed, tmp_path):
    overrides = [flag for flag in TINY if not flag.startswith("--config=")]
    more = ["--config.duration=2 steps", "--config.data.eval_split=", "--config.data.test_split=test[:100]"]
    process = run_installed("train", *overrides, *more, "--config=fashion_mnist", "--workdir=run")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    next_steps = process.stderr.splitlines()[-4:]
    assert next_steps == [
        "next:",
        f"  open {tmp_path / 'run' / 'report.html'} in a browser",
        f"  xception-jax predict --weights {tmp_path / 'run'} PHOTO.jpg",
        f"  xception-jax evaluate {tmp_path / 'run'}",
    ]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "xception-jax train --config.model.width_multiplier=0.05" in report


# --- The restart -----------------------------------------------------------------------------------------------------

# Prints what must survive, and what the restart is for.
SURVIVES = """
import os, signal, sys
from xception_jax.environment import TUNABLES, lacks_allocator, restart_with_allocator
before = int(os.environ.setdefault("FIRST_PID", str(os.getpid())))
restart_with_allocator()
print(os.getpid() == before, sys.argv[1:], sys.flags.isolated, repr(sys.stdin.read()), lacks_allocator())
print(os.environ.get(TUNABLES), sorted(name for name in os.environ if "RESTARTED" in name))
print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, flush=True)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # as the program does once it handles signals
os.kill(os.getpid(), signal.SIGTERM)
"""


def run_survives(**environment: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name != TUNABLES} | environment
    return subprocess.run(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "-X", "utf8", "-c", SURVIVES, "a b", "--c=*"],
        cwd=ROOT,
        env=variables,
        input="two\nlines\n",
        capture_output=True,
        text=True,
    )


@needs_glibc
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ALLOCATOR),
        ({TUNABLES: "glibc.cpu.x=1"}, f"glibc.cpu.x=1:{ALLOCATOR}"),
        ({TUNABLES: ALLOCATOR}, ALLOCATOR),
        ({TUNABLES: "glibc.malloc.arena_max=1"}, "glibc.malloc.arena_max=1"),
        ({TUNABLES: ""}, ""),
        ({"XCEPTION_JAX_RESTARTED": "1"}, "None"),  # of a parent that lost the settings: not for ever
    ],
)
def test_a_restart_keeps_arguments_input_signals_and_process(given, expected):
    process = run_survives(**given)
    lines = process.stdout.splitlines()
    assert lines == [f"True ['a b', '--c=*'] 0 'two\\nlines\\n' {expected == 'None'}", f"{expected} []", "True"]
    assert process.returncode == -signal.SIGTERM


def test_settings_of_the_user_are_kept():
    assert with_allocator({"A": "1"}) == {"A": "1", TUNABLES: ALLOCATOR}
    for own in ("", "glibc.malloc.arena_max=1"):
        assert with_allocator({TUNABLES: own}) == {TUNABLES: own}


@needs_glibc
@pytest.mark.parametrize("start", [["train.py"], ["-m", "xception_jax", "train"]], ids=" ".join)
def test_train_has_the_settings_however_it_is_started(run_python, tmp_path, start):
    config = tmp_path / "config.py"
    # What the kernel reports is the environment that the process was started with.
    config.write_text("import os\nos.write(1, open('/proc/self/environ', 'rb').read())\nos._exit(7)\n")
    none = {TUNABLES: "glibc.cpu.x=1"}  # `run_python` adds them otherwise
    process = run_python(*start, f"--config={config}", "--workdir=x", environment=none)
    assert process.returncode == 7, process.stderr
    # Some versions of glibc replace the colons when they have read it.
    assert f"{TUNABLES}=glibc.cpu.x=1:{ALLOCATOR}" in process.stdout.replace("\0", ":")


def test_the_program_and_the_command_are_named_as_they_were_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/xception-jax", "train", "--config.name=a b"])
    assert program() == "xception-jax"
    assert command() == "xception-jax train '--config.name=a b'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "--x"])
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-O", "train.py", "--x"])
    assert program() == "python -m xception_jax"
    assert command() == f"{Path(sys.executable).name} -O train.py --x"
