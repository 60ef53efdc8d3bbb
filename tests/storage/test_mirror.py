"""The mirror: what a resumed run on another machine finds, what is written, and what stays where it is."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import pytest

from tests.storage.conftest import BUCKET, run_child
from tests.storage.gcs_objects import Objects
from tests.storage.gcs_requests import Fault
from xception_jax.errors import StorageError, WorkdirError
from xception_jax.logs.metrics_log import MetricsLog, read_metrics
from xception_jax.storage import Mirror, open_store

PULLED = ("metrics.jsonl", "tensorboard/")


def test_a_run_on_another_machine_finds_the_files(store):
    for number in range(3):
        with Mirror(store, PULLED) as mirror:
            path = mirror.directory / "metrics.jsonl"
            assert len(read_metrics(path)) == 2 * number
            log = MetricsLog(path, step=2 * number)
            log.write(2 * number + 1, "train", {"loss": 0.5})
            log.sync()
            mirror.push()
            log.write(2 * number + 2, "train", {"loss": 0.5})
            log.close()
            (mirror.directory / "profile" / "a").mkdir(parents=True, exist_ok=True)
            (mirror.directory / "profile" / "a" / "trace").write_bytes(bytes([number]))
            (mirror.directory / "tensorboard").mkdir(exist_ok=True)
            assert len(os.listdir(mirror.directory / "tensorboard")) == number
            (mirror.directory / "tensorboard" / f"events.{number}").write_text("")
        assert not mirror.directory.exists()
        entries = [json.loads(line) for line in store.read("metrics.jsonl").splitlines()]
        assert [entry["step"] for entry in entries] == list(range(1, 2 * number + 3))
        assert store.read("profile/a/trace") == bytes([number])


def test_only_files_that_changed_are_written(gcs, gs_store):
    with Mirror(gs_store) as mirror:
        for name in ("a", "b", "c"):
            (mirror.directory / name).write_text(name)
            os.utime(mirror.directory / name, (1, 1))
        mirror.push()
        assert [m.name for m in gcs.mutations] == ["run/a", "run/b", "run/c"]
        mirror.push()
        assert len(gcs.mutations) == 3
        with open(mirror.directory / "b", "a") as file:
            file.write("more")
        os.utime(mirror.directory / "c", (2, 2))  # touched, with the same content
        mirror.push()
        assert [m.name for m in gcs.mutations[3:]] == ["run/b"]
    with Mirror(gs_store, ["a", "b", "c", "missing"]) as mirror:
        assert sorted(os.listdir(mirror.directory)) == ["a", "b", "c"]
    assert len(gcs.mutations) == 4


def test_a_file_that_changes_within_a_tick_of_the_clock_is_written(gs_store):
    """The same size and, on many file systems, the same time."""
    now = time.time() + 3600  # however long the pushes take, the file does not count as settled
    with Mirror(gs_store) as mirror:
        for number in range(10):
            with open(mirror.directory / "x", "r+" if number else "w") as file:
                file.write(str(number))
            os.utime(mirror.directory / "x", (now, now))
            mirror.push()
            assert gs_store.read("x") == str(number).encode()


def test_each_prefix_of_the_writes_of_an_appended_file_is_a_beginning_of_it(gcs, gs_store):
    with Mirror(gs_store) as mirror:
        log = MetricsLog(mirror.directory / "metrics.jsonl")
        for step in range(5):
            log.write(step, "train", {"loss": float(step)})
            log.sync()
            mirror.push()
        log.close()
    recorded, whole = list(gcs.mutations), gs_store.read("metrics.jsonl")
    assert len(recorded) == 5
    for count in range(1, 6):
        gcs.objects = Objects([BUCKET], recorded[:count])
        content = gs_store.read("metrics.jsonl")
        assert whole.startswith(content)
        assert content.count(b"\n") == count


def test_only_what_is_asked_for_is_pulled(gs_store):
    for name in ("checkpoints/1/data", "other_run/metrics.jsonl", "metrics.jsonl", "metrics.jsonl2", "tensorboard/a"):
        gs_store.put(name, name)
    with Mirror(gs_store, PULLED) as mirror:
        assert sorted(os.listdir(mirror.directory)) == ["metrics.jsonl", "tensorboard"]


def test_links_pipes_and_temporary_files_are_not_mirrored(gcs, gs_store):
    with Mirror(gs_store) as mirror:
        (mirror.directory / "report.html.12.tmp").write_text("local")
        (mirror.directory / "link").symlink_to("/etc/hostname")
        (mirror.directory / "folder").symlink_to("/etc")
        os.mkfifo(mirror.directory / "pipe")
    assert not gcs.mutations


def test_files_that_no_object_can_be_named_after_are_left_out_with_one_warning(gs_store, caplog):
    with Mirror(gs_store) as mirror:
        for name in (b"a\nb", b"\xff", b"good"):
            with open(os.path.join(os.fsencode(mirror.directory), name), "w"):
                pass
        mirror.push()
    assert gs_store.list() == ["good"]
    assert len(caplog.messages) == 2
    assert all(message.isprintable() for message in caplog.messages)


def test_files_that_are_deleted_here_stay_in_the_store(gs_store):
    gs_store.put("a", "1")
    with Mirror(gs_store, ["a"]) as mirror:
        (mirror.directory / "a").unlink()
    assert gs_store.read("a") == b"1"


@pytest.mark.parametrize(
    "name",
    ["../../outside", "a/../../../outside", "/outside", "a//b", "..", "./a", "a" * 300, "folder/", "a\0b", "\ud7ff/.."],
)
def test_names_that_are_no_files_are_left_alone(gcs, gs_store, name, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gcs.objects.put(BUCKET, f"run/profile/{name}", b"hostile", {})
    gcs.objects.put(BUCKET, "run/profile/good", b"good", {})
    with Mirror(gs_store, ["profile/"]) as mirror:
        assert os.listdir(mirror.directory) == ["profile"]
        assert os.listdir(mirror.directory / "profile") == ["good"]
        assert os.listdir(mirror.directory.parent) == ["run"]
        above = mirror.directory.parents[1]
        assert sorted(os.listdir(above)) == ["alive", "directory"]
        assert os.listdir(tmp_path) == [above.name]
    assert len(gcs.mutations) == 2


@pytest.mark.parametrize("name", ["alive", "directory", "画" * 90])
def test_a_run_may_have_any_name(gcs, gs_place, name):
    with Mirror(open_store(f"{gs_place}/{name}", "--workdir")) as mirror:
        (mirror.directory / "a").write_bytes(b"x")
    assert gcs.mutations


@pytest.mark.parametrize("names", list(itertools.permutations(["a", "a/b"])))
def test_a_name_that_is_a_file_and_a_directory_is_mirrored_once(gcs, gs_store, names):
    for name in names:
        gcs.objects.put(BUCKET, f"run/{name}", b"x", {})
    with Mirror(gs_store, names) as mirror:
        assert (mirror.directory / names[0]).read_bytes() == b"x"
    assert len(gcs.mutations) == 2


def test_a_failed_push_is_repeated_by_the_next(gcs, gs_store):
    with Mirror(gs_store) as mirror:
        for name in ("a", "b"):
            (mirror.directory / name).write_text(name)
        gcs.control = lambda request: Fault(status=503) if request.query.get("name") == "run/b" else None
        with pytest.raises(StorageError):
            mirror.push()
        gcs.control = lambda request: None
    assert gs_store.list() == ["a", "b"]


@pytest.mark.parametrize(("status", "expected"), [(503, StorageError), (403, WorkdirError)])
def test_a_failed_push_at_the_end_does_not_hide_another_error(gcs, gs_store, status, expected):
    def run(error: Exception | None = None) -> None:
        gcs.control = lambda request: None
        with Mirror(gs_store) as mirror:
            mirrors.append(mirror.directory)
            (mirror.directory / "a").write_text("a")
            gcs.control = lambda request: Fault(status=status)
            if error is not None:
                raise error

    mirrors: list[Path] = []
    with pytest.raises(expected):
        run()
    with pytest.raises(KeyError):
        run(KeyError())
    assert not any(directory.exists() for directory in mirrors)


def test_a_full_local_disk_is_named(gs_store):
    gs_store.put("a", "x" * 5000)
    program = """
        import resource, signal
        from xception_jax.storage import Mirror, open_store
        store = open_store("gs://bucket/run", "--workdir")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            Mirror(store, ["a"]).__enter__()
        except Exception as error:
            print(error.exit_code, error)
    """
    process = run_child(program)
    assert process.stdout.startswith("74 "), process.stderr
    assert "TMPDIR" in process.stdout


def test_the_directory_of_a_killed_process_is_deleted_and_no_other(gs_store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
        import os, signal, sys, tempfile
        from xception_jax.storage import Mirror, open_store
        tempfile.tempdir = sys.argv[1]
        mirror = Mirror(open_store(sys.argv[2], "--workdir"))
        (mirror.directory / "metrics.jsonl").write_text("line")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run_child(program, str(tmp_path), gs_store.root)
    (killed,) = tmp_path.iterdir()
    (tmp_path / "xception_jax.mine").mkdir()
    with Mirror(gs_store):
        assert killed.exists()  # it may be of a process that is about to lock it
    os.utime(killed / "alive", (0, 0))
    with Mirror(gs_store) as living:
        os.utime(living.directory.parents[1] / "alive", (0, 0))
        with Mirror(gs_store):
            assert living.directory.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["xception_jax.mine"]


def leave(mirror: Mirror, error: Exception) -> None:
    """Writes a file into a mirror and leaves its context with an error."""
    with mirror:
        (mirror.directory / "metrics.jsonl").write_text("line")
        raise error


def test_nothing_is_pushed_if_the_store_has_just_failed(gcs, gs_store):
    """It would take as long again."""
    with pytest.raises(StorageError, match="no answer"):
        leave(Mirror(gs_store), StorageError("no answer", f"{gs_store.root}/checkpoints/10", "run it again"))
    assert not gcs.mutations


def test_who_may_not_push_is_told_once(gcs, gs_store, caplog):
    def refuse() -> None:
        raise WorkdirError("another run has taken over", gs_store.root, "stop")

    with pytest.raises(WorkdirError):
        leave(Mirror(gs_store, permit=refuse), WorkdirError("another run has taken over", gs_store.root, "stop"))
    assert not gcs.mutations
    assert not caplog.records


def test_who_is_taken_over_between_two_files_pushes_no_more(gcs, gs_store):
    allowed = iter([None, None])  # once at the beginning, once for the first file

    def refuse() -> None:
        if next(allowed, "taken over"):
            raise WorkdirError("another run has taken over", gs_store.root, "stop")

    def push() -> None:
        with Mirror(gs_store, permit=refuse) as mirror:
            for name in ("a", "b", "c"):
                (mirror.directory / name).write_text(name)
            mirror.push()

    with pytest.raises(WorkdirError):
        push()
    assert [mutation.name for mutation in gcs.mutations] == ["run/a"]
