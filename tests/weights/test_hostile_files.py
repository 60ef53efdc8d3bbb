"""Hostile and damaged weight files are refused before any of their values are read."""

from __future__ import annotations

import contextlib
import gzip
import json
import lzma
import pickle
import struct
import zipfile

import h5py
import numpy as np
import pytest
import safetensors.numpy

from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.weights import load_network
from xception_jax.weights.parse import parse_file

KERNEL = "layers/conv2d/vars/0"


@pytest.fixture
def weights(tmp_path):
    """A small file in the format of Keras 3. It holds no whole network, so reading it ends in another error."""
    path = tmp_path / "x.weights.h5"
    with h5py.File(path, "w") as file:
        file[KERNEL] = np.ones((3, 3, 3, 32), np.float32)
        for i in range(4):
            file[f"layers/batch_normalization/vars/{i}"] = np.ones(32, np.float32)
    return path


def refusal(path) -> str:
    with pytest.raises(BadDataError) as caught:
        load_network(path)
    assert caught.value.exit_code == 65
    return str(caught.value)


def test_the_file_itself_is_read(weights):
    assert "neither Xception nor Inception V3" in refusal(weights)


def replace(path, make) -> None:
    with h5py.File(path, "a") as file:
        del file[KERNEL]
        make(file)


def test_an_external_link(weights, tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones((3, 3, 3, 32), np.float32)
    replace(weights, lambda file: file.__setitem__(KERNEL, h5py.ExternalLink(str(secret), "x")))
    assert "is a link to another place (ExternalLink)" in refusal(weights)


def test_a_soft_link(weights):
    replace(weights, lambda file: file.__setitem__(KERNEL, h5py.SoftLink("/layers/batch_normalization/vars/0")))
    assert "is a link to another place (SoftLink)" in refusal(weights)


def test_external_storage(weights, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(3456))
    external = [(str(tmp_path / "secret"), 0, 3456)]
    replace(weights, lambda file: file.create_dataset(KERNEL, (3, 3, 3, 32), "f4", external=external))
    assert "are in another file" in refusal(weights)


def test_a_virtual_dataset(weights, tmp_path):
    layout = h5py.VirtualLayout((3, 3, 3, 32), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "x", (3, 3, 3, 32))
    replace(weights, lambda file: file.create_virtual_dataset(KERNEL, layout))
    assert "are in another file" in refusal(weights)


@pytest.mark.parametrize(
    "dtype", [h5py.ref_dtype, h5py.string_dtype(), h5py.vlen_dtype(np.float32), "V8", [("a", "f4")]]
)
def test_something_other_than_numbers(weights, dtype):
    replace(weights, lambda file: file.create_dataset(KERNEL, (4,), dtype))
    assert "holds no numbers" in refusal(weights)


@pytest.mark.parametrize("options", [{"chunks": (64, 64)}, {"compression": "gzip", "chunks": (4096, 4096)}, {}])
def test_a_shape_bomb(weights, options):
    """A few bytes declare a terabyte that was never written, or consists of zeros."""

    def make(file):
        dataset = file.create_dataset(KERNEL, (500_000, 500_000), "f4", **options)
        if "compression" in options:
            dataset[:4096, :4096] = 0

    replace(weights, make)
    assert "declares 1,000,000,000,000 bytes" in refusal(weights)


def test_an_array_that_was_never_written(weights):
    replace(weights, lambda file: file.create_dataset(KERNEL, (3, 3, 3, 32), "f4"))
    assert "declares 3,456 bytes and stores 0" in refusal(weights)


def test_a_bomb_of_zeros_that_are_there(weights):
    replace(weights, lambda file: file.create_dataset(KERNEL, data=np.zeros((4096, 4096), "f4"), compression="gzip"))
    assert "declares 67,108,864 bytes" in refusal(weights)


def test_compressed_weights_are_welcome(weights):
    value = np.random.default_rng(0).normal(size=(3, 3, 3, 32)).astype(np.float32)
    replace(weights, lambda file: file.create_dataset(KERNEL, data=value, compression="gzip", shuffle=True))
    assert "neither Xception nor Inception V3" in refusal(weights)


def test_groups_in_a_circle(weights):
    with h5py.File(weights, "a") as file:
        file["layers/again"] = file["layers"]  # a hard link to what it stands in
    assert "deep" in refusal(weights)


def test_names_that_are_no_text(weights):
    with h5py.File(weights, "a") as file:
        file.attrs["layer_names"] = np.arange(3)
    assert "does not hold text" in refusal(weights)


def test_layers_that_are_not_there(weights):
    with h5py.File(weights, "a") as file:
        file.attrs["layer_names"] = np.array(["conv", "../../x"], "S")
    assert "is missing" in refusal(weights)


@pytest.mark.parametrize("kept", [0, 1, 100, 2000, 5000])
def test_a_truncated_file(weights, kept):
    content = weights.read_bytes()
    assert len(content) > 5000
    weights.write_bytes(content[:kept])
    refusal(weights)


def test_flipped_bytes_never_give_a_traceback(weights):
    content = weights.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(content)
        for place in rng.integers(8, 2500, 3):  # where the structure is
            damaged[place] ^= int(rng.integers(1, 256))
        weights.write_bytes(damaged)
        with contextlib.suppress(BadDataError):
            parse_file(weights)


class Opens:
    def __reduce__(self):
        return open, ("opened", "w")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.h5"])
def test_a_pickle_is_refused_whatever_it_is_called(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Opens()))
    assert "may run any code" in refusal(path)
    assert "safetensors" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:  # torch.save
        archive.writestr("archive/data.pkl", pickle.dumps(Opens()))
    assert "may run any code" in refusal(path)
    assert not (tmp_path / "opened").exists()


def archive(path, members: dict[str, bytes], **options) -> None:
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in members.items():
            file.writestr(name, content)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..\\x", "C:\\x"])
def test_an_archive_that_points_outside(weights, tmp_path, name):
    path = tmp_path / "x.keras"
    archive(path, {"config.json": b"{}", "model.weights.h5": weights.read_bytes(), name: b""})
    assert "points outside" in refusal(path)


def test_an_archive_with_a_link(tmp_path):
    path = tmp_path / "x.keras"
    link = zipfile.ZipInfo("model.weights.h5")
    link.external_attr = 0o120777 << 16
    archive(path, {"config.json": b"{}"})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, "/etc/passwd")
    assert "points outside" in refusal(path)


def test_an_archive_that_is_a_bomb(tmp_path):
    path = tmp_path / "x.keras"
    members = {"config.json": b"{}", "model.weights.h5": bytes(50_000_000)}
    archive(path, members, compression=zipfile.ZIP_DEFLATED)
    assert "declares 50,000,000 bytes" in refusal(path)


@pytest.mark.parametrize("config", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_an_archive_with_another_config(weights, tmp_path, config):
    path = tmp_path / "x.keras"
    archive(path, {"config.json": config, "model.weights.h5": weights.read_bytes()})
    refusal(path)


def test_an_archive_with_a_strange_architecture(weights, tmp_path):
    path = tmp_path / "x.keras"
    strange = {"config": {"layers": [{"class_name": ["Rescaling"], "config": 3}, {"config": {"layers": 7}}, 8]}}
    archive(path, {"config.json": json.dumps(strange).encode(), "model.weights.h5": weights.read_bytes()})
    assert "neither Xception nor Inception V3" in refusal(path)


def test_archives_that_keras_does_not_write(weights, tmp_path):
    path = tmp_path / "x.keras"
    archive(path, {"model.weights.h5": weights.read_bytes()})
    assert "no config.json" in refusal(path)
    archive(path, {"config.json": b"{}", "model.weights.h5": weights.read_bytes()})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(path)
    path.write_bytes(content[: len(content) // 2])
    assert "damaged" in refusal(path)


def test_safetensors_that_are_damaged(tmp_path):
    path = tmp_path / "x.safetensors"
    content = safetensors.numpy.save({"conv1.weight": np.ones((32, 3, 3, 3), np.float32)})
    path.write_bytes(content)
    assert "neither those of Xception" in refusal(path)
    for damaged in (content[:-1], content[:4], content[:40], b"\xff" * 7 + content[7:], content[:8] + b"{" * 50):
        path.write_bytes(damaged)
        refusal(path)
    path.write_bytes(struct.pack("<Q", 1 << 40) + content[8:])
    refusal(path)


def test_safetensors_without_floating_point_numbers(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors.numpy.save({"block1.rep.0.conv1.weight": np.ones((64, 1, 3, 3), np.int64)}))
    refusal(path)


def test_no_file_and_a_directory(tmp_path):
    for path in (tmp_path / "none.h5", tmp_path):
        with pytest.raises(InputMissingError):
            load_network(path)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (gzip.compress(b"weights" * 100, mtime=0), "compressed by gzip"),
        (lzma.compress(b"weights" * 100), "compressed by xz"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    ],
    ids=["gzip", "xz", "pointer", "page"],
)
def test_what_is_often_downloaded_instead_is_named(tmp_path, start, words):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(start)
    assert words in refusal(path)


def test_sharded_weights_are_named_and_joined(tmp_path):
    """The line that the message gives joins them, in an environment with PyTorch; here only what it says is tested."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert "the list of the parts" in refusal(index)
    part = tmp_path / "model-00001-of-00002.safetensors"
    part.write_bytes(safetensors.numpy.save({"a": np.ones(3, np.float32)}))
    assert "one of 2 parts" in refusal(part)
    only = part.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert "names of the tensors" in refusal(only)


def test_a_file_that_ends_before_its_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    assert "the file is empty" in refusal(path)
    path.write_bytes(safetensors.numpy.save({f"layer{i}": np.ones(3, np.float32) for i in range(99)})[:500])
    assert "the file ends within the header of safetensors" in refusal(path)
