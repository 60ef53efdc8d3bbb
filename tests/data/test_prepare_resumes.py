"""A preparation that is killed goes on from its finished shards, to the same bytes. Real processes and kill -9."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.data import prepare_program
from tests.data.small_imagenet import write_small_imagenet
from xception_jax.data.prepare import shards, sorting
from xception_jax.data.prepare.imagenet import TRAIN_ARCHIVE
from xception_jax.errors import StorageError


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Returns the archives. `prepare_program` changes these constants."""
    monkeypatch.setattr(sorting, "BUCKET_MEMORY", sorting.BUCKET_MEMORY)
    monkeypatch.setattr(shards.shard_utils.ShardConfig, "min_shard_size", None)
    return write_small_imagenet(tmp_path / "archives", train_per_class=12)


def start(source: Path, data_dir: Path) -> subprocess.Popen:
    command = [sys.executable, "tests/data/prepare_program.py", source, data_dir]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)


def finished_shards(data_dir: Path) -> set[Path]:
    """Returns the finished shards of the incomplete dataset."""
    return {path for path in data_dir.glob("imagenet2012/*.incomplete/*.array_record-*") if path.suffix != ".partial"}


def digests(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in path.rglob("*")}


def test_killed_between_two_shards(small, tmp_path, capsys):
    process = start(small, tmp_path / "killed")
    while len(finished_shards(tmp_path / "killed")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.kill()
    process.communicate()
    finished = {path.name: path.stat().st_mtime_ns for path in finished_shards(tmp_path / "killed")}
    killed = prepare_program.run(small, tmp_path / "killed")
    assert "files exist already" in capsys.readouterr().err
    assert digests(killed) == digests(prepare_program.run(small, tmp_path / "undisturbed"))
    assert finished == {name: (killed / name).stat().st_mtime_ns for name in finished}  # not written again
    assert [path.name for path in killed.parent.iterdir() if path != killed] == [".lock"]


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(4))
def test_a_preparation_that_is_killed_at_random_moments(small, tmp_path, seed):
    """Each process gets a little further than the one before, or begins to read again."""
    rng, kills = random.Random(seed), 0
    while True:
        process = start(small, tmp_path / "killed")
        try:
            _, errors = process.communicate(timeout=rng.uniform(0.5, 2) + kills / 2)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
    assert process.returncode == 0, errors
    assert kills
    (killed,) = (tmp_path / "killed/imagenet2012").glob("[0-9]*")
    assert digests(killed) == digests(prepare_program.run(small, tmp_path / "undisturbed"))


def interrupted(small: Path, data_dir: Path, monkeypatch, error: BaseException) -> None:
    """Begins a preparation that ends with an exception after two shards."""
    write, written = shards.write_array_record, []

    def fail(path, records):
        if len(written) == 2:
            raise error
        written.append(path)
        write(path, records)

    with monkeypatch.context() as context:
        context.setattr(shards, "write_array_record", fail)
        with pytest.raises(type(error)):
            prepare_program.run(small, data_dir)


def test_an_interrupt_keeps_what_is_finished_and_a_failure_frees_the_disk(small, tmp_path, monkeypatch):
    interrupted(small, tmp_path, monkeypatch, KeyboardInterrupt())
    assert len(finished_shards(tmp_path)) == 2
    interrupted(small, tmp_path, monkeypatch, StorageError("the disk is full", "here", "free some space"))
    assert [path.name for path in (tmp_path / "imagenet2012").iterdir()] == [".lock"]


@pytest.mark.faults
def test_other_archives_are_read_anew(small, tmp_path, monkeypatch, capsys):
    interrupted(small, tmp_path, monkeypatch, KeyboardInterrupt())
    os.utime(small / TRAIN_ARCHIVE, (0, 0))
    found = prepare_program.run(small, tmp_path)
    assert "exist already" not in capsys.readouterr().err
    assert digests(found) == digests(prepare_program.run(small, tmp_path / "undisturbed"))


@pytest.mark.faults
def test_more_threads_write_the_same(small, tmp_path, monkeypatch):
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(shards, "WRITERS", threads)
        found.append(digests(prepare_program.run(small, tmp_path / str(threads))))
    assert found[0] == found[1]
    assert len([name for name in found[0] if "train.array_record" in name]) > 3
