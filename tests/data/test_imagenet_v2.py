"""Tests ImageNet-V2 from its archive and from its folder; labels must not depend on the order of folder names."""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path

import pytest

from tests.data.small_imagenet import add, jpeg, photograph
from xception_jax.cli import prepare as command
from xception_jax.config import DataConfig
from xception_jax.data.datasets import open_dataset
from xception_jax.data.imagenet_classes import class_names
from xception_jax.data.prepare.image_folder import Skipped, image_folder
from xception_jax.errors import BadDataError, InputMissingError

FOLDER = "imagenetv2-matched-frequency-format-val"
LABELS = (0, 2, 10, 999)


def prepare(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([*map(str, arguments), "--json"]))


def write_folder(directory: Path) -> Path:
    for label in LABELS:
        (directory / FOLDER / str(label)).mkdir(parents=True)
        for number in range(2):
            image = jpeg(photograph(label + number, 40))
            (directory / FOLDER / str(label) / f"{label:03}{number}.jpeg").write_bytes(image)
    return directory


def write_archive(directory: Path, folder: Path) -> Path:
    directory.mkdir()
    with tarfile.open(directory / "imagenetv2-matched-frequency.tar.gz", "w:gz") as archive:
        for path in sorted((folder / FOLDER).rglob("*.jpeg")):
            add(archive, str(path.relative_to(folder)), path.read_bytes())
    return directory


def opened(data_dir: Path, name: str = "imagenet_v2/matched-frequency"):
    return open_dataset(DataConfig(name=name, data_dir=str(data_dir)), "test")


def test_archive_folder_and_inner_folder_give_the_same_dataset(tmp_path):
    folder = write_folder(tmp_path / "unpacked")
    archive = write_archive(tmp_path / "packed", folder)
    found = []
    for number, source in enumerate((folder, folder / FOLDER, archive)):
        assert prepare("imagenet_v2", "--source", source, "--data_dir", tmp_path / str(number)) == 0
        examples = opened(tmp_path / str(number))
        assert len(examples) == 2 * len(LABELS)
        read = [examples[index] for index in range(len(examples))]
        names = examples.column("file_name")
        found.append({name: (example["label"], example["image"]) for name, example in zip(names, read, strict=True)})
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2 * len(LABELS)
    for name, (label, image) in found[0].items():
        assert label == int(name.split("/")[0])
        assert image == (folder / FOLDER / name).read_bytes()
    assert examples.info.class_names == tuple(class_names())


def test_what_is_not_there_is_named_with_its_command(tmp_path):
    with pytest.raises(InputMissingError, match="top-images"):
        prepare("imagenet_v2/topimages", "--source", write_folder(tmp_path) / FOLDER / "2", "--data_dir", tmp_path)
    with pytest.raises(InputMissingError) as raised:
        opened(tmp_path, "imagenet_v2/topimages")
    assert "prepare imagenet_v2/topimages --source DIR" in raised.value.fix


def test_the_folder_of_another_variant_is_refused(tmp_path):
    folder = (write_folder(tmp_path) / FOLDER).rename(tmp_path / "imagenetv2-top-images-format-val")
    with pytest.raises(BadDataError, match="another variant than matched-frequency"):
        prepare("imagenet_v2/matched-frequency", "--source", folder, "--data_dir", tmp_path)
    assert prepare("imagenet_v2/topimages", "--source", folder, "--data_dir", tmp_path) == 0


def test_a_folder_that_is_no_label_is_refused(tmp_path):
    folder = write_folder(tmp_path)
    (folder / FOLDER / "cats").mkdir()
    (folder / FOLDER / "cats" / "1.jpeg").write_bytes(b"")
    with pytest.raises(BadDataError, match="not part of ImageNet-V2"):
        prepare("imagenet_v2", "--source", folder, "--data_dir", tmp_path / "tfds")
    with pytest.raises(BadDataError, match="cats"):
        prepare("imagenet_v2", "--source", write_archive(tmp_path / "a", folder), "--data_dir", tmp_path / "tfds")


def test_an_image_folder_of_numbers_has_its_classes_in_their_order(tmp_path):
    folder = write_folder(tmp_path) / FOLDER
    assert image_folder(folder, "numbers", Skipped()).features["label"].names == ["0", "2", "10", "999"]
