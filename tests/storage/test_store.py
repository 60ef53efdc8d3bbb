"""The store on a disk, in gs:// and in s3://: the same cases for each, then what is wrong with disks and addresses."""

from __future__ import annotations

import concurrent.futures
import os
import sys

import pytest

from tests.storage.conftest import BRISK, run_child
from xception_jax.errors import ConfigError, WorkdirError
from xception_jax.storage import ABSENT, checkpoint_directory, is_url, join, open_store

# --- the same on each kind -------------------------------------------------------------------------------------------


def test_an_object_is_read_as_it_was_written(store):
    assert store.read("a/b") is None
    assert not store.exists("a/b")
    for content in (b"\0\xff first", b"", b"longer than the first", b"x" * 3_000_000):
        store.put("a/b", content)
        assert store.read("a/b") == content
        assert store.exists("a/b")
    store.put("text", "säge")
    assert store.read("text") == "säge".encode()


def test_a_listing_is_current_and_sorted(store):
    assert store.list() == []
    names = ["a", "a b", "a/b/c", "a/b0", "ab", "b/ä", "z"]
    for name in reversed(names):
        store.put(name, name) if name != "a" else store.put("a.txt", name)
    names = sorted(["a.txt", *names[1:]])
    assert store.list() == names
    assert store.list("a/") == ["a/b/c", "a/b0"]
    assert store.list("a/b/") == ["a/b/c"]
    assert store.list("b/ä") == ["b/ä"]
    store.delete("ab")
    assert "ab" not in store.list()
    store.delete("ab")
    store.delete_prefix("a/")
    assert store.list("a") == ["a b", "a.txt"]
    with pytest.raises(ValueError, match="whole directory"):
        store.delete_prefix("")


def test_a_prefix_is_renamed(store):
    for name in ("1/commit", "1/a/b", "10/a"):
        store.put(name, name)
    store.move_prefix("1/", "1.corrupt/", first="commit")
    assert store.list() == ["1.corrupt/a/b", "1.corrupt/commit", "10/a"]
    assert store.read("1.corrupt/a/b") == b"1/a/b"


def test_stores_of_one_bucket_are_apart(place, store):
    other = open_store(join(place, "sub"), "--workdir", patience=BRISK)
    neighbour = open_store(f"{place}2", "--workdir", patience=BRISK)
    other.put("x", "1")
    neighbour.put("y", "2")
    assert (store.list(), other.list(), neighbour.list()) == (["sub/x"], ["x"], ["y"])
    other.delete_prefix("x")
    assert neighbour.list() == ["y"]


def test_a_conditional_write_needs_the_generation(store):
    assert store.entry("x").generation == ABSENT
    first = store.put_if("x", "1", ABSENT)
    assert first
    assert store.put_if("x", "2", ABSENT) is None
    second = store.put_if("x", "2", first)
    assert second not in (None, first)
    assert store.put_if("x", "3", first) is None
    entry = store.entry("x")
    assert (entry.content, entry.generation) == (b"2", second)
    store.put("x", "4")
    assert store.put_if("x", "5", second) is None
    store.delete("x")
    assert store.put_if("x", "6", second) is None
    with pytest.raises(ValueError, match="unconditional"):
        store.put_if("x", "7", b"")
    assert store.read("x") is None


@pytest.mark.parametrize("begin", ["absent", "present"])
def test_one_of_many_conditional_writes_succeeds(store, begin):
    generation = ABSENT if begin == "absent" else store.put("x", "before")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda index: store.put_if("x", str(index), generation) is not None, range(8)))
    assert sum(won) == 1
    assert store.read("x") == str(won.index(True)).encode()


# --- a disk ----------------------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    store = open_store(str(tmp_path / "file"), "--workdir")
    with pytest.raises(WorkdirError, match="Not a directory"):
        store.put("x", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WorkdirError, match="Is a directory"):
        open_store(str(tmp_path), "--workdir").put("folder", "")


def test_a_directory_that_cannot_be_read_is_not_taken_for_empty(tmp_path):
    program = """
        import os, sys
        from xception_jax.errors import WorkdirError
        from xception_jax.storage import open_store
        import tensorstore
        os.setuid(65534)
        for operation in (lambda store: store.list(), lambda store: store.read("x"), lambda store: store.put("x", "")):
            try:
                print(operation(open_store(sys.argv[1], "--workdir")))
            except WorkdirError as error:
                print(error.what)
    """
    if os.getuid():
        pytest.skip("needs root to become another user")
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "x").write_text("")
    locked.chmod(0)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    process = run_child(program, str(locked))
    assert process.stdout.count("Permission denied") == 3, process.stdout + process.stderr


def test_a_full_disk_names_the_space_and_keeps_the_old_content(tmp_path):
    program = """
        import resource, signal, sys
        from xception_jax.storage import open_store
        store = open_store(sys.argv[1], "--workdir")
        store.put("x", "old")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            store.put("x", "new" * 1000)
        except Exception as error:
            print(error.exit_code, error)
        print(store.read("x"), store.list())
    """
    process = run_child(program, str(tmp_path))
    assert process.stdout.startswith("74 "), process.stderr
    assert "files limited to 1,000 bytes" in process.stdout
    assert "b'old' ['x']" in process.stdout


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "gs:/bucket/run",
        "gs:///run",
        "gs://",
        "gs://Bucket/run",
        "gs://bucket/../other",
        "gs://bucket/a//b",
        "gs://bucket/./a",
        "gs://bucket/a?b",
        "gs://bucket/a#1",
        "gs://bucket/a%20b",
        "gs://bucket/*",
        "gs://bucket/a\nb",
        "gs://bucket/a\x1b[0m",
        "gs://bucket/" + "a" * 701,
        "az://bucket/run",
        "http://host/run",
        "file:///tmp/run",
        "",
    ],
)
def test_an_address_that_is_not_valid_is_refused(url):
    for use in (open_store, checkpoint_directory):
        with pytest.raises(ConfigError) as error:
            use(url, "--workdir")
        assert error.value.exit_code == 78
        assert str(error.value).count("\n") == 2
        assert str(error.value).replace("\n", "").isprintable()


def test_addresses_survive_joining():
    assert join("gs://bucket", "run", "config.json") == "gs://bucket/run/config.json"
    assert join("gs://bucket/run/", "/checkpoints/") == "gs://bucket/run/checkpoints"
    assert join("gs://bucket/run", "") == "gs://bucket/run"
    assert join("/", "a") == "/a"
    assert join("relative", "a", "b") == "relative/a/b"
    assert is_url("gs://b/r")
    assert is_url("gs:/b/r")
    assert not is_url("/gs/b")
    assert not is_url("runs/a:b")


def test_the_directory_for_checkpoints(gcs, tmp_path, monkeypatch):
    import fsspec

    assert checkpoint_directory(str(tmp_path), "--workdir") == str(tmp_path)
    assert checkpoint_directory("gs://bucket/run/checkpoints/", "--workdir") == "gs://bucket/run/checkpoints"
    assert not fsspec.filesystem("gs").dircache.use_listings_cache
    with pytest.raises(WorkdirError, match="Orbax does not support it"):
        checkpoint_directory("s3://bucket/run", "--workdir")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(WorkdirError, match=r"not installed \(gcsfs\)"):
        checkpoint_directory("gs://bucket/run", "--workdir")
