"""Tests ImageNet from its two archives: as distributed, written by other programs, and damaged."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from tests.data.small_imagenet import (
    VALIDATION_NAME,
    add,
    class_archive,
    jpeg,
    odd_image,
    photograph,
    validation_numbers,
    write_small_imagenet,
)
from tests.data.test_prepare import opened, prepare
from xception_jax.data import images
from xception_jax.data.imagenet_classes import class_names
from xception_jax.data.prepare import imagenet
from xception_jax.errors import BadDataError, InputMissingError

WNIDS = class_names()


def run(source: Path, data_dir: Path) -> None:
    prepare("imagenet2012", "--source", source, "--data_dir", data_dir)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_small_imagenet(tmp_path_factory.mktemp("archives"))


@pytest.fixture
def source(small, tmp_path) -> Path:
    """Returns a separate directory with both archives, for tests that change them."""
    directory = tmp_path / "archives"
    directory.mkdir()
    for name in (imagenet.TRAIN_ARCHIVE, imagenet.VALIDATION_ARCHIVE):
        os.link(small / name, directory / name)
    return directory


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()  # a hard link to the archive of the other tests
    path.write_bytes(content)


def write_train(source: Path, write, mode: str = "w", **options) -> None:
    path = source / imagenet.TRAIN_ARCHIVE
    path.unlink()
    with tarfile.open(path, mode, **options) as archive:
        write(archive)


def test_images_labels_and_names_are_those_of_the_archives(small, tmp_path, data, capsys):
    run(small, tmp_path)
    out = capsys.readouterr().out
    assert "train: found 30 images; the complete dataset has 1,281,167" in out
    assert "validation: found 12 images; the complete dataset has 50,000" in out
    train = opened(data, tmp_path, "imagenet2012")
    assert train.info.num_classes == 1000
    assert train.info.class_names == tuple(sorted(WNIDS))
    found = {(train[i]["image"], train[i]["label"]) for i in range(len(train))}
    assert found == {(odd_image(number), number // 10) for number in range(30)}
    for image, _ in found:
        images.decode(image)
    validation = opened(data, tmp_path, "imagenet2012", "validation")
    found = {(validation[i]["image"], validation[i]["label"]) for i in range(len(validation))}
    wnids = imagenet.validation_wnids()
    assert found == {(odd_image(n), WNIDS.index(wnids[n - 1])) for n in validation_numbers(3, 12)}


def test_classes_are_those_of_tfds_in_its_order():
    assert class_names() == tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()


def test_the_labels_of_the_validation_set_are_the_public_ones():
    # ILSVRC2012_val_00000001.JPEG shows a sea snake, 00000003 a Shih-Tzu; every class has 50 images.
    wnids = imagenet.validation_wnids()
    assert (wnids[0], wnids[2]) == ("n01751748", "n02105855")
    assert len(wnids) == 50_000
    assert {wnids.count(wnid) for wnid in WNIDS[:20]} == {50}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_archives_of_other_makes(source, tmp_path, data, form, mode):
    def inner(wnid: str) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode, format=form) as archive:
            directory = tarfile.TarInfo(f"./{wnid}")
            directory.type = tarfile.DIRTYPE
            archive.addfile(directory)
            add(archive, f"./{wnid}/._{wnid}_9.JPEG", b"what macOS adds")
            add(archive, f"./{wnid}/.DS_Store", b"what macOS adds")
            for number, suffix in ((9, "JPEG"), (1, "jpeg"), (5, "jpg")):
                member = tarfile.TarInfo(
                    f"./{wnid}/{'x' * 120}/{wnid}_{number}.{suffix}" if form else f"{wnid}_{number}.JPEG"
                )
                content = jpeg(photograph(number))
                member.size = len(content)
                member.pax_headers = {"comment": "\u00fc"}
                archive.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    def write(archive: tarfile.TarFile) -> None:
        add(archive, "._n01443537.tar", b"what macOS adds")
        for label in (2, 0):  # neither sorted nor complete
            add(archive, f"./train/{WNIDS[label]}.tar", inner(WNIDS[label]))

    write_train(source, write, mode, format=form)
    run(source, tmp_path)
    train = opened(data, tmp_path, "imagenet2012")
    assert sorted(train[i]["label"] for i in range(len(train))) == [0, 0, 0, 2, 2, 2]
    assert {train[i]["image"] for i in range(len(train))} == {jpeg(photograph(number)) for number in (9, 1, 5)}


def test_a_path_that_leaves_the_directory_does_no_harm(source, tmp_path):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        add(archive, f"../../../../{WNIDS[0]}_1.JPEG", jpeg(photograph(1)))
    write_train(source, lambda archive: add(archive, f"/{WNIDS[0]}.tar", content.getvalue()))
    before = set(tmp_path.parent.rglob("*.JPEG"))
    run(source, tmp_path / "data")
    assert set(tmp_path.parent.rglob("*.JPEG")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
@pytest.mark.parametrize("where", ["outer", "inner"])
def test_links_and_devices_are_refused(source, tmp_path, kind, where):
    link = tarfile.TarInfo(f"{WNIDS[0]}.tar" if where == "outer" else f"{WNIDS[0]}_1.JPEG")
    link.type, link.linkname = kind, "/etc/passwd"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(link)

    def write(archive: tarfile.TarFile) -> None:
        if where == "outer":
            archive.addfile(link)
        else:
            add(archive, f"{WNIDS[0]}.tar", content.getvalue())

    write_train(source, write)
    with pytest.raises(BadDataError, match="contains") as error:
        run(source, tmp_path)
    assert "neither links nor devices" in error.value.fix


@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.3, 0.7, 0.85])
@pytest.mark.parametrize("name", [imagenet.TRAIN_ARCHIVE, imagenet.VALIDATION_ARCHIVE])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_archive_is_named_in_three_lines(source, tmp_path, name, kept, compressed):
    content = (source / name).read_bytes()
    content = gzip.compress(content, 1) if compressed else content
    rewrite(source / name, content[: int(len(content) * kept)])
    with pytest.raises(BadDataError, match="damaged at") as error:
        run(source, tmp_path / "data")
    assert name in error.value.where
    assert len(str(error.value).splitlines()) == 3
    assert not list((tmp_path / "data").glob("imagenet2012/5*"))


def test_an_archive_that_ends_between_two_members_is_damaged(source, tmp_path):
    path = source / imagenet.VALIDATION_ARCHIVE
    with tarfile.open(path) as archive:
        end_of_third = archive.getmembers()[3].offset
    rewrite(path, path.read_bytes()[:end_of_third])
    with pytest.raises(BadDataError, match="damaged at the member after ILSVRC2012_val"):
        run(source, tmp_path)


def test_a_damaged_header_is_not_taken_for_the_end(source, tmp_path):
    path = source / imagenet.VALIDATION_ARCHIVE
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        content[archive.getmembers()[3].offset + 20] ^= 0xFF
    rewrite(path, bytes(content))
    with pytest.raises(BadDataError, match="damaged at the member after ILSVRC2012_val"):
        run(source, tmp_path)


def test_a_truncated_inner_archive_is_named(source, tmp_path):
    inner = class_archive(WNIDS[1], [jpeg(photograph(number)) for number in range(3)])
    write_train(source, lambda archive: add(archive, f"{WNIDS[1]}.tar", inner[: len(inner) // 2]))
    with pytest.raises(BadDataError) as error:
        run(source, tmp_path)
    assert error.value.where == f"{imagenet.TRAIN_ARCHIVE}: {WNIDS[1]}.tar"


@pytest.mark.parametrize("missing", [imagenet.TRAIN_ARCHIVE, imagenet.VALIDATION_ARCHIVE])
def test_a_missing_archive_names_both(source, tmp_path, missing):
    (source / missing).unlink()
    with pytest.raises(InputMissingError, match=missing) as error:
        run(source, tmp_path)
    assert imagenet.TRAIN_ARCHIVE in error.value.fix
    assert imagenet.VALIDATION_ARCHIVE in error.value.fix


@pytest.mark.parametrize(
    "members",
    [
        [("n99999999.tar", class_archive("n99999999", [b""]))],
        [(f"{WNIDS[0]}_1.JPEG", b"an image in place of an archive")],
        [(f"{WNIDS[0]}.tar", class_archive(WNIDS[0], [b"1"])), (f"a/{WNIDS[0]}.tar", class_archive(WNIDS[0], [b"1"]))],
        [(f"{WNIDS[0]}.tar", class_archive(WNIDS[1], [b"1"]))],
    ],
    ids=["unknown class", "not an archive", "a class twice", "images of another class"],
)
def test_unexpected_members_are_refused(source, tmp_path, members):
    write_train(source, lambda archive: [add(archive, *member) for member in members])
    with pytest.raises(BadDataError, match="the archive contains"):
        run(source, tmp_path)


def test_an_image_that_comes_twice_is_refused(source, tmp_path):
    path = source / imagenet.VALIDATION_ARCHIVE
    path.unlink()
    with tarfile.open(path, "w") as archive:
        for directory in ("a", "b"):
            add(archive, f"{directory}/{VALIDATION_NAME.format(7)}", jpeg(photograph(0)))
    with pytest.raises(BadDataError, match="the same name, ILSVRC2012_val_00000007"):
        run(source, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "ILSVRC2012_val_00050001.JPEG",
        "n01440764_1.JPEG",
        "ILSVRC2012_val_00000001.txt",
        "ILSVRC2012_val_00000001_n01440764.JPEG",
    ],
)
def test_unexpected_validation_images_are_refused(source, tmp_path, name):
    path = source / imagenet.VALIDATION_ARCHIVE
    path.unlink()
    with tarfile.open(path, "w") as archive:
        add(archive, name, jpeg(photograph(0)))
    with pytest.raises(BadDataError, match="the archive contains"):
        run(source, tmp_path)
