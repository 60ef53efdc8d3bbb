"""Tests datasets from folders of images, and which files are skipped and reported."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from tests.data.small_imagenet import encoded, jpeg, photograph
from tests.data.test_prepare import opened, prepare
from xception_jax.data import folders
from xception_jax.data.prepare import groups, splits
from xception_jax.data.prepare.splits import divide_groups
from xception_jax.data.sources import SourceInfo
from xception_jax.errors import BadDataError, InputMissingError, StorageError, UsageError
from xception_jax.training.verification import refuse_other_dataset


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


def test_folders_below_a_class_can_be_its_groups(tmp_path, data, capsys):
    image = jpeg(photograph(0))
    names = [f"{label}/patient{n}/{k}.jpg" for label in ("ill", "well") for n in range(10) for k in range(2)]
    folder = write_folder(tmp_path / "scans", dict.fromkeys(names, image))
    arguments = ["image_folder", "--source", folder, "--name", "scans", "--data_dir", tmp_path]
    prepare(*arguments)
    warning = capsys.readouterr().out
    assert "of 20 folders below a class are in several splits: ill/patient" in warning
    prepare(*arguments, "--overwrite", "--groups", re.search("--groups '(.*)'", warning)[1])
    assert "folders below a class" not in capsys.readouterr().out
    splits = [opened(data, tmp_path, "scans", split) for split in ("train", "validation", "test")]
    assert sorted(name for source in splits for name in source.column("file_name")) == sorted(names)
    assert splits[0].info.class_names == ("ill", "well")
    for source in splits:
        for name, label, group in zip(*(source.column(each) for each in ("file_name", "label", "group")), strict=True):
            assert (group, label) == (name.rpartition("/")[0], name.startswith("well"))


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


def test_a_folder_without_splits_is_divided_by_class_with_exact_shares(tmp_path, data, capsys):
    image = jpeg(photograph(0))
    folder = write_folder(tmp_path / "many", {f"{'ab'[n % 4 == 0]}/{n}.jpg": image for n in range(80)})
    arguments = ["image_folder", "--source", folder, "--name", "many", "--data_dir", tmp_path]
    prepare(*arguments)
    assert (
        "class        train  validation  test\n"
        "a               48           6     6\n"
        "b               16           2     2\n"
        "all classes     64           8     8\n"
    ) in capsys.readouterr().out
    source = opened(data, tmp_path, "many", "validation")
    assert sorted(source.column("label")) == [0] * 6 + [1] * 2
    assert source.column("group") is None
    assert {name.partition("/")[0] for name in source.column("file_name")} == {"a", "b"}

    prepare(*arguments, "--overwrite", "--splits", "train=0.5,held_out=0.5", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == {"train": {"a": 30, "b": 10}, "held_out": {"a": 30, "b": 10}}


def test_files_keep_their_split_when_others_are_added():
    keys = [f"{label}/{n}.jpg" for label in "ab" for n in range(100)]
    before = dict(zip(keys, divided(keys), strict=True))
    new = [f"a/new{n}.jpg" for n in range(20)]
    for order in (keys + new, new + keys[::-1]):
        after = dict(zip(order, divided(order), strict=True))
        assert sum(after[key] != before[key] for key in keys) <= 8
        assert Counter(after.values()) == {"train": 176, "validation": 22, "test": 22}
        assert all(after[key] == before[key] for key in keys if key.startswith("b/"))


def divided(keys: list[str]) -> list[str]:
    return splits.divide(keys, [key.partition("/")[0] for key in keys], splits.DEFAULT_SHARES)


@pytest.mark.parametrize(
    "shares", [splits.DEFAULT_SHARES, {"train": 0.6, "a": 0.15, "b": 0.25}, {f"fold{n}": 0.1 for n in range(10)}]
)
def test_shares_are_exact_in_every_class_and_in_all(shares):
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(10, 99, rng.integers(1, 20))
        labels = [f"class{label}" for label, size in enumerate(sizes) for _ in range(size)]
        result = splits.divide([str(number) for number in range(len(labels))], labels, shares)
        for split, share in shares.items():
            chosen = Counter(label for label, found in zip(labels, result, strict=True) if found == split)
            assert abs(chosen.total() - share * len(labels)) < 1
            assert all(abs(chosen[f"class{label}"] - share * size) < 1 for label, size in enumerate(sizes))


def random_groups(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Returns groups and labels of files; groups have different sizes and classes."""
    groups, labels, num_classes = [], [], rng.integers(2, 6)
    for group in range(rng.integers(20, 80)):
        size = rng.integers(1, 20)
        groups += [f"group{group}"] * size
        labels += [f"class{n}" for n in rng.choice(num_classes, size, p=rng.dirichlet([0.3] * num_classes))]
    return groups, labels


def unevenness(labels: list[str], of_fold: list) -> float:
    """Returns the standard deviation over folds of the share of each class, averaged over the classes."""
    counts = np.array([[Counter(zip(of_fold, labels, strict=True))[f, c] for c in set(labels)] for f in set(of_fold)])
    return float((counts / counts.sum(0)).std(0).mean())


def test_groups_stay_together_and_balance_the_classes_as_well_as_scikit_learn_does():
    rng = np.random.default_rng(1)
    ours, theirs = [], []
    for _ in range(10):
        groups, labels = random_groups(rng)
        found = splits.divide_groups(groups, labels, {f"fold{n}": 0.2 for n in range(5)})
        assert len(set(zip(groups, found, strict=True))) == len(set(groups))
        backwards = splits.divide_groups(groups[::-1], labels[::-1], {f"fold{n}": 0.2 for n in range(5)})
        assert backwards[::-1] == found
        ours.append(unevenness(labels, found))
        folds = np.zeros(len(labels), int)
        for number, (_, test) in enumerate(StratifiedGroupKFold(5).split(labels, labels, groups)):
            folds[test] = number
        theirs.append(unevenness(labels, folds.tolist()))

        found = splits.divide_groups(groups, labels, splits.DEFAULT_SHARES)
        assert {label for label, split in zip(labels, found, strict=True) if split == "train"} == set(labels)
        assert 0.07 < found.count("test") / len(found) < 0.13
    assert np.mean(ours) <= 1.05 * np.mean(theirs)


def test_no_split_is_empty_and_train_has_every_class():
    groups, labels = ["p1"] * 9 + ["p2"] * 9 + ["p3"], ["a"] * 18 + ["b"]
    with pytest.raises(BadDataError, match="no image for the split"):  # train needs p3, and one of the others
        splits.divide_groups(groups, labels, splits.DEFAULT_SHARES)
    groups, labels = [*groups, *["p4"] * 3], [*labels, *["a"] * 3]
    found = dict(zip(groups, splits.divide_groups(groups, labels, splits.DEFAULT_SHARES), strict=True))
    assert found["p3"] == "train"
    assert set(found.values()) == {*splits.DEFAULT_SHARES}
    # Two patients of five have the rare class: one of them stays in train, and no split goes without.
    groups, labels = [f"p{n // 4}" for n in range(20)], (["a"] * 4 + ["b"] * 4) * 2 + ["a"] * 4
    found = dict(zip(groups, splits.divide_groups(groups, labels, splits.DEFAULT_SHARES), strict=True))
    assert set(found.values()) == {*splits.DEFAULT_SHARES}
    assert "train" in {found["p1"], found["p3"]}
    with pytest.raises(BadDataError, match="2 groups cannot fill 3 splits"):
        splits.divide_groups(["p", "q"], ["a", "a"], splits.DEFAULT_SHARES)
    assert set(splits.divide_groups(["p", "q", "r"], ["a"] * 3, splits.DEFAULT_SHARES)) == {*splits.DEFAULT_SHARES}


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Returns a folder with 10 patients in each of two classes, each with 4 images."""
    names = [f"{label}/patient{label}{p}_{n}.jpg" for label in "ab" for p in range(10) for n in range(4)]
    return write_folder(
        tmp_path_factory.mktemp("scans"), {name: jpeg(photograph(n, 32)) for n, name in enumerate(names)}
    )


def test_names_on_two_sides_are_a_warning_and_its_expression_groups_them(scans, tmp_path, data, capsys):
    arguments = ["image_folder", "--source", scans, "--name", "scans", "--data_dir", tmp_path]
    prepare(*arguments)
    warning = capsys.readouterr().out
    assert "names, without their numbers, are in several splits: patient" in warning
    expression = re.search("--groups '(.*)'", warning)[1]
    prepare(*arguments, "--overwrite", "--groups", expression)
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "groups          16           2     2\n" in out
    sides = {}
    for split in ("train", "validation", "test"):
        source = opened(data, tmp_path, "scans", split)
        for group, name, index in zip(source.column("group"), source.column("file_name"), range(99), strict=False):
            assert re.search(expression, name)[1] == group
            assert (scans / name).read_bytes() == source[index]["image"]
            assert sides.setdefault(group, split) == split
    assert len(sides) == 20

    rows = [f"{path.relative_to(scans)},{path.name[:9]}" for path in scans.rglob("*.jpg")]
    spaced = [f" {row} ".replace(",", " ,  ") if number % 2 else row for number, row in enumerate(rows)]
    for name, lines in (("groups.csv", ["file,group", *rows]), ("SPACED.CSV", [" file , group", *spaced])):
        table = tmp_path / name
        table.write_text("\n".join(lines) + "\n")
        prepare(*arguments, "--overwrite", "--groups", table, "--json")
        assert json.loads(capsys.readouterr().out)["groups"] == {"train": 16, "validation": 2, "test": 2}


@pytest.mark.parametrize("name", ["{}/{}/1.jpg", "{}/{}_1.jpg"], ids=["folders", "names"])
def test_patients_in_several_split_folders_are_a_warning(name, tmp_path, data, capsys):
    names = [name.format(label, f"patient{label}{p}") for label in "ab" for p in range(4)]
    names += [file.replace("1.jpg", "2.jpg") for file in names]
    files = {f"{split}/{file}": jpeg(photograph(0)) for split in ("train", "test") for file in names}
    folder = write_folder(tmp_path / "scans", files)
    prepare("image_folder", "--source", folder, "--name", "scans", "--data_dir", tmp_path)
    out = capsys.readouterr().out
    assert re.search(r"warning: 8 of 8 (folders below a class|names, .*) are in several splits", out)
    assert "move the files of each into one split folder" in out


@pytest.mark.parametrize("name", ["{}/{}/{}.jpg", "{}/{}_{}.jpg"], ids=["folders", "names"])
def test_the_expression_of_the_warning_groups_all_other_files_too(name, tmp_path, data, capsys):
    files = {name.format(label, f"patient{label}{p}", k): b"" for label in "ab" for p in range(10) for k in range(4)}
    files = dict.fromkeys((*files, "a/cover.jpg", "b/cover.jpg", "b/7.jpg"), jpeg(photograph(0)))
    folder = write_folder(tmp_path / "scans", files)
    arguments = ["image_folder", "--source", folder, "--name", "scans", "--data_dir", tmp_path]
    prepare(*arguments)
    expression = re.search("--groups '(.*)'", capsys.readouterr().out)[1]
    prepare(*arguments, "--overwrite", "--groups", expression, "--json")
    report = json.loads(capsys.readouterr().out)
    assert sum(report["num_examples"].values()) == len(files)


def test_names_that_tell_class_or_camera_are_no_warning():
    for name in (
        "a/rose_{}.jpg",
        "a/{}.jpg",
        "a/IMG_{:04}.jpg",
        "a/{:05}.jpg",
        "a/n01440764_{}.JPEG",
        "a/{0}frog{0}x.png",
    ):
        keys = [name.format(number).replace("a/", f"{'ab'[number % 2]}/") for number in range(100)]
        assert groups.near_duplicates(keys, [key[0] for key in keys], divided(keys), in_folders=False) == []


def test_folds_are_read_together(scans, tmp_path, data, capsys):
    arguments = ["image_folder", "--source", scans, "--name", "scans", "--data_dir", tmp_path]
    prepare(*arguments, "--folds", "4", "--groups", "(patient..)_", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["num_examples"] == {f"fold{n}": 20 for n in range(4)}
    whole = [opened(data, tmp_path, "scans", split) for split in ("fold0", "fold1+fold2+fold3")]
    names = [set(source.column("group")) for source in whole]
    assert [len(source) for source in whole] == [20, 60]
    assert not names[0] & names[1]
    assert whole[1].info.num_classes == 2


def test_a_group_in_two_split_folders_is_refused_by_name(tmp_path):
    files = ["train/a/p1_1.jpg", "train/a/p2_1.jpg", "val/a/p1_2.jpg", "test/a/p3_1.jpg"]
    folder = write_folder(tmp_path / "f", {name: jpeg(photograph(0)) for name in files})
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path]
    with pytest.raises(BadDataError, match=r"1 of 3 groups .*: p1 \(train and validation\)"):
        prepare(*arguments, "--groups", r"(p\d)_")
    (folder / files[2]).rename(folder / "val/a/p4_2.jpg")
    prepare(*arguments, "--groups", r"(p\d)_")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--groups", "patient"], UsageError, "has 0 capture groups"),
        (["--groups", "("], UsageError, "not a regular expression"),
        (["--groups", r"(patienta\d)"], BadDataError, "40 of 80 files have no group"),
        (["--groups", "missing.csv"], InputMissingError, "there is no table of groups"),
        (["--splits", "train=0.8,test=0.3"], UsageError, "--splits is"),
        (["--splits", "train=0.8,test"], UsageError, "--splits is"),
        (["--splits", "train=0.8,test=0.1,test=0.1"], UsageError, "--splits is"),
        (["--splits", "train=1,test=0"], UsageError, "--splits is"),
        (["--splits", "train=0.5,test=nan"], UsageError, "--splits is"),
        (["--name", "synthetic"], UsageError, "which is another dataset"),
        (["--name", "imagenet2012"], UsageError, "which is another dataset"),
        (["--folds", "1"], UsageError, "--folds is 1"),
        (["--folds", "2", "--splits", "train=1"], UsageError, "exclude each other"),
    ],
)
def test_wrong_options(scans, tmp_path, arguments, error, words):
    with pytest.raises(error, match=words):
        prepare("image_folder", "--source", scans, "--name", "scans", "--data_dir", tmp_path, *arguments)


def test_a_split_can_have_any_name_of_letters(tmp_path, capsys):
    folder = write_folder(tmp_path / "f", {f"a/{number}.jpg": jpeg(photograph(number)) for number in range(4)})
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path, "--json"]
    prepare(*arguments, "--splits", "source=0.5,target=0.5")
    assert json.loads(capsys.readouterr().out)["num_examples"] == {"source": 2, "target": 2}


def test_split_folders_are_not_divided_again(tmp_path):
    folder = write_folder(tmp_path / "f", {"train/a/1.jpg": jpeg(photograph(0))})
    with pytest.raises(UsageError, match="already divided into train"):
        prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path, "--folds", "2")
    table = tmp_path / "table.csv"
    table.write_text("name,patient\n")
    with pytest.raises(BadDataError, match="columns are name, patient"):
        prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path, "--groups", table)


def test_a_damaged_image_is_refused_or_skipped_by_name(tmp_path, data, capsys):
    files = {"train/a/good.jpg": jpeg(photograph(0)), "train/a/bad.jpg": jpeg(photograph(1))[:900]}
    folder = write_folder(tmp_path / "folder", files)
    arguments = ["image_folder", "--source", folder, "--name", "folder", "--data_dir", tmp_path]
    with pytest.raises(BadDataError) as error:
        prepare(*arguments)
    assert error.value.where.endswith("train/a/bad.jpg")
    prepare(*arguments, "--skip_damaged", "--json")
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
    names = [
        "train/.ipynb_checkpoints/a.jpg",
        "train/__MACOSX/a.jpg",
        "train/daisy/@eaDir/a.jpg/SYNO_M.jpg",
        "train/daisy/._a.png",
        ".val/daisy/a.jpg",
    ]
    folder = write_folder(tmp_path / ".f", {name: b"no image" for name in names} | {"train/daisy/a.jpg": image})
    (folder / "train" / "tulip").mkdir()
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path]
    prepare(*arguments, "--json")
    report = json.loads(capsys.readouterr().out)
    assert (report["num_examples"], report["classes"]) == ({"train": 1}, ["daisy"])
    assert report["skipped"] == {"a class without images": [str(folder / "train/tulip")]}
    prepare(*arguments)
    assert "classes (" not in capsys.readouterr().out  # the existing dataset may be of another folder


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


def test_no_folder_is_entered_twice_however_links_fan_out_or_folders_nest(tmp_path):
    for number in range(30):
        (tmp_path / f"f{number}").mkdir()
        (tmp_path / f"f{number}" / "x.jpg").touch()
        for link in "ab":
            (tmp_path / f"f{number}" / link).symlink_to(f"../f{number + 1}")
    assert len(list(folders.files(tmp_path / "f0"))) == 30 + 2  # and two links that lead nowhere
    deep = tmp_path / "deep"
    deep.mkdir()
    here = os.open(deep, os.O_RDONLY)
    for _ in range(1200):  # paths of this length cannot be opened, but folders nest without a limit
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    try:
        assert list(folders.files(deep)) == []
    finally:
        subprocess.run(["rm", "-rf", deep], check=True)  # shutil.rmtree, which pytest uses, recurses too deeply


def test_capital_letters_and_a_missing_train(tmp_path, data, capsys):
    folder = write_folder(tmp_path / "f", {f"{split}/a/1.jpg": jpeg(photograph(0)) for split in ("Train", "Test")})
    prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path)
    assert opened(data, tmp_path, "f", "train").info.class_names == ("a",)
    folder = write_folder(tmp_path / "g", {"test/a/1.jpg": jpeg(photograph(0))})
    for _ in range(2):
        with pytest.raises(BadDataError, match="no training folder next to test"):
            prepare("image_folder", "--source", folder, "--name", "g", "--data_dir", tmp_path)
        (folder / "labels.csv").write_text("a file is no class")


def test_a_file_in_two_groups_is_refused(tmp_path):
    folder = write_folder(tmp_path / "f", {f"a/{number}.jpg": jpeg(photograph(number)) for number in range(3)})
    table = tmp_path / "table.csv"
    table.write_text("file,group\na/0.jpg,p1\na/1.jpg,p2\na/2.jpg,p3\na/0.jpg,p1\na/0.jpg,p2\n")
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path, "--groups", table]
    with pytest.raises(BadDataError, match=r"a/0\.jpg is in the groups p1 and p2"):
        prepare(*arguments)
    table.write_text("group,file\np1,a/0.jpg\np2\n")
    with pytest.raises(BadDataError, match="line 3 has no file"):
        prepare(*arguments)


def test_a_class_whose_images_are_all_damaged_is_refused(tmp_path):
    files = {"train/a/1.jpg": jpeg(photograph(0)), "train/b/1.jpg": b"damaged", "val/a/1.jpg": b"damaged"}
    folder = write_folder(tmp_path / "f", files)
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path, "--skip_damaged"]
    with pytest.raises(BadDataError, match="1 of 2 classes") as error:
        prepare(*arguments)
    assert error.value.where == "b"
    write_folder(folder, {"train/b/2.jpg": jpeg(photograph(1))})
    assert prepare(*arguments) == 0


def test_an_empty_folder_is_missing_input(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputMissingError):
        prepare("image_folder", "--source", tmp_path / "empty", "--name", "empty", "--data_dir", tmp_path)


def test_splits_that_would_be_empty_are_refused_or_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "f", {f"{label}/{n}.jpg": jpeg(photograph(n)) for label in "ab" for n in range(3)})
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path]
    for options, empty in ((["--folds", 10], "fold6, fold7"), (["--splits", "train=0.99,test=0.01"], "test")):
        with pytest.raises(BadDataError, match=f"6 images leave {empty}"):
            prepare(*arguments, *options)
    with pytest.raises(UsageError, match="--folds"):
        prepare(*arguments, "--folds", 20_000_000)
    with pytest.raises(UsageError, match="--splits"):  # TFDS takes it for all splits
        prepare(*arguments, "--splits", "train=0.5,all=0.5")
    assert prepare(*arguments) == 0
    assert "6 images leave test without any: the dataset has no such split" in capsys.readouterr().out


def test_nothing_left_of_a_folder_is_an_error(tmp_path):
    folder = write_folder(tmp_path / "f", {f"{label}/{n}.jpg": b"damaged" for label in "ab" for n in range(9)})
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path, "--skip_damaged"]
    with pytest.raises(BadDataError, match="there is no example"):
        prepare(*arguments, "--folds", 2)
    assert not (tmp_path / "f" / "1.0.0").exists()


@pytest.mark.parametrize(("link", "target"), [("cat/more", "dog"), ("puppy", "dog"), ("cat/2.jpg", "dog/1.jpg")])
def test_a_link_does_not_change_the_label_of_an_image(tmp_path, link, target):
    folder = write_folder(tmp_path / "f", {f"{label}/1.jpg": jpeg(photograph(0)) for label in ("cat", "dog")})
    (folder / link).symlink_to(folder / target)
    with pytest.raises(BadDataError, match="leads to the class 'dog'") as error:
        prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path)
    assert error.value.where.endswith(link)


@pytest.mark.parametrize(("first", "second"), [("cat/more", "dog/more"), ("cat/more", "wolf")])
def test_two_classes_do_not_share_a_folder_elsewhere(tmp_path, first, second):
    folder = write_folder(tmp_path / "f", {f"{label}/1.jpg": jpeg(photograph(0)) for label in ("cat", "dog")})
    other = write_folder(tmp_path / "other", {"1.jpg": jpeg(photograph(1))})
    for link in (first, second):
        (folder / link).symlink_to(other)
    with pytest.raises(BadDataError, match="leads to the class 'cat'") as error:
        prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path)
    assert error.value.where.endswith(second)


def test_classes_can_be_links_into_one_folder(tmp_path, capsys):
    pool = write_folder(tmp_path / "pool", {f"{number}.jpg": jpeg(photograph(number)) for number in range(4)})
    for number in range(4):
        folder = tmp_path / "f" / "train" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").symlink_to(pool / f"{number}.jpg")
    too_long = tmp_path / "f" / "train" / "cat" / "long.jpg"
    too_long.symlink_to("a" * 255 + "/" + "b" * 300)
    loop = too_long.with_name("loop.jpg")
    loop.symlink_to(loop.name)
    prepare("image_folder", "--source", tmp_path / "f", "--name", "f", "--data_dir", tmp_path, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["num_examples"] == {"train": 4}
    assert report["skipped"] == {"a broken link or not a regular file": sorted(map(str, (too_long, loop)))}


def test_two_splits_do_not_share_images_by_a_link(tmp_path):
    folder = write_folder(tmp_path / "f", {f"train/{label}/1.jpg": jpeg(photograph(0)) for label in ("cat", "dog")})
    (folder / "validation").symlink_to(folder / "train")
    with pytest.raises(BadDataError, match="the splits train and validation share a folder"):
        prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path)


def test_common_names_of_split_folders(tmp_path, capsys):
    names = [f"{split}/{label}/{split}.jpg" for split in ("Training", "Testing", "val_set") for label in "ab"]
    folder = write_folder(tmp_path / "f", {name: jpeg(photograph(n)) for n, name in enumerate(names)})
    assert prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_examples"] == {"train": 2, "validation": 2, "test": 2}


def test_an_image_that_cannot_be_read_is_named(tmp_path, capsys):
    folder = write_folder(tmp_path / "f", {f"train/{label}/1.jpg": jpeg(photograph(0)) for label in "ab"})
    (folder / "train" / "a" / "z.png").symlink_to("/proc/self/mem")  # reading it is an input/output error
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path]
    with pytest.raises(StorageError, match="an image cannot be read") as error:
        prepare(*arguments)
    assert error.value.where.endswith("train/a/z.png")
    prepare(*arguments, "--skip_damaged", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["num_examples"] == {"train": 2}
    assert report["skipped"] == {"unreadable": [f"{folder}/train/a/z.png"]}


def test_a_single_class_is_a_warning(tmp_path, capsys):
    files = {f"images/{split}/{label}/1.jpg": jpeg(photograph(0)) for split in ("train", "val") for label in "ab"}
    folder = write_folder(tmp_path / "f", files)
    prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path)
    assert "there is a single class, images: --source is a folder with" in capsys.readouterr().out


def test_other_labels_are_another_dataset(tmp_path, data):
    names = [f"{label}/{label}{n}.jpg" for label in ("cat", "dog", "emu") for n in range(4)]
    folder = write_folder(tmp_path / "f", {name: jpeg(photograph(n)) for n, name in enumerate(names)})

    def prepared() -> SourceInfo:
        arguments = ["--source", folder, "--name", "f", "--data_dir", tmp_path, "--splits", "train=1", "--overwrite"]
        prepare("image_folder", *arguments)
        return opened(data, tmp_path, "f").info

    first, again = prepared(), prepared()
    assert first.fingerprint == again.fingerprint
    (folder / "emu").rename(folder / "ant")
    renamed = prepared()
    (folder / "cat" / "cat0.jpg").rename(folder / "swap")
    (folder / "dog" / "dog0.jpg").rename(folder / "cat" / "cat0.jpg")  # as many images, of the same bytes in all
    (folder / "swap").rename(folder / "dog" / "dog0.jpg")
    swapped = prepared()
    assert len({info.fingerprint for info in (first, renamed, swapped)}) == 3
    assert renamed.class_names == swapped.class_names == ("ant", "cat", "dog")


def test_a_run_does_not_resume_with_other_classes(tmp_path):
    """Datasets that earlier versions prepared have the same fingerprint after a class was renamed."""
    trained, now = (json.dumps(names) for names in (("cat", "dog", "emu"), ("ant", "cat", "dog")))
    record = {"step": 5, "identity": {"dataset": "a" * 64, "classes": trained}}
    refuse_other_dataset(tmp_path / "5", record, "a" * 64, trained)
    refuse_other_dataset(tmp_path / "5", {"step": 5, "identity": {"dataset": "a" * 64}}, "a" * 64, now)
    with pytest.raises(BadDataError, match="different dataset: class 0 was 'cat', now 'ant'") as error:
        refuse_other_dataset(tmp_path / "5", record, "a" * 64, now)
    assert "allow_dataset_change" in error.value.fix
    with pytest.raises(BadDataError, match="different dataset: 3 classes, now 4"):
        refuse_other_dataset(tmp_path / "5", record, "a" * 64, json.dumps(["cat", "dog", "emu", "owl"]))


NFC, NFD = "caf\xe9", "cafe\u0301"


@pytest.mark.parametrize("names", [(NFC, NFD), ("cat", "cat\u200b")])
def test_two_folders_that_look_the_same_are_refused(tmp_path, names):
    image = jpeg(photograph(0))
    folder = write_folder(tmp_path / "f", {f"{name}/{n}.jpg": image for n, name in enumerate((*names, "tea"))})
    with pytest.raises(BadDataError, match="two classes have names that look the same") as error:
        prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path)
    assert ascii(names[1]) in str(error.value)
    folder = write_folder(tmp_path / "g", {f"train/{names[0]}/1.jpg": image, f"validation/{names[1]}/1.jpg": image})
    with pytest.raises(BadDataError, match="a class of validation only looks like one of train") as error:
        prepare("image_folder", "--source", folder, "--name", "g", "--data_dir", tmp_path)
    assert ascii(names[0]) in str(error.value)
    assert error.value.fix == "give the two folders the same name"


@pytest.mark.parametrize("trains", ["train", "train/steam", "Training"])
def test_a_class_called_train_is_not_taken_for_all_classes(tmp_path, trains):
    files = [f"{label}/{n}.jpg" for label in ("bus", "car", trains) for n in range(2)]
    folder = write_folder(tmp_path / "f", {name: jpeg(photograph(n)) for n, name in enumerate(files)})
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path]
    name = trains.partition("/")[0]
    with pytest.raises(BadDataError, match=f"bus, car beside {name} are neither splits nor in {name}") as error:
        prepare(*arguments)
    assert len(str(error.value).splitlines()) == 3
    (folder / name).rename(folder / "railway")
    assert prepare(*arguments) == 0


def test_what_lies_beside_split_folders_without_images_is_skipped(tmp_path, capsys):
    names = ["train/a/1.jpg", "dev/a/2.jpg", "raw/a/3.jpg"]
    folder = write_folder(tmp_path / "f", {name: jpeg(photograph(n)) for n, name in enumerate(names)})
    arguments = ["image_folder", "--source", folder, "--data_dir", tmp_path, "--json"]
    prepare(*arguments, "--name", "f")
    report = json.loads(capsys.readouterr().out)
    assert report["num_examples"] == {"train": 1, "validation": 1}
    assert report["skipped"] == {"neither a split nor in one": [f"{folder}/raw"]}
    (folder / "dev").rename(folder / ".dev")
    (folder / "raw" / "a" / "3.jpg").rename(folder / "raw" / "notes.txt")
    prepare(*arguments, "--name", "g")
    assert json.loads(capsys.readouterr().out)["num_examples"] == {"train": 1}


def test_no_images_says_what_was_skipped(tmp_path):
    folder = write_folder(tmp_path / "f", {"train/1.jpg": jpeg(photograph(0)), "train/a/notes.txt": b""})
    with pytest.raises(InputMissingError, match="there are no images") as error:
        prepare("image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path)
    assert f"skipped, not in the folder of a class (1): {folder}/train/1.jpg" in error.value.what
    assert f"skipped, not the name of an image (1): {folder}/train/a/notes.txt" in error.value.what
    assert len(str(error.value).splitlines()) == 3


def test_equal_files_in_several_splits_and_classes_are_a_warning(tmp_path, capsys):
    names = [f"{split}/{label}/{n}.jpg" for split in ("train", "val") for label in ("cat", "dog") for n in range(2)]
    folder = write_folder(tmp_path / "f", {name: jpeg(photograph(n)) for n, name in enumerate(names)})
    arguments = ["image_folder", "--source", folder, "--name", "f", "--data_dir", tmp_path]
    (folder / "train/cat/again.jpg").symlink_to("0.jpg")
    prepare(*arguments)
    assert "warning" not in capsys.readouterr().out
    (folder / "val/cat/link.jpg").symlink_to("../../train/cat/0.jpg")
    for copy in ("train/dog/copy.jpg", "val/dog/copy.jpg"):
        (folder / copy).write_bytes((folder / "train/cat/1.jpg").read_bytes())
    prepare(*arguments, "--overwrite", "--json")
    assert json.loads(capsys.readouterr().out)["warnings"] == [
        "warning: some images are there more than once: 2 in several splits, 1 in several classes, "
        "first: train/cat/0.jpg and val/cat/link.jpg"
    ]


def test_a_table_of_groups_from_windows(scans, tmp_path, capsys):
    table = tmp_path / "groups.csv"
    rows = [f"{path.parent.name}\\{path.name},{path.name[:9]}" for path in scans.rglob("*.jpg")]
    table.write_text("\r\n".join(["file,group", *rows]))
    arguments = ["image_folder", "--source", scans, "--name", "scans", "--data_dir", tmp_path, "--groups", table]
    prepare(*arguments, "--json")
    assert json.loads(capsys.readouterr().out)["groups"] == {"train": 16, "validation": 2, "test": 2}


def test_groups_leave_train_a_file_of_every_class():
    """The shares alone would leave class b out of train."""
    found = divide_groups(["p0", "p1", "p2"], ["a", "a", "b"], {"train": 0.5, "test": 0.5})
    assert {label for split, label in zip(found, "aab", strict=True) if split == "train"} == {"a", "b"}
