"""Nothing is left behind by killed writers, and nothing that is not ours is deleted or overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from xception_jax.config import default_config, resolve
from xception_jax.errors import WorkdirError
from xception_jax.files import remove_leftovers, write_atomically
from xception_jax.training.workdir import open_workdir, write_config

CONFIG = resolve(default_config())

# Stops between the last byte and the rename: 'stopped' means that the temporary file is there and locked.
WRITER = """
    import os, sys
    from xception_jax.files import write_atomically
    replace = os.replace
    def stop(*arguments):
        print("stopped", flush=True)
        sys.stdin.read()
        replace(*arguments)
    os.replace = stop
    write_atomically(sys.argv[1], "text")
"""


def writer(path: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "stopped\n"
    return process


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def open_and_close(path: Path) -> None:
    with open_workdir(path, CONFIG):
        write_config(path, CONFIG)


@pytest.mark.parametrize(
    "name",
    [
        "report.html",
        "predictions_test.npz",
        "config.json",
        "checkpoints/run_id",
        "checkpoints/20/manifest.json",
        "figures/curves.svg",
        "an export with a long name" + 20 * "é" + ".onnx",
    ],
)
def test_file_of_a_killed_writer_goes_at_the_next_start(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("before")
    kill(writer(path))
    assert len(os.listdir(path.parent)) == 2
    if name == "config.json":
        path.unlink()
    open_and_close(tmp_path)
    assert not [file for file in tmp_path.rglob("*") if file.name.endswith(".tmp")]
    assert name == "config.json" or path.read_text() == "before"


def test_file_of_a_living_writer_stays_also_if_it_is_old(tmp_path):
    process = writer(tmp_path / "report.html")
    (temporary,) = tmp_path.iterdir()
    os.utime(temporary, (1, 1))
    open_and_close(tmp_path)
    assert temporary.exists()
    process.communicate("go on")
    assert process.returncode == 0
    assert (tmp_path / "report.html").read_text() == "text"


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_files_of_earlier_versions(tmp_path):
    dead, living = dead_pid(), os.getpid()
    gone = [f"report.html.{dead}.tmp", f"predictions_test.npz.{dead}.tmp", f"manifest.json.{dead}.tmp"]
    kept = [
        f"report.html.{living}.tmp",  # may be being written
        f"thesis.tex.{dead}.tmp",
        f"{dead}.tmp",
        "notes.tmp",
        f"report.html.{dead}.tmp.bak",
        f"report.html.{dead}.tmpx",
        f"my report.html.{dead}.tmp",
        f"x.{dead}.0123456789abcdef",
        f"report.html.{10**30}x.tmp",
    ]
    for name in gone + kept:
        (tmp_path / name).write_text("text")
    (tmp_path / "target").write_text("text")
    (tmp_path / f"report.html.{dead + 1}.tmp").symlink_to("target")
    (tmp_path / f"config.json.{dead}.tmp").mkdir()
    os.mkfifo(tmp_path / f"cells.csv.{dead}.tmp")
    before = set(os.listdir(tmp_path))
    remove_leftovers([tmp_path, tmp_path / "none", tmp_path / "target"])
    assert before - set(os.listdir(tmp_path)) == set(gone)
    os.utime(tmp_path / kept[0], (1, 1))  # the process with this number started later
    remove_leftovers([tmp_path])
    assert not (tmp_path / kept[0]).exists()


def test_number_of_the_writer_used_again(tmp_path):
    temporary = tmp_path / f"report.html.{os.getpid()}.0123456789abcdef.tmp"
    temporary.write_text("text")
    remove_leftovers([tmp_path])
    assert temporary.exists()  # just created: its writer may not have locked it yet
    os.utime(temporary, (time.time() - 100,) * 2)
    remove_leftovers([tmp_path])
    assert not temporary.exists()
    huge = tmp_path / f"report.html.{10**30}.0123456789abcdef.tmp"
    huge.write_text("text")
    remove_leftovers([tmp_path])
    assert not huge.exists()


def test_other_processes_hold_no_lock_and_delete_nothing(tmp_path):
    process = writer(tmp_path / "report.html")
    kill(process)
    with open_workdir(tmp_path, CONFIG, primary=False):
        assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_atomic_write_leaves_nothing(tmp_path):
    write_atomically(tmp_path / "a", "text")
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "directory", "text")
    assert sorted(os.listdir(tmp_path)) == ["a", "directory"]


# --- links and special files -----------------------------------------------------------------------------------------


def refused(path: Path, match: str) -> WorkdirError:
    with pytest.raises(WorkdirError, match=match) as caught:
        open_and_close(path)
    assert caught.value.exit_code == 73
    assert len(str(caught.value).splitlines()) == 3
    return caught.value


@pytest.mark.parametrize("name", ["lock", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("target", ["thesis", "nothing", "lock"])
def test_links_are_refused(tmp_path, name, target):
    thesis, workdir = tmp_path / "thesis", tmp_path / "run"
    thesis.write_text("ten years of work")
    workdir.mkdir()
    (workdir / name).symlink_to(Path("..") / target)
    assert refused(workdir, f"{name} must be a regular file, but there is a link").where == str(workdir / name)
    assert thesis.read_text() == "ten years of work"
    assert sorted(os.listdir(tmp_path)) == ["run", "thesis"]


@pytest.mark.parametrize("name", ["lock", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_special_files_are_refused_and_do_not_block(tmp_path, name, make):
    make(tmp_path / name)
    refused(tmp_path, f"{name} must be a regular file, but there is something else")


def test_another_name_of_the_lock_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").write_text("ten years of work")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "thesis", tmp_path / "run" / "lock")
    with open_workdir(tmp_path / "run", CONFIG):
        refused(tmp_path / "run", "another run holds the work directory")
    assert (tmp_path / "thesis").read_text() == "ten years of work"


def test_checkpoints_must_be_a_directory(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    refused(tmp_path, "checkpoints must be a directory, but there is something else")
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "checkpoints").symlink_to("nothing")
    refused(tmp_path, "checkpoints must be a directory, but there is a link")
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "large disk").mkdir()
    (tmp_path / "checkpoints").symlink_to("large disk")
    open_and_close(tmp_path)


def test_the_work_directory_may_be_a_link(tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "runs").symlink_to("large disk")
    open_and_close(tmp_path / "runs" / "a")
    assert sorted(os.listdir(tmp_path / "large disk" / "a")) == ["config.json", "lock"]


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "private.json"
    write_atomically(path, "1")
    path.chmod(0o600)
    write_atomically(path, "2")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("2", 0o600)
