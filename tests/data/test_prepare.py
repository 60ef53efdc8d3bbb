"""Tests the writer, Fashion-MNIST, TFRECORD copies and the command; ImageNet and folders are in separate files."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.conftest import run_command
from tests.data.conftest import write_images
from tests.data.small_imagenet import jpeg, photograph
from xception_jax.cli import prepare as command
from xception_jax.config import DataConfig
from xception_jax.data import images
from xception_jax.data.datasets import DATASETS, SHIPPED, open_dataset
from xception_jax.data.prepare import fashion_mnist, names, photographs, shards, sorting, tfrecord, writer
from xception_jax.data.sources import check_labels, is_complete
from xception_jax.errors import BadDataError, InputMissingError, StorageError, UsageError

SIZES = {
    "astronaut": (512, 512), "chelsea": (300, 451), "china": (427, 640), "coffee": (400, 600), "flower": (427, 640),
    "rocket": (427, 640),
}  # fmt: skip


prepare = partial(run_command, command)


def opened(data: DataConfig, data_dir: Path, name: str, split: str = "train"):
    return open_dataset(data.replace(data_dir=str(data_dir), name=name), split)


# --- the writer ---------------------------------------------------------------------------------------------------


def numbered(count: int, size: int = 10) -> writer.Dataset:
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=9)}
    )
    examples = ((str(n), {"image": bytes([n % 251]) * size, "label": n * 9 // count}) for n in range(count))
    return writer.Dataset("numbered", features, {"train": examples}, "Numbers.")


def records(path: Path) -> list[tuple[bytes, int]]:
    source = tfds.builder_from_directory(os.fspath(path)).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    return [(record["image"], record["label"]) for record in source]


def test_records_that_exceed_the_memory_come_out_the_same(tmp_path, monkeypatch):
    in_memory = records(writer.write_dataset(numbered(700), tmp_path / "a").path)
    monkeypatch.setattr(sorting, "BUCKET_MEMORY", 1000)
    spilled = writer.write_dataset(numbered(700), tmp_path / "b").path
    assert records(spilled) == in_memory
    assert sorted(image[0] for image, _ in in_memory) == sorted(n % 251 for n in range(700))
    assert not [path for path in spilled.iterdir() if "unsorted" in path.name]


def test_a_slice_of_a_split_is_a_random_sample(tmp_path):
    labels = [label for _, label in records(writer.write_dataset(numbered(2000), tmp_path).path)]
    for part in (labels[:200], labels[-200:]):  # the input is sorted by label
        assert np.bincount(part, minlength=9).min() > 8


def test_large_datasets_have_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.shard_utils.ShardConfig, "min_shard_size", 2000)
    path = writer.write_dataset(numbered(300), tmp_path).path
    files = sorted(file.name for file in path.glob("*.array_record-*"))
    assert files[-1] == "numbered-train.array_record-00007-of-00008"
    assert len(files) == 8
    assert len(records(path)) == 300


def test_a_key_that_comes_twice_is_refused(tmp_path):
    dataset = numbered(3)
    examples = list(dataset.splits["train"])
    twice = writer.Dataset("twice", dataset.features, {"train": [*examples, examples[0]]}, "")
    with pytest.raises(BadDataError, match="the same name, 0"):
        writer.write_dataset(twice, tmp_path)
    assert [path.name for path in (tmp_path / "twice").iterdir()] == [".lock"]


def test_a_label_out_of_range_is_never_written(tmp_path):
    dataset = numbered(3)
    wrong = [("0", {"image": b"", "label": 9})]
    with pytest.raises(BadDataError, match="label 9"):
        writer.write_dataset(writer.Dataset("wrong", dataset.features, {"train": wrong}, ""), tmp_path)


def test_a_finished_dataset_is_left_alone_unless_it_is_to_be_overwritten(tmp_path):
    first = writer.write_dataset(numbered(5), tmp_path)
    again = writer.write_dataset(numbered(6), tmp_path)
    assert (first.already_there, again.already_there) == (False, True)
    assert again.num_examples == {"train": 5}
    assert writer.write_dataset(numbered(6), tmp_path, overwrite=True).num_examples == {"train": 6}
    assert len(records(first.path)) == 6


def test_a_failure_leaves_nothing_that_looks_complete(tmp_path):
    def broken():
        yield from list(numbered(3).splits["train"])
        raise KeyboardInterrupt

    dataset = writer.Dataset("broken", numbered(1).features, {"train": broken()}, "")
    with pytest.raises(KeyboardInterrupt):
        writer.write_dataset(dataset, tmp_path)
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [".lock"]


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError) as error:
        writer.write_dataset(numbered(3), tmp_path / "file")
    assert len(str(error.value).splitlines()) == 3


def test_who_waits_for_another_process_says_so(tmp_path, capsys):
    (tmp_path / "numbered").mkdir()
    with open(tmp_path / "numbered" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=writer.write_dataset, args=(numbered(3), tmp_path), daemon=True)
        waiting.start()
        told, deadline = "", time.monotonic() + 60
        while "waiting for another process that prepares numbered" not in told:
            assert time.monotonic() < deadline
            told += capsys.readouterr().err
    waiting.join(60)
    assert is_complete(next((tmp_path / "numbered").glob("1.*")))


def test_a_full_disk_is_a_storage_error(tmp_path):
    """A limit on file sizes replaces the full disk: the system refuses the same write."""
    code = (
        "import resource, signal, pathlib, sys; from tests.data.test_prepare import numbered\n"
        "from xception_jax.data.prepare import writer; from xception_jax.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: writer.write_dataset(numbered(500, size=1000), pathlib.Path(sys.argv[1]))\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 74, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert [path.name for path in (tmp_path / "numbered").iterdir()] == [".lock"]


@pytest.mark.parametrize("examples", [500, 2000])
def test_kill_9_in_the_middle_then_run_again(tmp_path, examples):
    code = (
        "import sys, pathlib, time; from xception_jax.data.prepare import sorting, writer\n"
        "from tests.data.test_prepare import numbered\n"
        "dataset = numbered(4000); sorting.BUCKET_MEMORY = 2000\n"
        "def stopping(examples):\n"
        "    for number, example in enumerate(examples):\n"
        f"        if number == {examples}: print('middle', flush=True); time.sleep(3600)\n"
        "        yield example\n"
        "train = stopping(list(dataset.splits['train']))\n"
        "dataset = writer.Dataset('numbered', dataset.features, {'train': train}, '')\n"
        "writer.write_dataset(dataset, pathlib.Path(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"middle\n", process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    target = tmp_path / "numbered" / "1.0.0"
    assert not target.exists()
    assert writer.write_dataset(numbered(4000), tmp_path).num_examples == {"train": 4000}
    assert len(records(target)) == 4000
    assert sorted(path.name for path in target.parent.iterdir()) == [".lock", "1.0.0"]


# --- Fashion-MNIST ------------------------------------------------------------------------------------------------


def write_idx(directory: Path, count: int = 20, *, compressed: bool = True) -> None:
    directory.mkdir(exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pictures, labels = fashion_mnist.read_split(fashion_mnist.SHIPPED, split)
        contents = {
            "images-idx3": struct.pack(">IIII", 2051, count, 28, 28) + pictures[:count].tobytes(),
            "labels-idx1": struct.pack(">II", 2049, count) + labels[:count].tobytes(),
        }
        for kind, content in contents.items():
            path = directory / f"{prefix}-{kind}-ubyte"
            if compressed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)


@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist_comes_from_four_idx_files(tmp_path, data, compressed, capsys):
    write_idx(tmp_path / "idx", compressed=compressed)
    assert prepare("fashion_mnist", "--source", tmp_path / "idx", "--data_dir", tmp_path) == 0
    assert "train 20, test 20" in capsys.readouterr().out
    source = opened(data, tmp_path, "fashion_mnist", "test")
    pictures, labels = fashion_mnist.read_split(fashion_mnist.SHIPPED, "test")
    found = {images.decode(source[i]["image"])[2:30, 2:30, 0].tobytes(): source[i]["label"] for i in range(20)}
    assert found == {picture.tobytes(): label for picture, label in zip(pictures[:20], labels[:20], strict=True)}


def test_a_missing_idx_file_says_where_debian_puts_it(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(InputMissingError, match="t10k-labels") as error:
        prepare("fashion_mnist", "--source", tmp_path, "--data_dir", tmp_path)
    assert "/usr/share/datasets/fashion-mnist" in error.value.fix


def test_idx_files_of_another_size_are_refused(tmp_path):
    write_idx(tmp_path)
    narrow = struct.pack(">IIII", 2051, 20, 14, 56) + bytes(20 * 28 * 28)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(narrow))
    with pytest.raises(BadDataError, match="14 x 56 pixels, not 28 x 28"):
        prepare("fashion_mnist", "--source", tmp_path, "--data_dir", tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: b"", lambda data: gzip.compress(b"other")])
def test_a_damaged_idx_file_is_refused(tmp_path, damage):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadDataError) as error:
        prepare("fashion_mnist", "--source", tmp_path, "--data_dir", tmp_path)
    assert "train-images" in error.value.where
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="cannot be read: it is a directory"):
        prepare("fashion_mnist", "--source", tmp_path, "--data_dir", tmp_path)


def test_scenes_are_the_same_every_time_and_share_no_garment():
    assert list(fashion_mnist.fashion_mnist_scenes().splits["test"]) == list(
        fashion_mnist.fashion_mnist_scenes().splits["test"]
    )
    train, test = (fashion_mnist.read_split(fashion_mnist.SHIPPED, split)[0] for split in ("train", "test"))
    assert not {picture.tobytes() for picture in train} & {picture.tobytes() for picture in test}


def test_a_stack_has_a_garment_in_each_channel_and_the_label_of_the_first():
    garments, labels = fashion_mnist.read_split(fashion_mnist.SHIPPED, "train")
    of_dev = {picture.tobytes() for picture in garments[9000:]}
    splits = fashion_mnist.fashion_mnist_stacks().splits
    count, classes = 0, collections.Counter()
    for _, example in splits["dev"]:
        count += 1
        classes[example["label"]] += 1
        if count <= 500:
            stack = cv2.imdecode(np.frombuffer(example["image"], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            assert {stack[..., channel].tobytes() for channel in range(3)} <= of_dev
            assert stack[..., 0].tobytes() == garments[9000 + (count - 1) % 1000].tobytes()
            assert example["label"] == labels[9000 + (count - 1) % 1000]
    assert count == fashion_mnist.fashion_mnist_stacks().expected["dev"] == 3000
    assert {label: times % 3 for label, times in classes.items()} == dict.fromkeys(range(10), 0)
    assert not of_dev & {picture.tobytes() for picture in garments[:9000]}
    first, again = (next(iter(fashion_mnist.fashion_mnist_stacks().splits["test"])) for _ in range(2))
    assert first == again


# --- TFRECORD copies ----------------------------------------------------------------------------------------------


def masked(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def as_tfrecord(directory: Path) -> Path:
    """Converts an ArrayRecord dataset to TFRECORD files, the default of TFDS."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for path in directory.glob("*.array_record-*"):
        with open(path.with_name(path.name.replace("array_record", "tfrecord")), "wb") as file:
            for record in ArrayRecordDataSource([os.fspath(path)]):
                length = struct.pack("<Q", len(record))
                file.write(length + masked(length) + record + masked(record))
        path.unlink()
    info = json.loads((directory / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return directory


@pytest.fixture
def tfrecord_copy(tmp_path) -> Path:
    pictures = [jpeg(photograph(number)) for number in range(9)]
    return as_tfrecord(write_images(tmp_path / "tfrecord", "photographs", pictures))


def test_crc32c_is_that_of_tfrecord():
    # The masked checksum of the length 24 in files written by TensorFlow.
    assert masked(struct.pack("<Q", 24)) == bytes.fromhex("a37f4b22")


def test_a_tfrecord_dataset_is_copied_record_by_record(tfrecord_copy, tmp_path, data):
    with pytest.raises(InputMissingError, match="tfrecord") as error:
        opened(data, tmp_path / "tfrecord", "photographs")
    assert f"prepare tfrecord --source {tfrecord_copy}" in error.value.fix
    prepare("tfrecord", "--source", tfrecord_copy, "--data_dir", tmp_path)
    source = opened(data, tmp_path, "photographs")
    check_labels(source)
    assert [source[n]["image"] for n in range(9)] == [jpeg(photograph(n)) for n in range(9)]
    assert source.info.class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("at", [2, 9, 300, -1])
def test_a_flipped_bit_in_a_tfrecord_file_is_found(tfrecord_copy, tmp_path, at):
    path = next(tfrecord_copy.glob("*.tfrecord-*"))
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadDataError, match="damaged or truncated"):
        prepare("tfrecord", "--source", tfrecord_copy, "--data_dir", tmp_path)
    assert not list(tmp_path.glob("photographs/1*"))


def test_a_truncated_tfrecord_file_is_found(tfrecord_copy, tmp_path):
    path = next(tfrecord_copy.glob("*.tfrecord-*"))
    sizes = [len(record) + 16 for record in tfrecord.read_tfrecord(path)]
    path.write_bytes(path.read_bytes()[: sum(sizes[:4])])  # after a complete record, where checksums find no error
    with pytest.raises(BadDataError, match="has 4 records"):
        prepare("tfrecord", "--source", tfrecord_copy, "--data_dir", tmp_path)


def test_what_cannot_be_copied_is_refused(tfrecord_copy, tmp_path):
    with pytest.raises(UsageError, match="replace the original"):
        prepare("tfrecord", "--source", tfrecord_copy, "--data_dir", tmp_path / "tfrecord")
    with pytest.raises(InputMissingError, match="not a TFDS dataset"):
        prepare("tfrecord", "--source", tmp_path, "--data_dir", tmp_path)
    newer = tmp_path / "newer" / "photographs" / "9.0.0"
    shutil.copytree(write_images(tmp_path / "b", "photographs", [jpeg(photograph(0))]), newer)
    info = newer / "dataset_info.json"
    info.write_text(re.sub(r'"version": "[^"]*"', '"version": "9.0.0"', info.read_text()))
    with pytest.raises(StorageError, match="of photographs, which would be read instead"):
        prepare("tfrecord", "--source", tfrecord_copy, "--data_dir", tmp_path / "newer")
    array_records = write_images(tmp_path / "a", "photographs", [jpeg(photograph(0))])
    with pytest.raises(UsageError, match="stored as array_record"):
        prepare("tfrecord", "--source", array_records, "--data_dir", tmp_path)


# --- the command --------------------------------------------------------------------------------------------------


def test_help_has_an_example_for_each_dataset(capsys):
    with pytest.raises(SystemExit):
        prepare("--help")
    out = capsys.readouterr().out
    for name in command.NAMES:
        assert f"xception-jax prepare {name}" in out


def test_a_second_run_says_that_the_dataset_is_there(tmp_path, capsys):
    write_idx(tmp_path / "idx")
    for expected in (" written: ", " already exists "):
        prepare("fashion_mnist", "--source", tmp_path / "idx", "--data_dir", tmp_path)
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["imagenet2012"], UsageError),
        (["image_folder", "--source", "."], UsageError),
        (["image_folder", "--source", ".", "--name", "../escape"], UsageError),
        (["fashion_mnist", "--source", "nowhere"], InputMissingError),
        (["imagenet2012", "--source", ".", "--folds", "5"], UsageError),
        (["fashion_mnist_subset", "--source", "."], UsageError),
        (["tfrecord", "--source", ".", "--groups", "x"], UsageError),
    ],
)
def test_missing_arguments_are_three_lines(arguments, error):
    with pytest.raises(error) as raised:
        prepare(*arguments)
    assert len(str(raised.value).splitlines()) == 3


def test_the_names_on_the_command_line_are_those_of_the_tables():
    assert set(names.SHIPPED_NAMES) == set(SHIPPED)
    assert set(names.DATASET_NAMES) == set(DATASETS)


# --- photographs --------------------------------------------------------------------------------------------------


def test_crops_of_photographs_do_not_overlap_and_cover_them(tmp_path):
    dataset = photographs.photograph_crops()
    crops = {split: dict(examples) for split, examples in dataset.splits.items()}
    keys = [key for of_split in crops.values() for key in of_split]
    assert len(keys) == len(set(keys)) == sum((h // 28) * (w // 28) for h, w in SIZES.values())
    assert set(crops) == {"train", "dev", "test"}
    for key, example in itertools.chain.from_iterable(of_split.items() for of_split in crops.values()):
        name, row, column = key.rsplit("_", 2)
        assert photographs.PHOTOGRAPHS[example["label"]] == name
        expected = photographs.read_photograph(name)[int(row) * 28 :, int(column) * 28 :][:28, :28]
        np.testing.assert_array_equal(images.decode(example["image"]), expected)
    columns = [max(int(key.rsplit("_", 1)[1]) for key in crops["train"] if key.startswith("china")), 21]
    assert columns[0] < min(int(key.rsplit("_", 1)[1]) for key in crops["dev"] if key.startswith("china")) < columns[1]


# --- what is in the place of a dataset ----------------------------------------------------------------------------


def test_what_is_no_dataset_is_not_deleted(tmp_path):
    target = tmp_path / "numbered" / "1.0.0"
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("precious")
    with pytest.raises(StorageError, match="not a complete one"):
        writer.write_dataset(numbered(20), tmp_path)
    assert (target / "notes.txt").read_text() == "precious"
    writer.write_dataset(numbered(20), tmp_path, overwrite=True)
    assert len(records(target)) == 20


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_link_or_a_file_in_its_place_is_refused_before_the_work(tmp_path, kind):
    target = tmp_path / "numbered" / "1.0.0"
    target.parent.mkdir()
    if kind == "link":
        elsewhere = writer.write_dataset(numbered(30), tmp_path / "elsewhere").path
        target.symlink_to(elsewhere)
    else:
        target.write_text("precious")
    dataset = numbered(20)
    with pytest.raises(StorageError, match="a link or a file"):
        writer.write_dataset(dataset, tmp_path, overwrite=True)
    assert len(list(dataset.splits["train"])) == 20  # none of them was read
    assert target.is_symlink() or target.read_text() == "precious"


def test_an_old_dataset_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    path = writer.write_dataset(numbered(30), tmp_path).path
    old = records(path)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_write_metadata", fail)
        with pytest.raises(StorageError):
            writer.write_dataset(numbered(20), tmp_path, overwrite=True)
    assert records(path) == old
    path.rename(path.with_name("1.0.0.replaced"))  # killed between two names
    assert writer.write_dataset(numbered(20), tmp_path).already_there
    assert records(path) == old
    assert len(records(writer.write_dataset(numbered(20), tmp_path, overwrite=True).path)) == 20
    assert [entry.name for entry in path.parent.iterdir() if entry.name != ".lock"] == ["1.0.0"]


def test_what_a_killed_replacement_left_is_deleted_or_named(tmp_path, capsys):
    path = writer.write_dataset(numbered(30), tmp_path).path
    shutil.copytree(path, path.with_name("1.0.0.replaced"))  # killed after the new dataset had its name
    assert writer.write_dataset(numbered(30), tmp_path).already_there
    assert [entry.name for entry in path.parent.iterdir() if entry.name != ".lock"] == ["1.0.0"]
    shutil.copytree(path, path.with_name("1.0.0.incomplete"))  # killed between two names, and the old one was restored
    capsys.readouterr()
    assert writer.write_dataset(numbered(30), tmp_path).already_there
    assert "an unfinished replacement of numbered is kept in" in capsys.readouterr().err
    assert path.with_name("1.0.0.incomplete").exists()


def test_a_newer_version_is_never_read_instead_of_the_new_one(tmp_path, data):
    newer = writer.write_dataset(dataclasses.replace(numbered(9), version="2.0.0"), tmp_path).path
    dataset = numbered(5)
    with pytest.raises(StorageError, match=r"a version 2\.0\.0 of numbered, which would be read instead") as error:
        writer.write_dataset(dataset, tmp_path)
    assert error.value.where == str(newer)
    assert len(list(dataset.splits["train"])) == 5  # none of them was read
    newer.rename(tmp_path / "elsewhere")
    writer.write_dataset(numbered(5), tmp_path)
    (tmp_path / "elsewhere").rename(newer)
    with pytest.raises(StorageError) as error:
        writer.write_dataset(numbered(5), tmp_path)
    assert error.value.fix.startswith("set config.data.name=numbered:1.0.0 ")
    assert [len(opened(data, tmp_path, name)) for name in ("numbered:1.0.0", "numbered")] == [5, 9]


@pytest.mark.parametrize("kind", ["link", "pipe", "file"])
def test_the_lock_file_destroys_and_waits_for_nothing(tmp_path, kind):
    (tmp_path / "thesis.txt").write_text("precious")
    lock = tmp_path / "numbered" / ".lock"
    lock.parent.mkdir()
    if kind == "link":
        lock.symlink_to(tmp_path / "thesis.txt")
        with pytest.raises(StorageError, match="there is a link in the place of the lock file") as error:
            writer.write_dataset(numbered(3), tmp_path)
        assert error.value.where == str(lock)
    else:
        (os.mkfifo if kind == "pipe" else Path.touch)(lock)
        working = threading.Thread(target=writer.write_dataset, args=(numbered(3), tmp_path), daemon=True)
        working.start()
        working.join(60)
        assert is_complete(tmp_path / "numbered" / "1.0.0")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def stored_as(directory: Path, file_format: str) -> Path:
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": file_format}))
    return directory


def test_the_advice_for_other_formats_can_be_followed(tfrecord_copy, tmp_path, data):
    with pytest.raises(InputMissingError) as error:
        opened(data, tmp_path / "tfrecord", "photographs")
    command, fix = error.value.fix.removeprefix("run xception-jax prepare ").split(", then ")
    prepare(*command.replace("OTHER", str(tmp_path / "other")).split())
    assert fix == "set data_dir to OTHER"
    assert len(opened(data, tmp_path / "other", "photographs")) == 9
    riegeli = stored_as(write_images(tmp_path / "r", "photographs", [jpeg(photograph(0))]), "riegeli")
    for read in (
        lambda: opened(data, tmp_path / "r", "photographs"),
        lambda: prepare("tfrecord", "--source", riegeli, "--data_dir", tmp_path),
    ):
        with pytest.raises((InputMissingError, UsageError), match="is stored as riegeli") as error:
            read()
        assert "file_format='array_record'" in error.value.fix
