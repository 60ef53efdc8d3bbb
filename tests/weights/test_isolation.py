"""Tests that nothing in a weight file hangs, crashes or bloats the process that asks for it."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.numpy
from hostile import hanging, is_limited, readers, strings_that_share_one

from xception_jax.errors import BadDataError, ConfigError, InputMissingError, StorageError, UserError
from xception_jax.weights import hub, isolation, load_network, parse
from xception_jax.weights.content import decode
from xception_jax.weights.isolation import open_weights
from xception_jax.weights.limits import VARIABLE, Limits

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
SEEDS = Path(__file__).parents[1] / "data_of_strangers" / "weights"
READ = """
import sys
from pathlib import Path
from xception_jax.command_line import run_main
from xception_jax.weights.isolation import open_weights

def main():
    with open_weights(Path(sys.argv[1])) as reader:
        print(reader.content().format)

run_main(main)
"""


def read(path: Path):
    with open_weights(path) as reader:
        return reader.content()


def refusal(path: Path) -> str:
    with pytest.raises(BadDataError) as caught:
        read(path)
    assert len(str(caught.value).splitlines()) == 3
    if sys.platform == "linux":
        assert not readers(path)
    return str(caught.value)


def next_reader(path: Path, condition: Callable[[int], bool] = lambda process: True) -> int:
    """Waits for a process that reads the file and that a condition holds for."""
    deadline = time.monotonic() + 120
    while not (found := [each for each in readers(path) if condition(each)]):
        assert time.monotonic() < deadline, "no process reads the file"
        time.sleep(0.01)
    return found[0]


@pytest.fixture
def limited(monkeypatch):
    """Returns a function that replaces some of the limits."""
    usual = Limits.of

    def limit(**values: int) -> None:
        monkeypatch.setattr(Limits, "of", lambda size: dataclasses.replace(usual(size), **values))

    return limit


@pytest.fixture
def tree_file(tmp_path) -> Path:
    """A good file of 4 MB."""
    path = tmp_path / "x.weights.h5"
    with h5py.File(path, "w") as file:
        file["layers/conv2d/vars/0"] = np.random.default_rng(0).random((1, 1, 1000, 1000), np.float32)
        file["layers/conv2d/vars"].attrs["name"] = "conv"
    return path


def test_a_good_file_arrives_as_it_is(tree_file, tmp_path):
    here, there = parse.parse_file(tree_file), read(tree_file)
    assert there.format == here.format == "tree"
    assert [group[:3] for group in there.groups] == [("layers/conv2d", "conv", ["0"])]
    np.testing.assert_array_equal(there.groups[0].tensors[0], here.groups[0].tensors[0])
    there.groups[0].tensors[0][...] = 0  # as writable as arrays that NumPy allocates
    assert here.groups[0].tensors[0].any()


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f4", "f8", "i1", "u2", "i8", "?"])
def test_types_and_shapes_arrive(tmp_path, dtype):
    path = tmp_path / "x.h5"
    arrays = [np.arange(24).reshape(2, 3, 4).astype(dtype), np.ones((), dtype), np.ones((0, 3), dtype)]
    with h5py.File(path, "w") as file:
        for i, array in enumerate(arrays):
            file[f"a/vars/{i}"] = array
    for found, expected in zip(read(path).groups[0].tensors, arrays, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_a_system_without_memory_files(tree_file, monkeypatch):
    """macOS has none; a temporary file without a name takes its place."""
    monkeypatch.delattr(os, "memfd_create")
    assert read(tree_file).groups[0].tensors[0].shape == (1, 1, 1000, 1000)


@linux
def test_a_file_that_hangs_exceeds_its_processor_time(tmp_path, limited):
    hanging(tmp_path / "x.h5")
    limited(cpu=1)
    start = time.monotonic()
    assert "reading it takes more than 1 seconds of processor time" in refusal(tmp_path / "x.h5")
    assert time.monotonic() - start < 20


@linux
def test_a_file_that_hangs_exceeds_its_time(tmp_path, limited):
    hanging(tmp_path / "x.h5")
    limited(wall=1)
    assert "reading it takes more than 1 seconds\n" in refusal(tmp_path / "x.h5")


@linux
def test_a_file_that_takes_too_much_memory(tree_file, limited):
    limited(memory=3_000_000)
    assert "reading it takes more than 3,000,000 bytes of memory" in refusal(tree_file)


@linux
def test_libhdf5_that_takes_too_much_memory(tmp_path, limited):
    """A chunk of 40 MB, of which a small part is asked for by nobody: libhdf5 allocates it itself."""
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        noise = np.random.default_rng(0).random((1000, 10_000), np.float32)
        file.create_dataset("a/vars/0", data=noise, chunks=noise.shape, compression="gzip", compression_opts=1)
    limited(memory=50_000_000)
    assert "reading it takes more than 50,000,000 bytes of memory" in refusal(path)


@linux
@pytest.mark.parametrize("seed", sorted(SEEDS.iterdir()), ids=lambda path: path.name)
def test_what_fuzzing_found(seed, limited):
    """Each of these files hangs libhdf5 2.0; another release may find that they are damaged."""
    limited(cpu=1)
    refusal(seed)


def test_tensors_that_take_too_much(tree_file, limited):
    limited(tensors=1_000_000)
    refusal(tree_file)


STRINGS = """
import resource, sys
from xception_jax.errors import BadDataError
from xception_jax.weights import load_network
try:
    load_network(sys.argv[1])
except BadDataError as error:
    print(error.what, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, sep="\\n")
"""


def test_strings_are_counted_by_what_they_expand_to(tmp_path, run_python):
    strings_that_share_one(tmp_path / "x.h5")
    process = run_python("-c", STRINGS, tmp_path / "x.h5")  # whose only child is the one that reads the file
    what, kilobytes = process.stdout.splitlines()
    assert "strings in the attribute layer_names take more than 16,777,216 bytes" in what
    if sys.platform == "linux":
        assert int(kilobytes) < 1_000_000


def test_the_name_of_a_layer_is_counted_too(tree_file):
    with h5py.File(tree_file, "a") as file:
        file["layers/conv2d/vars"].attrs["name"] = "a" * 5_000
    assert "the attribute name takes 5,000 bytes" in refusal(tree_file)


@linux
@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGKILL])
def test_a_reader_that_crashes(tmp_path, signum):
    path = tmp_path / "x.h5"
    hanging(path)

    def crash() -> None:
        os.kill(next_reader(path, is_limited), signum)

    thread = threading.Thread(target=crash, daemon=True)
    thread.start()
    assert signum.name in refusal(path)
    thread.join()


@linux
def test_a_reader_that_is_killed_before_it_reads(tmp_path, monkeypatch):
    path = tmp_path / "x.h5"
    hanging(path)
    monkeypatch.setattr(isolation, "_CODE", "import time; 'weights.child'; time.sleep(600)")
    with open_weights(path) as reader:
        os.kill(next_reader(path), signal.SIGKILL)
        with pytest.raises(StorageError, match=r"does not start: it was ended by SIGKILL"):
            reader.content()
    assert not readers(path)


@linux
def test_a_reader_that_does_not_get_ready(tmp_path, monkeypatch):
    path = tmp_path / "x.h5"
    hanging(path)
    monkeypatch.setattr(isolation, "_START_SECONDS", 0.1)
    monkeypatch.setattr(isolation, "_CODE", "import time; 'weights.child'; time.sleep(600)")
    with open_weights(path) as reader:
        with pytest.raises(StorageError, match=r"does not start: it is not ready after 0\.1 seconds"):
            reader.content()
    assert not readers(path)


@linux
@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_signal_while_the_reader_hangs_ends_both(tmp_path, shared_environment, signum, code):
    path = tmp_path / "x.h5"
    hanging(path)
    before = set(os.listdir(tmp_path))
    environment = shared_environment | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", READ, path], env=environment, start_new_session=True) as process:
        next_reader(path, is_limited)
        os.killpg(process.pid, signum)  # as a terminal does
        assert process.wait(120) == code
    deadline = time.monotonic() + 120
    while readers(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not readers(path)
    assert set(os.listdir(tmp_path)) == before


@linux
def test_ctrl_c_of_a_command(tmp_path, shared_environment):
    path = tmp_path / "x.h5"
    hanging(path)
    command = [sys.executable, "-m", "xception_jax", "convert", path, tmp_path / "y.safetensors"]
    with subprocess.Popen(command, env=shared_environment, stderr=subprocess.PIPE) as process:
        next_reader(path, is_limited)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert not readers(path)


def test_a_file_that_vanishes_is_still_read(tree_file, tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    for path in (tree_file, tmp_path / "x.safetensors"):
        with open_weights(path) as reader:
            path.unlink()
            assert reader.content().groups


@pytest.mark.parametrize("size", [1_000, 5_000_000])
def test_a_file_that_changes_is_not(tree_file, size):
    with open_weights(tree_file) as reader:
        reader.hashes()
        os.truncate(tree_file, size)
        with pytest.raises(StorageError, match="changed while it was read"):
            reader.content()


def test_things_that_are_no_weight_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("/dev/zero", "device")
    Path("directory").mkdir()
    for name in ("pipe", "device", "directory", "/dev/zero", "/dev/null"):
        with pytest.raises(InputMissingError):
            load_network(name)
    Path("empty").touch()
    with pytest.raises(BadDataError):
        load_network("empty")


def test_a_pipe_beside_a_file_of_timm(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    assert hub.read(tmp_path / "config.json") is None


def test_limits_are_raised_by_a_variable(tree_file, monkeypatch):
    monkeypatch.setenv(VARIABLE, "10")
    assert Limits.of(0).cpu == 100
    read(tree_file)
    monkeypatch.setenv(VARIABLE, "1000000")
    read(tree_file)
    for value in ("0.5", "many", "nan", "1e300", "-1"):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(ConfigError, match=VARIABLE):
            read(tree_file)


def test_a_reader_that_does_not_start(tree_file, monkeypatch):
    for interpreter in ("/bin/false", "/nowhere/python"):
        monkeypatch.setattr(sys, "executable", interpreter)
        with pytest.raises(StorageError, match="does not start"):
            read(tree_file)


def test_code_beside_the_file_does_not_run(tree_file, monkeypatch):
    """The directory that a command runs in, such as an unpacked archive, may hold modules of any name."""
    monkeypatch.chdir(tree_file.parent)
    for module in ("h5py", "numpy", "json", "safetensors"):
        Path(f"{module}.py").write_text("open('opened', 'w')")
    monkeypatch.syspath_prepend("")
    read(tree_file)
    assert not Path("opened").exists()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"format": "tree", "groups": 3, "texts": {}},
        {"format": "tree", "groups": [["a", "", ["0"], [["<f4", [100]]]]], "texts": {}},
        {"format": "tree", "groups": [["a", "", [], [["<f4", [1]]]]], "texts": {}},
        {"format": "tree", "groups": [["a", "", ["0"], [["O", [1]]]]], "texts": {}},
        {"format": "tree", "groups": [["a", "", ["0"], [["<f4", [-1]]]]], "texts": {}},
        {"format": "tree", "groups": [["a", "", ["0"], [["<f4", [2**70]]]]], "texts": {}},
        {"format": "tree", "groups": [["a", 3, ["0"], [["<f4", [1]]]]], "texts": {}},
        {"format": ["tree"], "groups": [], "texts": {}},
        {"format": "tree", "groups": [], "texts": {"a": 1}},
    ],
)
def test_the_answer_of_a_reader_is_checked(answer):
    """Whatever took over the process that parses has no more than this to say."""
    with pytest.raises((ValueError, TypeError, KeyError, OverflowError)):
        decode(answer, bytearray(64), Limits.of(0))


def test_the_command_for_a_pickle_is_quoted(tmp_path):
    path = tmp_path / "it's $(here); x.pth"
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError) as caught:
        read(path)
    command = caught.value.fix.removeprefix("if you trust it: ")
    python, option, code, name = shlex.split(command)
    assert (python, option, name) == ("python", "-c", str(path))
    compile(code, "advice", "exec")
