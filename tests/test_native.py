"""Fault 57: damaged, foreign and linked libraries in the cache, caches that others can write, killed builders."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from xception_jax import environment, native

COMPILER = shutil.which("g++") or shutil.which("clang++")
STRANGER = 12345
pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cc"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@pytest.fixture
def planted(tmp_path):
    """A library whose constructor leaves a trace."""
    path, trace = tmp_path / "planted.cc", tmp_path / "planted_code_ran"
    path.write_text(
        f'#include <cstdio>\n__attribute__((constructor)) static void run() {{ fclose(fopen("{trace}", "w")); }}\n'
        'extern "C" int answer() { return 13; }\n'
    )
    library = tmp_path / "planted.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", path, "-o", library], check=True)
    return library, trace


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache directory of the tests, and an empty directory for temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir(mode=0o1777)
    (tmp_path / "temporary").chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "cache" / "xception_jax" / "kernels"


@pytest.fixture
def load(source, cache, capfd, caplog):
    """Returns a function that loads the library; it returns the answer, and the lines that were printed and logged."""

    def load() -> tuple[int, list[str]]:
        def command(output: Path) -> list[str]:
            return [COMPILER, "-shared", "-fPIC", str(source), "-o", str(output)]

        caplog.clear()
        capfd.readouterr()
        answer = native.load("answer", command, "kernels").answer()
        logged = [record.getMessage() for record in caplog.records]
        # An earlier test may have installed absl's handler, which prints what is logged.
        printed = [line for line in capfd.readouterr().err.splitlines() if not any(each in line for each in logged)]
        return answer, printed + logged

    return load


def fallback(tmp_path: Path) -> Path:
    return tmp_path / "temporary" / f"xception_jax-{os.geteuid()}" / "kernels" / "answer.so"


def test_a_library_is_built_once_for_this_user_only(load, cache):
    assert load() == (42, ["building the kernels, once: 10 to 20 s ..."])
    assert load() == (42, [])
    assert {path.name for path in cache.iterdir()} - {"lock"} == {"answer.so", "answer.so.sha256"}
    for directory in (cache, cache.parent, cache.parent.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.glob("answer*")} == {0o600}
    check = subprocess.run(["sha256sum", "--check", "answer.so.sha256"], cwd=cache, capture_output=True, text=True)
    assert check.stdout == "answer.so: OK\n"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize("name", ["answer.so", "answer.so.sha256"])
@pytest.mark.parametrize(
    "damage",
    [
        flip,
        replace_by_link,
        replace_by_pipe,
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, 1 << 40),
        lambda path: path.write_bytes(os.urandom(5000)),
        lambda path: path.chmod(0o620),
        lambda path: path.chmod(0o602),
        pytest.param(lambda path: os.chown(path, STRANGER, -1), marks=as_root),
    ],
    ids=["flipped", "linked", "pipe", "truncated", "empty", "huge", "garbage", "group", "others", "foreign"],
)
def test_a_damaged_library_is_built_again_with_one_line(load, cache, damage, name):
    load()
    damage(cache / name)
    assert load() == (42, ["the kernels in the cache are damaged; building them again: 10 to 20 s ..."])
    assert load() == (42, [])


def test_a_library_without_a_digest_is_built_again(load, cache, planted):
    library, trace = planted
    cache.mkdir(parents=True)
    cache.parent.parent.chmod(0o700)
    shutil.copy(library, cache / "answer.so")
    assert load()[0] == 42
    assert not trace.exists()


def plant(cache: Path, library: Path) -> None:
    """Puts a library with the right digest into a cache."""
    cache.mkdir(parents=True, exist_ok=True)
    shutil.copy(library, cache / "answer.so")
    with open(cache / "answer.so.sha256", "w") as file:
        subprocess.run(["sha256sum", "answer.so"], cwd=cache, stdout=file, check=True)
    for directory in (cache, cache.parent, cache.parent.parent):
        directory.chmod(0o700)
    for path in cache.iterdir():
        path.chmod(0o600)


def test_a_planted_library_of_this_user_would_be_loaded(load, cache, planted):
    """Otherwise the tests below would prove nothing."""
    plant(cache, planted[0])
    assert load() == (13, [])
    assert planted[1].exists()


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o770])
def test_a_cache_that_others_can_write_is_not_used(load, cache, planted, tmp_path, level, mode):
    plant(cache, planted[0])
    directory = (cache, *cache.parents)[level]
    directory.chmod(mode)
    if mode & stat.S_IWGRP:
        os.chown(
            directory, -1, next(group for group in (*os.getgroups(), STRANGER) if not native._is_private_group(group))
        )
    answer, lines = load()
    assert answer == 42
    assert len([line for line in lines if f"other users can write to {directory} (chmod go-w)" in line]) == 1
    assert fallback(tmp_path).exists()
    assert not planted[1].exists()


def test_a_sticky_directory_is_good_above_the_cache_only(load, cache, planted):
    plant(cache, planted[0])
    cache.parent.parent.chmod(0o1777)
    assert load() == (13, [])
    cache.chmod(0o1777)
    assert load()[0] == 42


@as_root
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_cache_of_another_user_is_not_used(load, cache, planted, tmp_path, level):
    """As with `sudo --preserve-env`: root with the HOME of somebody else."""
    plant(cache, planted[0])
    directory = (cache, *cache.parents)[level]
    os.chown(directory, STRANGER, -1)
    answer, lines = load()
    assert answer == 42
    assert any(f"{directory} belongs to another user" in line for line in lines)
    assert not planted[1].exists()


@as_root
def test_nothing_is_created_in_the_home_of_another_user(load, tmp_path, cache):
    cache.parent.parent.mkdir(mode=0o755)
    os.chown(cache.parent.parent, STRANGER, -1)
    assert load()[0] == 42
    assert not list(cache.parent.parent.iterdir())


@pytest.mark.parametrize("level", [0, 1])
def test_a_link_in_place_of_the_cache_is_not_followed(load, cache, planted, tmp_path, level):
    plant(cache, planted[0])
    directory = (cache, *cache.parents)[level]
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    answer, lines = load()
    assert answer == 42
    assert any(f"{directory} is a link or a file" in line for line in lines)


@as_root
def test_a_squatted_directory_among_the_temporary_files_is_not_used(load, cache, planted, tmp_path):
    cache.parent.parent.write_text("a file")
    plant(fallback(tmp_path).parent, planted[0])
    (tmp_path / "temporary").chmod(0o1777)
    os.chown(fallback(tmp_path).parent.parent, STRANGER, -1)
    with pytest.raises(OSError, match="belongs to another user"):
        load()
    assert not planted[1].exists()


def test_a_relative_cache_directory_is_not_used(load, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert load()[0] == 42
    assert not Path("relative").exists()


def test_a_cache_that_is_a_file_is_not_used(load, cache, tmp_path):
    cache.parent.parent.write_text("a file")
    answer, lines = load()
    assert answer == 42
    assert sum("Not used" in line for line in lines) == 1


@as_root
@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_a_user_without_a_home_and_an_entry_has_no_cache_directory():
    """As in `docker run --user 12345`. The capabilities only let that user read this installation."""
    capabilities = "+dac_read_search,+dac_override"
    user = [
        "setpriv",
        f"--reuid={STRANGER}",
        "--clear-groups",
        f"--inh-caps={capabilities}",
        f"--ambient-caps={capabilities}",
    ]
    code = (
        "from xception_jax.environment import cache_directory; print(cache_directory())\n"
        "from xception_jax.weights import sources\n"
        "try: print(sources.cache_directory())\nexcept sources.InputMissingError as error: print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    process = subprocess.run(
        [*user, sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert process.stdout.splitlines()[0] == "None", process.stderr
    assert "set XCEPTION_JAX_CACHE to a directory" in process.stdout


def test_the_reason_is_one_text_if_no_directory_can_be_used(load, cache, tmp_path, monkeypatch):
    cache.parent.parent.write_text("a file")
    hostile = tmp_path / "\x1b[31m\nerror: forged"
    hostile.write_text("a file")
    with monkeypatch.context() as context:
        context.setattr("tempfile.gettempdir", lambda: str(hostile))
        with pytest.raises(OSError, match=r"is a link or a file; .* is a link or a file") as caught:
            load()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("script", ["exit 1", 'echo garbage > "$out"', ":", "kill -9 $$"])
def test_a_compiler_that_fails_leaves_nothing(cache, tmp_path, script):
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nout="$1"\n{script}\n')
    compiler.chmod(0o755)
    for _ in range(2):  # garbage is not kept either
        with pytest.raises(subprocess.CalledProcessError):
            native.load("answer", lambda output: [str(compiler), str(output)], "kernels")
        assert [path.name for path in cache.iterdir() if path.name != "lock"] == []


BUILDER = """
import sys
from xception_jax import native
compiler = sys.argv[1]
print(native.load("answer", lambda output: [compiler, str(output)], "kernels").answer())
"""


@pytest.fixture
def builder(cache, source, tmp_path):
    """Returns a function that starts a process which builds; its compiler is a shell with a child, as g++ has."""
    compiler = tmp_path / "c++"

    def start(seconds: float) -> subprocess.Popen:
        compiler.write_text(
            f'#!/bin/sh\necho $$ >> {tmp_path}/compilers\ntouch "$TMPDIR/temporary" "$1"\nsleep {seconds} &\n'
            f'echo $! >> {tmp_path}/compilers\nwait\nexec {COMPILER} -shared -fPIC {source} -o "$1"\n'
        )
        compiler.chmod(0o755)
        return subprocess.Popen(
            [sys.executable, "-c", BUILDER, compiler],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def compilers(tmp_path: Path) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(line) for line in (tmp_path / "compilers").read_text().split()]
    return []


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_builder_leaves_no_compiler_and_the_next_start_removes_its_files(
    builder, cache, tmp_path, load, number
):
    process = builder(600)
    wait_until(lambda: len(compilers(tmp_path)) == 2)
    process.send_signal(number)
    process.communicate()
    wait_until(lambda: not any(map(is_running, compilers(tmp_path))))
    assert not (cache / "answer.so").exists()
    assert load() == (42, ["building the kernels, once: 10 to 20 s ..."])
    assert not list(cache.glob("build-*"))


def test_leftovers_go_although_nothing_needs_to_be_built(load, cache):
    load()
    (cache / "build-of-a-killed-one").mkdir()
    (cache / "build-of-a-killed-one" / "half.so").touch()
    assert load() == (42, [])
    assert not list(cache.glob("build-*"))


def test_concurrent_builders_build_once(builder, tmp_path, cache):
    processes = [builder(1) for _ in range(3)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [output for output, _ in outputs] == ["42\n"] * 3, outputs
    assert len(compilers(tmp_path)) == 2  # one shell and its child
    assert not list(cache.glob("build-*"))


def test_a_library_survives_the_truncation_of_its_file(load, cache):
    """A mapped file that somebody truncates would end the process by SIGBUS."""
    load()
    library = native.load("answer", lambda output: ["false"], "kernels")
    os.truncate(cache / "answer.so", 0)
    assert library.answer() == 42


def test_the_usual_cache_directory(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert environment.cache_directory().is_relative_to(Path.home())
