"""Builds the inputs from which fuzzing starts: small files of every kind, most of them good."""

from __future__ import annotations

import functools
import gzip
import io
import json
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

from tests.fuzz.readers import SEPARATOR, masked_crc

PIXELS = np.add.outer(np.arange(24), np.arange(32)).astype(np.uint8)[..., None] * np.array([3, 5, 7], np.uint8)


def encoded(image_format: str, mode: str = "RGB", **options: Any) -> bytes:
    """Encodes a small image."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def images() -> dict[str, bytes]:
    """Returns images of all formats."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    return {
        "baseline": encoded("JPEG"),
        "progressive": encoded("JPEG", progressive=True, exif=exif),
        "grey": encoded("JPEG", "L"),
        "cmyk": encoded("JPEG", "CMYK"),
        "png": encoded("PNG", exif=exif),
        "palette": encoded("PNG", "P"),
        "alpha": encoded("PNG", "RGBA"),
        "deep": encoded("PNG", "I;16"),
        "apng": encoded("PNG", save_all=True, append_images=frames[1:]),
        "webp": encoded("WEBP", exif=exif),
        "lossless": encoded("WEBP", lossless=True),
        "animation": encoded("WEBP", save_all=True, append_images=frames[1:]),
    }


def legacy_h5() -> dict[str, bytes]:
    """Returns files as Keras 2 wrote them."""
    return {"weights": _legacy(root=False), "model": _legacy(root=True)}


def _legacy(root: bool) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        group = file.create_group("model_weights") if root else file
        if root:
            layer = {"class_name": "Conv2D", "config": {"name": "c", "filters": 4, "kernel_size": [3, 3]}}
            model = {"class_name": "Functional", "config": {"name": "m", "layers": [layer]}}
            file.attrs["model_config"] = json.dumps(model)
        group.attrs["layer_names"] = [b"block1_conv1", b"block1_conv1_bn", b"predictions"]
        group.attrs["backend"] = b"tensorflow"
        tensors = {
            "block1_conv1": {"kernel:0": (3, 3, 3, 4)},
            "block1_conv1_bn": dict.fromkeys(("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0"), (4,)),
            "predictions": {"kernel:0": (4, 2), "bias:0": (2,)},
        }
        for layer, weights in tensors.items():
            inner = group.create_group(layer)
            inner.attrs["weight_names"] = [f"{layer}/{name}".encode() for name in weights]
            for name, shape in weights.items():
                inner[f"{layer}/{name}"] = np.ones(shape, np.float32)
    return buffer.getvalue()


def weights_h5() -> dict[str, bytes]:
    """Returns files as Keras 3 writes them with `save_weights`."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, shapes in {
            "conv2d": [(3, 3, 3, 4)],
            "batch_normalization": [(4,)] * 4,
            "separable_conv2d": [(3, 3, 4, 1), (1, 1, 4, 4)],
            "dense": [(4, 2), (2,)],
        }.items():
            for number, shape in enumerate(shapes):
                file[f"layers/{name}/vars/{number}"] = np.ones(shape, np.float32)
    return {"weights": buffer.getvalue()}


def keras() -> dict[str, bytes]:
    """Returns files as Keras 3 writes them with `save`: archives of a description and of weights."""
    (weights,) = weights_h5().values()
    layer = {"class_name": "Conv2D", "config": {"name": "conv2d", "filters": 4, "kernel_size": [3, 3]}}
    config = {"class_name": "Functional", "config": {"name": "m", "layers": [layer]}}
    found = {}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            archive.writestr("metadata.json", json.dumps({"keras_version": "3.0.0"}))
            archive.writestr("config.json", json.dumps(config))
            archive.writestr("model.weights.h5", weights)
        found["deflated" if method else "stored"] = buffer.getvalue()
    return found


def safetensors() -> dict[str, bytes]:
    """Returns files of our own, whose metadata describes the network."""
    from xception_jax.config import XceptionConfig
    from xception_jax.weights import Network, Preprocessing, save_network, tree

    model = XceptionConfig(num_classes=2, width_multiplier=0.01, middle_blocks=0)
    leaves = {name: np.ones(shape, np.float32) for name, shape in tree.shapes(model).items()}
    network = Network(model, tree.unflatten(leaves), Preprocessing(), ("cat", "dog"), "", "")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.safetensors"
        save_network(path, network)
        return {"own": path.read_bytes(), "empty": struct.pack("<Q", 2) + b"{}"}


def timm() -> dict[str, bytes]:
    """Returns files in timm's layout, with some of the tensors."""
    import safetensors.numpy

    shapes = {
        "conv1.weight": (4, 3, 3, 3),
        "bn1.weight": (4,),
        "bn1.running_mean": (4,),
        "block1.rep.0.conv1.weight": (4, 1, 3, 3),
        "block1.rep.0.pointwise.weight": (8, 4, 1, 1),
        "fc.weight": (2, 8),
        "fc.bias": (2,),
    }
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    prefixed = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return {
        "xception": safetensors.numpy.save(tensors, {"format": "pt"}),
        "inception": safetensors.numpy.save({"Conv2d_1a_3x3.conv.weight": np.ones((4, 3, 3, 3), np.float32)}),
        "prefixed": safetensors.numpy.save(prefixed),
    }


def config() -> dict[str, bytes]:
    """Returns resolved configs."""
    from xception_jax.config import default_config, resolve, to_json

    inception = {"model": {"name": "inception_v3"}, "optimizer": {"name": "adamw"}, "schedule": {"name": "cosine"}}
    return {"default": to_json(resolve(default_config())).encode(), "other": json.dumps(inception).encode()}


def metrics() -> dict[str, bytes]:
    """Returns metrics files."""
    entry = {"step": 20, "split": "train", "loss": 0.5, "seconds": 1.25, "classes": [1, None, 0.5]}
    lines = [json.dumps(entry | {"step": step, "split": split}) for step in (20, 40) for split in ("train", "test")]
    return {"run": "\n".join(lines).encode() + b"\n", "torn": "\n".join(lines).encode()[:-9]}


def manifest() -> dict[str, bytes]:
    """Returns the manifest of a directory without files."""
    from xception_jax.training import manifest

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "a").mkdir()
        (Path(directory) / "a" / "b").write_bytes(b"content")
        manifest.write(Path(directory) / "a", {"step": 20, "config": "0" * 64})
        return {"one file": (Path(directory) / "a" / manifest.NAME).read_bytes()}


def tfrecord() -> dict[str, bytes]:
    """Returns files of records."""
    records = [struct.pack("<Q", len(record)) + masked_crc(struct.pack("<Q", len(record))) + record + masked_crc(record)
               for record in (b"", b"one", bytes(100))]  # fmt: skip
    return {"three": b"".join(records), "truncated": b"".join(records)[:-5]}


@functools.cache
def shard() -> bytes:
    """Returns an ArrayRecord file of six examples of five classes."""
    return _dataset()[0]


@functools.cache
def _dataset() -> tuple[bytes, bytes, bytes]:
    import tensorflow_datasets as tfds

    from xception_jax.data.prepare.writer import Dataset, write_dataset

    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=5)}
    examples = [(str(n), {"image": encoded("PNG"), "label": n % 5}) for n in range(6)]
    dataset = Dataset("photos", tfds.features.FeaturesDict(features), {"train": examples}, "Test images.")
    with tempfile.TemporaryDirectory() as directory:
        path = write_dataset(dataset, Path(directory), progress=False).path
        (records,) = path.glob("*.array_record*")
        return records.read_bytes(), (path / "dataset_info.json").read_bytes(), (path / "features.json").read_bytes()


def array_record() -> dict[str, bytes]:
    """Returns the parts of a shard that are not zero."""
    from array_record.python.array_record_module import ArrayRecordWriter

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for number in range(4):
            writer.write(bytes([number] * 9))
        writer.close()
        content = path.read_bytes()
    return {"four": content[:65536].rstrip(b"\0") + SEPARATOR + content[65536:].rstrip(b"\0"), "zeros": SEPARATOR}


_LEGACY_IMAGE = {"shape": [None, None, 3], "dtype": "uint8", "encoding_format": "png"}


def dataset() -> dict[str, bytes]:
    """Returns descriptions of a dataset."""
    _, info, features = _dataset()
    # An example in the form of TensorFlow: {"image": bytes "x", "label": int64 1}.
    record = bytes.fromhex("0a200a0e0a056c6162656c12051a030a01010a0e0a05696d61676512050a030a0178")
    legacy = {
        "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "content": {
            "image": {
                "type": "tensorflow_datasets.core.features.image_feature.Image",
                "content": _LEGACY_IMAGE,
            },
            "label": {
                "type": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
                "content": {"num_classes": 5},
            },
        },
    }
    return {
        "numbers": SEPARATOR.join((info, features)),
        "names": SEPARATOR.join((info, features, b"a\nb\nc\nd\ne\n")),
        "record": SEPARATOR.join((info, features, b"", record)),
        "legacy": SEPARATOR.join((info, json.dumps(legacy).encode())),
    }


def archive() -> dict[str, bytes]:
    """Returns archives."""
    inner = _tar({"n01440764_1.JPEG": b"\xff\xd8\xff"})
    plain = _tar({"n01440764.tar": inner, "folder/a.JPEG": b"12", "._a.JPEG": b""})
    found = {name: _tar({"\u00e4" * 120 + ".JPEG": b"1"}, kind) for name, kind in _TAR_FORMATS.items()}
    return found | {"nested": plain, "compressed": gzip.compress(plain), "inner": _tar({"a.tar": gzip.compress(inner)})}


_TAR_FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def _tar(files: dict[str, bytes], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue().rstrip(b"\0") + bytes(1536)


def arguments() -> dict[str, bytes]:
    """Returns a command line of each command."""
    lines = {
        "train": "train --config=fashion_mnist --workdir=w --config.schedule.learning_rate=0.1 --config.seed 3",
        "variant": "train --config=imagenet:xception --workdir w --config.model.middle_blocks=2",
        "prepare": "prepare image_folder --source a --name b --splits train=0.5,test=0.5 --groups (a)_ --folds 3",
        "predict": "predict --weights m a.jpg b --top=3 --json",
        "evaluate": "evaluate m --split=test[:50%] --batch_size=8 --at 0.5",
        "explain": "explain --weights m a.jpg --method grad_cam --class 3 --steps 5",
        "embed": "embed --weights m --out a.npz a",
        "probe": "probe a.npz b.npz --seed=3",
        "export": "export m d --format onnx",
        "weights": "weights list",
        "convert": "convert a.h5 b.safetensors --size 299",
        "study": "study run separability --seeds 3",
        "plan": "plan --config=imagenet --config.batch_size=64 --topology v5e:2x2",
        "help": "train --help",
    }
    return {name: line.replace(" ", "\n").encode() for name, line in lines.items()}
