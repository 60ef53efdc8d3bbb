"""Datasets from folders of images: what belongs to them, what is left out, what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.small_imagenet import encoded, jpeg, photograph
from tests.data.test_prepare import opened, prepare
from xception_jax.data.prepare import image_folder
from xception_jax.errors import BadDataError, InputMissingError


def write_folder(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def test_an_image_folder_keeps_splits_classes_and_bytes(tmp_path, data, capsys):
    files = {
        "train/daisy/a.jpg": jpeg(photograph(0)),
        "train/daisy/b.PNG": encoded(photograph(1), "PNG"),
        "train/rose/a.jpg": jpeg(photograph(2)),
        "val/rose/a.webp": encoded(photograph(3), "WEBP"),
        "train/rose/notes.txt": b"not an image",
        "train/stray.jpg": jpeg(photograph(4)),
        "extra/rose/a.jpg": jpeg(photograph(5)),
    }
    folder = write_folder(tmp_path / "flowers", files)
    prepare("image_folder", "--source", folder, "--name", "flowers", "--data_dir", tmp_path)
    out = capsys.readouterr().out
    assert f"not the name of an image (1): {folder / 'train/rose/notes.txt'}" in out
    assert f"not in the folder of a class (1): {folder / 'train/stray.jpg'}" in out
    assert f"neither a split nor in one (1): {folder / 'extra'}" in out
    assert "classes (2): daisy, rose\n" in out
    source = opened(data, tmp_path, "flowers")
    assert source.info.class_names == ("daisy", "rose")
    assert {(source[i]["image"], source[i]["label"]) for i in range(3)} == {
        (files["train/daisy/a.jpg"], 0),
        (files["train/daisy/b.PNG"], 0),
        (files["train/rose/a.jpg"], 1),
    }
    validation = opened(data, tmp_path, "flowers", "validation")
    assert (validation[0]["image"], validation[0]["label"]) == (files["val/rose/a.webp"], 1)


def test_two_folders_of_one_split_are_not_chosen_between(tmp_path):
    image = jpeg(photograph(0))
    folder = write_folder(tmp_path / "two", {f"{split}/a/1.jpg": image for split in ("train", "val", "validation")})
    with pytest.raises(BadDataError, match="val and validation both stand for the split validation"):
        prepare("image_folder", "--source", folder, "--name", "two", "--data_dir", tmp_path)


def test_a_class_is_not_held_out_as_a_whole(tmp_path, data):
    image = jpeg(photograph(0))
    folder = write_folder(tmp_path / "few", {f"class{n:02}/1.jpg": image for n in range(50)})
    prepare("image_folder", "--source", folder, "--name", "few", "--data_dir", tmp_path)
    source = opened(data, tmp_path, "few")
    assert sorted({source[i]["label"] for i in range(len(source))}) == list(range(50))


def test_a_folder_without_splits_is_divided_by_a_hash(tmp_path, data):
    image = jpeg(photograph(0))
    folder = write_folder(tmp_path / "many", {f"{'ab'[n % 2]}/{n}.jpg": image for n in range(100)})
    prepare("image_folder", "--source", folder, "--name", "many", "--data_dir", tmp_path / "1")
    sizes = [len(opened(data, tmp_path / "1", "many", split)) for split in ("train", "validation")]
    assert sum(sizes) == 100
    assert 3 <= sizes[1] <= 20
    held_out = {path for path in folder.rglob("*.jpg") if path in set(_validation(folder))}
    write_folder(folder, {f"a/new{n}.jpg": image for n in range(50)})
    assert held_out <= set(_validation(folder))


def _validation(folder: Path) -> list[Path]:
    return image_folder._divide(folder, sorted(folder.rglob("*.jpg")))["validation"]


def test_a_damaged_image_is_refused_or_skipped_by_name(tmp_path, data, capsys):
    files = {"train/a/good.jpg": jpeg(photograph(0)), "train/a/bad.jpg": jpeg(photograph(1))[:900]}
    folder = write_folder(tmp_path / "folder", files)
    arguments = ["image_folder", "--source", folder, "--name", "folder", "--data_dir", tmp_path]
    with pytest.raises(BadDataError) as error:
        prepare(*arguments)
    assert error.value.where.endswith("train/a/bad.jpg")
    prepare(*arguments, "--skip-damaged", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["num_examples"] == {"train": 1}
    assert report["skipped"] == {"damaged": [str(folder / "train/a/bad.jpg")]}
    assert report["path"] == str(tmp_path / "folder" / "1.0.0")


def test_a_class_without_training_images_is_refused(tmp_path):
    image = jpeg(photograph(0))
    folder = write_folder(tmp_path / "f", {"train/a/1.jpg": image, "test/b/1.jpg": image})
    with pytest.raises(BadDataError, match="'b' of test has no images in train"):
        prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path)


def test_hidden_and_system_names_are_no_part_of_a_folder(tmp_path, data, capsys):
    image = jpeg(photograph(0))
    names = ["train/.ipynb_checkpoints/a.jpg", "train/__MACOSX/a.jpg", "train/daisy/._a.png", ".val/daisy/a.jpg"]
    folder = write_folder(tmp_path / ".f", {name: b"no image" for name in names} | {"train/daisy/a.jpg": image})
    (folder / "train" / "tulip").mkdir()
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path]
    prepare(*arguments, "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["num_examples"], report["classes"]) == ({"train": 1}, ["daisy"])
    assert report["skipped"] == {"a class without images": [str(folder / "train/tulip")]}
    prepare(*arguments)
    assert "classes (" not in capsys.readouterr().out  # of the dataset that is there, which may be another


def test_links_are_followed_but_not_in_circles(tmp_path, data, capsys):
    pictures = [jpeg(photograph(number)) for number in range(2)]
    elsewhere = write_folder(tmp_path / "elsewhere", {"roses/a.jpg": pictures[0], "b.jpg": pictures[1]})
    (tmp_path / "f" / "train" / "daisy").mkdir(parents=True)
    links = {"rose": elsewhere / "roses", "daisy/b.jpg": elsewhere / "b.jpg", "daisy/up": "..", "gone": "nowhere"}
    for name, target in links.items():
        (tmp_path / "f" / "train" / name).symlink_to(target)
    prepare("image_folder", "--source", tmp_path / "f", "--name", "f", "--data_dir", tmp_path)
    assert f"a broken link or not a regular file (1): {tmp_path}/f/train/gone\nclasses (2)" in capsys.readouterr().out
    source = opened(data, tmp_path, "f")
    assert {(source[i]["image"], source[i]["label"]) for i in range(2)} == {(pictures[1], 0), (pictures[0], 1)}


def test_a_class_whose_images_are_all_damaged_is_refused(tmp_path):
    files = {"train/a/1.jpg": jpeg(photograph(0)), "train/b/1.jpg": b"damaged", "val/a/1.jpg": b"damaged"}
    folder = write_folder(tmp_path / "f", files)
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path, "--skip-damaged"]
    with pytest.raises(BadDataError, match="1 of 2 classes") as error:
        prepare(*arguments)
    assert error.value.where == "b"
    write_folder(folder, {"train/b/2.jpg": jpeg(photograph(1))})
    assert prepare(*arguments) == 0


def test_an_empty_folder_is_missing_input(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputMissingError):
        prepare("image_folder", "--source", tmp_path / "empty", "--name", "empty", "--data_dir", tmp_path)
