"""Tests that datasets and folders from strangers end with three lines, and run no code."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import google_crc32c
import pytest
from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

from tests.data.conftest import write_images
from tests.data.small_imagenet import jpeg, photograph
from tests.data.test_image_folder import write_folder
from tests.data.test_prepare import opened, prepare
from xception_jax.data import metadata, shards
from xception_jax.data.datasets import find_class_names
from xception_jax.data.prepare.shards import write_array_record
from xception_jax.data.prepare.tfrecord import read_tfrecord
from xception_jax.data.sources import TfdsSource, check_labels
from xception_jax.errors import BadDataError, DeviceMemoryError, StorageError, UserError

ROOT = Path(__file__).parents[2]
IMAGE = jpeg(photograph(0))


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Returns the directory of a dataset with six images of five classes."""
    return write_images(tmp_path, "photos", [IMAGE] * 6)


def changed(path: Path, *keys: str | int, to: object) -> None:
    """Changes one value in a JSON file."""
    value = json.loads(path.read_text())
    place = value
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(value))


INFO, FEATURES = "dataset_info.json", "features.json"
SPLIT = ("splits", 0)
LABEL = ("featuresDict", "features", "label")


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        (INFO, (*SPLIT, "shardLengths"), ["-1"]),
        (INFO, (*SPLIT, "shardLengths"), [str(2**63)]),
        (INFO, (*SPLIT, "shardLengths"), [str(2**63 - 1), "1"]),
        (INFO, (*SPLIT, "shardLengths"), ["5"]),
        (INFO, (*SPLIT, "shardLengths"), ["7"]),
        (INFO, (*SPLIT, "shardLengths"), "six"),
        (INFO, (*SPLIT, "shardLengths"), {"0": 6}),
        (INFO, (*SPLIT, "shardLengths"), [[6]]),
        (INFO, (*SPLIT, "name"), "../train"),
        (INFO, (*SPLIT, "name"), 3),
        (INFO, (*SPLIT, "filepathTemplate"), "../{DATASET}"),
        (INFO, (*SPLIT, "filepathTemplate"), "{DATASET:>1000000000}"),
        (INFO, (*SPLIT, "filepathTemplate"), "{DATASET.__class__}"),
        (INFO, ("splits",), [None]),
        (INFO, ("splits",), "train"),
        (INFO, ("name",), "../../photos"),
        (INFO, ("name",), ".."),
        (INFO, ("configName",), ".."),
        (INFO, ("configName",), "a/../../../b"),
        (INFO, ("config_name",), "a/../../../b"),  # the names of the protocol buffer are read as well
        (INFO, ("name",), None),
        (INFO, ("version",), "none"),
        (INFO, ("version",), [1]),
        (INFO, ("fileFormat",), "zip"),
        (FEATURES, (*LABEL, "classLabel", "numClasses"), str(10**15)),
        (FEATURES, (*LABEL, "classLabel", "numClasses"), "-5"),
        (FEATURES, (*LABEL, "classLabel", "numClasses"), "x"),
        (FEATURES, (*LABEL, "pythonClassName"), "this.Thing"),
        (FEATURES, (*LABEL, "pythonClassName"), "tensorflow_datasets.core.features.nothing.Thing"),
        (FEATURES, (*LABEL, "pythonClassName"), "nothing"),
        (FEATURES, (*LABEL, "pythonClassName"), 5),
        (FEATURES, ("pythonClassName",), "tensorflow_datasets.core.features.image_feature.Image"),
        (FEATURES, ("featuresDict",), []),
        (FEATURES, ("featuresDict", "features"), {}),
    ],
)
def test_a_hostile_description_is_three_lines(dataset, file, keys, value):
    changed(dataset / file, *keys, to=value)
    with pytest.raises(UserError) as raised:
        TfdsSource(dataset, "train")
    assert raised.value.exit_code == 65
    assert len(str(raised.value).split("\n")) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("filepath_template", "../{DATASET}"),
        ("filepath_template", "{DATASET:>1000000000}"),
        ("shard_lengths", ["-1"]),
        ("shard_lengths", [str(2**63 - 1), "1"]),
    ],
)
def test_the_other_spelling_of_a_field_is_checked_too(dataset, field, value):
    ours = {"filepath_template": "filepathTemplate", "shard_lengths": "shardLengths"}[field]
    info = json.loads((dataset / INFO).read_text())
    del info["splits"][0][ours]
    info["splits"][0][field] = value
    (dataset / INFO).write_text(json.dumps(info))
    with pytest.raises(BadDataError, match="the description of the dataset is damaged"):
        TfdsSource(dataset, "train")


@pytest.mark.parametrize("file", [INFO, FEATURES])
@pytest.mark.parametrize(
    "content", [b"", b"null", b"[1]", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"{}", b"NaN", b"9" * 5000]
)
def test_a_description_that_is_no_description_is_three_lines(dataset, file, content, data, tmp_path):
    (dataset / file).write_bytes(content)
    with pytest.raises(BadDataError) as raised:
        TfdsSource(dataset, "train")
    assert len(str(raised.value).split("\n")) == 3
    with pytest.raises(BadDataError) if file == FEATURES else pytest.raises((BadDataError, AssertionError)):
        assert find_class_names(data.replace(name="photos", data_dir=str(tmp_path))) is None


def test_no_module_is_imported_because_a_dataset_names_it(dataset, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("import os; os.environ['PLANTED'] = '1'")
    monkeypatch.syspath_prepend(tmp_path)
    for name, keys in ((FEATURES, (*LABEL, "pythonClassName")), (FEATURES, (*LABEL, "type"))):
        changed(dataset / name, *keys, to="planted.Label")
        with pytest.raises(BadDataError, match=r"planted\.Label', which is not one of TFDS"):
            TfdsSource(dataset, "train")
    changed(dataset / INFO, "features", to={"pythonClassName": "planted.Label"})
    with pytest.raises(BadDataError, match="planted"):
        TfdsSource(dataset, "train")
    assert "PLANTED" not in os.environ


def test_a_description_of_gigabytes_is_not_read(dataset, monkeypatch):
    monkeypatch.setattr(metadata, "MAX_BYTES", 1000)
    (dataset / "label.labels.txt").write_text("x\n" * 501)
    with pytest.raises(BadDataError, match="more than 1,000 bytes"):
        TfdsSource(dataset, "train")


@pytest.mark.parametrize(
    "names",
    [
        "a\nb\nc\nd\ne\nf",
        "a\nb\nc\nd",
        "a\nb\nc\nd\n\x1b[31m",
        "a\na\nb\nc\nd",
        "a\nb\n\x85\nd\ne",
        b"\xff\nb\nc\nd\ne",
    ],
)
def test_class_names_that_do_not_fit_are_refused(dataset, names):
    (dataset / "label.labels.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
    with pytest.raises(BadDataError):
        TfdsSource(dataset, "train")


@pytest.mark.parametrize("file", [INFO, FEATURES, "label.labels.txt"])
@pytest.mark.parametrize("kind", ["device", "pipe", "directory"])
def test_a_description_without_an_end_is_not_read(dataset, file, kind):
    path = dataset / file
    path.unlink(missing_ok=True)
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    command = [sys.executable, "-c", LIMITED, str(dataset), "3000"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == BadDataError.exit_code, result.stderr
    assert str(path) in result.stderr


@pytest.mark.parametrize("names", ["caf\xe9\ncafe\u0301", "cat\ncat\u200b", "\u202edog\ndog"])
def test_classes_that_look_the_same_are_refused(dataset, names):
    (dataset / "label.labels.txt").write_text(f"{names}\na\nb\nc\n")
    with pytest.raises(BadDataError, match="two classes have names that look the same") as raised:
        TfdsSource(dataset, "train")
    assert ascii(names.split("\n")[1]) in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"x", bytes(65536), bytes(200_000)])
def test_a_shard_that_is_none_is_named(dataset, content):
    (shard,) = dataset.glob("*.array_record*")
    shard.write_bytes(content)
    with pytest.raises(BadDataError) as raised:
        TfdsSource(dataset, "train")
    assert raised.value.where == str(shard)


def test_a_truncated_shard_is_named(dataset):
    (shard,) = dataset.glob("*.array_record*")
    content = shard.read_bytes()
    for kept in (64, 65536, 65537, len(content) - 1):
        shard.write_bytes(content[:kept])
        with pytest.raises(BadDataError):
            TfdsSource(dataset, "train")


def test_a_shard_that_cannot_be_opened_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TIMEOUT", 0.5)
    os.mkfifo(tmp_path / "shard")
    with pytest.raises(StorageError, match=r"cannot be opened within 0\.5 seconds"):
        shards._count_records(str(tmp_path / "shard"))
    threading.Thread(target=(tmp_path / "shard").write_bytes, args=(b"",), daemon=True).start()


@pytest.mark.parametrize(
    "record",
    [
        {"image": {"bytes_list": [b"x"]}},
        {"label": {"int64_list": [1]}},
        {"image": {"int64_list": [1]}, "label": {"int64_list": [1]}},
        {"image": {"bytes_list": [b"x", b"y"]}, "label": {"int64_list": [1]}},
        {"image": {"bytes_list": [b"x"]}, "label": {"int64_list": [1, 2]}},
        {"image": {"bytes_list": [b"x"]}, "label": {"bytes_list": [b"one"]}},
        {"image": {"bytes_list": [b"x"]}, "label": {"int64_list": [2**63 - 1]}},
    ],
)
def test_a_record_with_other_features_is_named(dataset, record):
    example = {name: {kind: {"value": values} for kind, values in of.items()} for name, of in record.items()}
    (shard,) = dataset.glob("*.array_record*")
    write_array_record(shard, [Example(features={"feature": example}).SerializeToString()] * 6)
    with pytest.raises(BadDataError) as raised:
        check_labels(TfdsSource(dataset, "train"))
    assert len(str(raised.value).split("\n")) == 3


LIMITED = """
import resource, sys
from pathlib import Path
from xception_jax.data.sources import TfdsSource
from xception_jax.errors import UserError
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[2]) << 20), -1))
try:
    print(len(TfdsSource(Path(sys.argv[1]), "train")))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("mebibytes", [50, 600, 1200])
def test_too_little_address_space_ends_with_71_instead_of_waiting_for_ever(dataset, mebibytes):
    command = [sys.executable, "-c", LIMITED, str(dataset), str(mebibytes)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == DeviceMemoryError.exit_code, result.stderr
    assert "cannot start its threads" in result.stderr
    assert "ulimit -v" in result.stderr


def test_a_limit_of_threads_ends_with_71_instead_of_waiting_for_ever(dataset, monkeypatch):
    """The library waits for a thread that it cannot create. Limits of a user do not bind root, so this is played."""
    monkeypatch.setattr(shards, "ArrayRecordReader", lambda *_, **__: threading.Event().wait())
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name != "open shard":
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    (shard,) = dataset.glob("*.array_record*")
    with pytest.raises(DeviceMemoryError, match="cannot start its threads"):
        shards._count_records(str(shard))


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@pytest.mark.parametrize("length", [1, 9, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_a_tfrecord_length_with_a_correct_checksum_is_not_believed(tmp_path, length):
    size = struct.pack("<Q", length)
    (tmp_path / "a.tfrecord").write_bytes(size + masked(size) + b"12345678"[: min(length, 8)])
    with pytest.raises(BadDataError, match=r"damaged or truncated|ends after the file"):
        list(read_tfrecord(tmp_path / "a.tfrecord"))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", " ", "a\x85b", "a\u2028b", os.fsdecode(b"caf\xe9")])
def test_a_folder_that_cannot_be_a_class_is_refused(tmp_path, name):
    folder = write_folder(tmp_path / "pictures", {"good/1.jpg": IMAGE, f"{name}/1.jpg": IMAGE})
    with pytest.raises(BadDataError) as raised:
        prepare("image_folder", "--source", folder, "--name", "pictures", "--data_dir", tmp_path / "out")
    lines = str(raised.value).split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert not list((tmp_path / "out").glob("*/1*"))


def test_file_names_that_are_no_utf8_work(tmp_path, data, capsys):
    files = {os.fsdecode(b"a/caf\xe9.jpg"): IMAGE, "b/1.jpg": IMAGE, os.fsdecode(b"b/\xff.txt"): b""}
    folder = write_folder(tmp_path / "pictures", files)
    prepare("image_folder", "--source", folder, "--name", "pictures", "--data_dir", tmp_path)
    assert r"b/\xff.txt" in capsys.readouterr().out
    assert opened(data, tmp_path, "pictures").column("file_name") == [r"a/caf\xe9.jpg", "b/1.jpg"]
    (folder / os.fsdecode(b"b/\xfe.jpg")).write_bytes(b"damaged")
    arguments = ["image_folder", "--source", folder, "--name", "pictures", "--data_dir", tmp_path, "--overwrite"]
    with pytest.raises(BadDataError) as raised:
        prepare(*arguments)
    assert raised.value.where.endswith(r"b/\xfe.jpg")
    prepare(*arguments, "--skip_damaged", "--splits", "train=1")
    out = capsys.readouterr().out
    assert r"b/\xfe.jpg" in out
    out.encode()


def test_limits_of_images_are_options(tmp_path):
    folder = write_folder(tmp_path / "pictures", {"a/1.jpg": IMAGE})
    arguments = ["image_folder", "--source", folder, "--name", "pictures", "--data_dir", tmp_path]
    with pytest.raises(BadDataError, match="above max_pixels=50"):
        prepare(*arguments, "--max_pixels", 50)
    prepare(*arguments)
