from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data.conftest import write_images
from tests.data.small_imagenet import encoded, jpeg, photograph
from xception_jax.data import images, sources
from xception_jax.data.datasets import find_class_names, open_dataset
from xception_jax.data.prepare import fashion_mnist
from xception_jax.data.prepare.writer import Dataset, write_dataset
from xception_jax.errors import BadDataError, ConfigError, InputMissingError


def test_the_shipped_images_need_no_preparation(data, capsys):
    train, test = open_dataset(data, "train"), open_dataset(data, "test")
    assert (len(train), len(test)) == (10_000, 2_000)
    assert train.info.num_classes == 10
    assert train.info.class_names[9] == "Ankle boot"
    assert not train.info.multi_label
    assert train.info.num_examples == len(train)
    example = train[17]
    assert example["index"] == 17
    assert images.decode(example["image"]).shape == (32, 32, 3)
    counts = np.bincount([train[i]["label"] for i in range(0, len(train), 10)], minlength=10)
    assert counts.min() > 70
    assert train.column("label")[::10] == [train[i]["label"] for i in range(0, len(train), 10)]
    assert train.column("file_name") is None
    open_dataset(data, "train")
    assert capsys.readouterr().err.count("\n") <= 1


def test_scenes_have_several_labels(data):
    data = data.replace(name="fashion_mnist_scenes")
    source = open_dataset(data, "test")
    assert source.info.multi_label
    sizes = set()
    for index in range(50):
        example = source[index]
        sizes.add(len(example["label"]))
        assert list(example["label"]) == sorted(set(example["label"]))
        cells = images.decode(example["image"])[..., 0].reshape(2, 32, 2, 32).any(axis=(1, 3))
        assert cells.sum() >= len(example["label"])
    assert sizes == {1, 2, 3, 4}


def test_a_source_gives_the_bytes_that_were_written(photographs_data):
    source = open_dataset(photographs_data, "train")
    for index in range(len(source)):
        assert source[index] == {"image": jpeg(photograph(index)), "label": index % 5, "index": index}


def test_splits_divide_a_dataset(data):
    whole, head, tail = (open_dataset(data, split) for split in ("train", "train[:98%]", "train[98%:]"))
    assert len(head) == 9800
    assert len(tail) == 200
    assert head[0]["image"] == whole[0]["image"]
    assert tail[0]["image"] == whole[9800]["image"]
    assert tail[0]["index"] == 0
    assert head.info.fingerprint == tail.info.fingerprint


def test_a_source_can_be_pickled(data, photographs_data):
    for name in ("photographs", "synthetic"):
        photographs_data = photographs_data.replace(name=name)
        source = open_dataset(photographs_data, "train[:50%]")
        copy = pickle.loads(pickle.dumps(source))
        assert copy.info == source.info
        assert copy[3] == source[3]


def test_the_data_dir_is_the_config_then_the_environment_then_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert sources.resolve_data_dir("") == tmp_path / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    assert sources.resolve_data_dir("") == tmp_path / "environment"
    assert sources.resolve_data_dir("~/config") == tmp_path / "config"


def test_the_newest_version_is_opened_unless_one_is_named(data, tmp_path):
    data = data.replace(data_dir=str(tmp_path), name="versions")
    old = write_images(tmp_path, "versions", [jpeg(photograph(0))])
    features = tfds.builder_from_directory(os.fspath(old)).info.features
    examples = [(str(number), {"image": jpeg(photograph(number)), "label": 0}) for number in range(3)]
    write_dataset(Dataset("versions", features, {"train": examples}, "Newer.", version="10.0.0"), tmp_path)
    assert len(open_dataset(data, "train")) == 3
    data = data.replace(name="versions:1.0.0")
    assert len(open_dataset(data, "train")) == 1
    data = data.replace(name="versions:2.0.0")
    with pytest.raises(InputMissingError):
        open_dataset(data, "train")


def test_class_names_are_found_without_images_and_without_writing_a_shipped_dataset(data, tmp_path):
    data = data.replace(data_dir=str(tmp_path))
    assert find_class_names(data) == find_class_names(data.replace(name="fashion_mnist_scenes"))
    assert find_class_names(data)[9] == "Ankle boot"
    assert find_class_names(data.replace(name="flowers")) is None
    assert len(find_class_names(data.replace(name="synthetic"))) == 1000
    assert not list(tmp_path.iterdir())
    path = write_images(tmp_path, "flowers", [jpeg(photograph(0))])
    next(path.glob("*.array_record*")).unlink()
    assert find_class_names(data.replace(name="flowers")) == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("imagenet2012", "xception-jax prepare imagenet2012 --source DIR --data_dir "),
        ("flowers", "xception-jax prepare image_folder --name flowers --source DIR --data_dir "),
    ],
)
def test_a_missing_dataset_names_the_command_that_makes_it(data, tmp_path, name, command):
    data = data.replace(name=name, data_dir=str(tmp_path))
    with pytest.raises(InputMissingError) as error:
        open_dataset(data, "train")
    assert command + str(tmp_path) in error.value.fix
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("split", ["validation", "training", "train[100%:]", "train[:0]"])
def test_a_missing_or_empty_split_names_those_that_are_there(data, split):
    with pytest.raises(InputMissingError) as error:
        open_dataset(data, split)
    assert "train (10,000), test (2,000)" in error.value.fix
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("split", ["train[98%:", "train[a:b]", "train[:98%]]"])
def test_a_split_that_cannot_be_read_is_a_config_error(data, split):
    with pytest.raises(ConfigError) as error:
        open_dataset(data, split)
    assert len(str(error.value).splitlines()) == 3


def test_a_missing_shard_is_found_when_the_source_is_opened(photographs_data, tmp_path):
    shutil.copytree(sources.resolve_data_dir(photographs_data.data_dir) / "photographs", tmp_path / "photographs")
    photographs_data = photographs_data.replace(data_dir=str(tmp_path))
    next(tmp_path.glob("photographs/1.0.0/*array_record*")).unlink()
    with pytest.raises(InputMissingError, match="1 files of the dataset"):
        open_dataset(photographs_data, "train")


def test_a_damaged_record_names_its_position(photographs_data, tmp_path):
    shutil.copytree(sources.resolve_data_dir(photographs_data.data_dir) / "photographs", tmp_path / "photographs")
    photographs_data = photographs_data.replace(data_dir=str(tmp_path))
    shard = next(tmp_path.glob("photographs/1.0.0/*array_record*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    source = open_dataset(photographs_data, "train")
    with pytest.raises(BadDataError, match=r"record \d+ of photographs"):
        [source[index] for index in range(len(source))]


def change_features(path, **changes) -> None:
    features = json.loads((path / "features.json").read_text())
    features["featuresDict"]["features"]["label"]["classLabel"].update(changes)
    (path / "features.json").write_text(json.dumps(features))


def test_a_label_out_of_range_is_named_before_training(data, tmp_path):
    labels = [0, 1, 4, 2]
    path = write_images(tmp_path, "labels", [jpeg(photograph(number)) for number in range(4)], labels)
    change_features(path, numClasses="4")
    data = data.replace(data_dir=str(tmp_path), name="labels")
    with pytest.raises(BadDataError, match="label 4 is not one of the 4 classes") as error:
        sources.check_labels(open_dataset(data, "train"))
    assert error.value.where == "dataset labels, split train, example 2"


def test_a_negative_label_is_refused(photographs_data):
    source = open_dataset(photographs_data, "train")
    sources.check_labels(source)
    with pytest.raises(BadDataError, match="label -1"):
        sources.check_label({"image": b"", "label": -1, "index": 0}, source.info)


def test_hosts_divide_the_labels_among_them(data, monkeypatch):
    monkeypatch.setattr(sources, "LABELS_CHECKED_BEFORE_TRAINING", 100)
    source = open_dataset(data.replace(name="synthetic", synthetic_examples=1000), "train")
    checked = []
    monkeypatch.setattr(sources, "check_label", lambda example, info: checked.append(example["index"]))
    sources.check_labels(source)
    alone = checked.copy()
    assert len(set(alone)) == 100
    checked.clear()
    for host in range(3):
        sources.check_labels(source, host, 3)
        assert 33 <= len(checked) - host * 33 <= 34
    assert sorted(checked) == alone


def test_a_dataset_without_labels_names_its_features(data, tmp_path):
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "caption": tfds.features.Text()})
    example = {"image": encoded(photograph(0), "PNG"), "caption": "a photograph"}
    write_dataset(Dataset("captions", features, {"train": [("0", example)]}, "No labels."), tmp_path)
    data = data.replace(data_dir=str(tmp_path), name="captions")
    with pytest.raises(BadDataError, match="caption"):
        open_dataset(data, "train")


def test_the_fingerprint_changes_with_the_dataset_and_only_then(tmp_path, data):
    data = data.replace(name="prints")
    prints = []
    for number, count in enumerate((3, 3, 4)):
        data = data.replace(data_dir=str(tmp_path / str(number)))
        write_images(tmp_path / str(number), "prints", [jpeg(photograph(n)) for n in range(count)])
        prints.append(open_dataset(data, "train").info.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_the_synthetic_source_is_the_same_every_time(data):
    data = data.replace(name="synthetic", synthetic_examples=100_000)
    source = open_dataset(data, "train")
    assert len(source) == source.info.num_examples == 100_000
    assert images.decode(source[99_999]["image"]).shape == (375, 500, 3)
    labels = [source[index]["label"] for index in range(0, 100_000, 10)]
    assert min(labels) >= 0
    assert max(labels) < source.info.num_classes == 1000
    assert len(set(labels)) > 900
    assert 30_000 < len(source[0]["image"]) < 200_000


def test_two_processes_that_start_at_once_share_one_preparation_without_tensorflow(tmp_path):
    code = (
        "from xception_jax.config import DataConfig; from xception_jax.data.datasets import open_dataset\n"
        f"data = DataConfig(name='fashion_mnist_scenes', data_dir={str(tmp_path)!r})\n"
        "print(len(open_dataset(data, 'train'))); import sys; assert 'tensorflow' not in sys.modules"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert out == f"{fashion_mnist.NUM_SCENES['train']}\n", err
    assert [path.name for path in (tmp_path / "fashion_mnist_scenes").iterdir() if path.is_dir()] == ["1.0.0"]


def test_open_images_is_read_as_tfds_writes_it(data, tmp_path):
    """Labels are the classes of `objects_trainable` with a confidence above 0, each once."""
    objects = tfds.features.Sequence(
        {
            "label": tfds.features.ClassLabel(num_classes=7),
            "source": tfds.features.ClassLabel(num_classes=6),
            "confidence": np.int32,
        }
    )
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "objects_trainable": objects})
    found = [
        {"label": 5, "source": 0, "confidence": 10},
        {"label": 3, "source": 1, "confidence": 0},
        {"label": 2, "source": 2, "confidence": 7},
        {"label": 5, "source": 2, "confidence": 8},
    ]
    examples = [("0", {"image": jpeg(photograph(0)), "objects_trainable": found})]
    write_dataset(Dataset("open_images_v4", features, {"train": examples}, "Test."), tmp_path, progress=False)
    data = data.replace(name="open_images_v4", data_dir=str(tmp_path))
    source = open_dataset(data, "train")
    assert (source.info.multi_label, source.info.num_classes) == (True, 7)
    assert source[0]["label"] == (2, 5)
    (description,) = tmp_path.rglob("features.json")
    description.write_text(description.read_text().replace('"numClasses": "7"', '"numClasses": "3000000"'))
    with pytest.raises(BadDataError, match="3,000,000 classes; the limit is"):
        open_dataset(data, "train")


@pytest.fixture
def pets(tmp_path) -> Path:
    """Returns a directory with the dataset 'pets': intact images with a damaged mask each, and masks of parts."""
    image, mask = jpeg(photograph(0)), encoded(photograph(0), "PNG")[:60]
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "label": tfds.features.ClassLabel(num_classes=2),
            "file_name": tfds.features.Text(),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
            "parts": tfds.features.Sequence({"mask": tfds.features.Image(), "number": np.int32}),
        }
    )
    example = {"image": image, "segmentation_mask": mask, "parts": [{"mask": mask, "number": 3}]}
    examples = [(str(n), example | {"label": n, "file_name": f"{n}.jpg"}) for n in range(2)]
    write_dataset(Dataset("pets", features, {"train": examples}, "Test."), tmp_path, progress=False)
    return tmp_path


def test_other_features_than_image_and_label_are_not_decoded(data, pets):
    source = open_dataset(data.replace(name="pets", data_dir=str(pets)), "train")
    found = [source[0], *pickle.loads(pickle.dumps(source)).__getitems__([1])]
    assert [example["image"] for example in found] == [jpeg(photograph(0))] * 2
    assert sorted(example["label"] for example in found) == [0, 1]
    assert [f"{label}.jpg" for label in source.column("label")] == source.column("file_name")


@pytest.mark.parametrize(
    "split", ["train+train", "train[:10]+train[9:]", "train[:50%]+train[20%:30%]", "train[10:]+train[:3]+train[2:5]"]
)
def test_no_split_has_an_image_twice(photographs_data, split):
    with pytest.raises(ConfigError, match="has images twice") as error:
        open_dataset(photographs_data, split)
    assert len(str(error.value).splitlines()) == 3


def test_parts_of_a_split_may_touch(photographs_data):
    whole = open_dataset(photographs_data, "train[10:]+train[:3]+train[3:10]")
    assert sorted(example["label"] for example in map(whole.__getitem__, range(23))) == sorted(n % 5 for n in range(23))


def test_a_slice_out_of_range_is_not_a_split_that_cannot_be_parsed(photographs_data):
    with pytest.raises(ConfigError, match=r"'train\[:1000\]' is out of range: .* 23 examples") as error:
        open_dataset(photographs_data, "train[:1000]")
    assert "train (23)" in error.value.fix


def test_a_missing_version_names_those_that_are_there(photographs_data):
    with pytest.raises(InputMissingError, match=r"photographs has no version 2\.0\.0") as error:
        open_dataset(photographs_data.replace(name="photographs:2.0.0"), "train")
    assert error.value.fix.startswith("choose one of 1.0.0;")


def test_a_shard_that_is_a_pipe_is_missing(photographs_data, tmp_path):
    shutil.copytree(sources.resolve_data_dir(photographs_data.data_dir) / "photographs", tmp_path / "photographs")
    shard = next(tmp_path.glob("photographs/1.0.0/*array_record*"))
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(InputMissingError, match="1 files of the dataset"):
        open_dataset(photographs_data.replace(data_dir=str(tmp_path)), "train")
