"""Fashion-MNIST: the full dataset, the subset shipped with this package, and scenes and stacks made from the subset.

Xiao, Rasul and Vollgraf, "Fashion-MNIST", arXiv 1708.07747; MIT licence, Zalando SE. Images are padded with black from
28 x 28 to 32 x 32, so that no later step needs to resize them: set `data.image_size` to 32 (64 for the scenes, 28 for
the stacks, which have no padding) and `data.eval_crop` to 1.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from xception_jax.data.prepare.writer import Dataset
from xception_jax.errors import BadDataError, InputMissingError, StorageError
from xception_jax.files import open_regular

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SHIPPED = Path(__file__).parent.parent / "fashion_mnist"

SCENE_SIZE = 64
NUM_SCENES = {"train": 5000, "test": 1000}
MAX_GARMENTS = 4

STACKED = {"train": ("train", 0, 9000, 3), "dev": ("train", 9000, 10_000, 3), "test": ("test", 0, 2000, 5)}
"""Splits of the stacks: (split of the subset, first and last garment, stacks for each garment)."""

_FILE_PREFIXES = {"train": "train", "test": "t10k"}
_MAX_BYTES = 64 << 20  # of a file; the largest has 47 MB
_PADDING = ((0, 0), (2, 2), (2, 2))  # 28 x 28 to 32 x 32


def fashion_mnist(source: Path) -> Dataset:
    """Builds the full dataset, 60,000 training and 10,000 test images, from the four idx files in `source`."""
    return _single_label("fashion_mnist", source, "Fashion-MNIST, padded to 32 x 32.")


def fashion_mnist_subset() -> Dataset:
    """Builds the dataset of the first 10,000 training and 2,000 test images, which are shipped with this package."""
    return _single_label("fashion_mnist_subset", SHIPPED, "The first images of Fashion-MNIST, padded to 32 x 32.")


def fashion_mnist_scenes() -> Dataset:
    """Builds scenes of 64 x 64 pixels with one to four garments, each in its own cell, labelled with their classes.

    Training scenes are made from the shipped training images and test scenes from the shipped test images. The scenes
    are the same every time.
    """
    splits = {split: _scenes(*read_split(SHIPPED, split), NUM_SCENES[split], split) for split in NUM_SCENES}
    return Dataset(
        name="fashion_mnist_scenes",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SCENE_SIZE, SCENE_SIZE, 1), encoding_format="png"),
                "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=CLASS_NAMES)),
            }
        ),
        splits=splits,
        description="Scenes of one to four garments of Fashion-MNIST, for multi-label training.",
        expected=NUM_SCENES,
    )


def fashion_mnist_stacks() -> Dataset:
    """Builds images of 28 x 28 pixels whose three channels are three garments. The class is that of the first channel.

    Neither the channels nor the pixels tell the class by themselves: the grey image shows three garments on top of each
    other, and the brightness of a channel does not tell what it shows. The splits share no garment, and each garment of
    a split is the first channel of equally many stacks. The stacks are the same every time.
    """
    expected = {split: (last - first) * stacks for split, (_, first, last, stacks) in STACKED.items()}
    return Dataset(
        name="fashion_mnist_stacks",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=CLASS_NAMES),
            }
        ),
        splits={split: _stacks(split) for split in STACKED},
        description="Three garments of Fashion-MNIST as the channels of an image; the class is that of the first.",
        expected=expected,
    )


def _stacks(split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    source, first, last, stacks = STACKED[split]
    images, labels = (array[first:last] for array in read_split(SHIPPED, source))
    rng = np.random.default_rng(list(split.encode()))
    for number in range(stacks):
        second, third = rng.permutation(len(images)), rng.permutation(len(images))
        for index, label in enumerate(labels):
            stack = images[[third[index], second[index], index]].transpose(1, 2, 0)  # OpenCV writes blue first
            key = f"{index}_{number}"
            yield key, {"image": _png(np.ascontiguousarray(stack)), "label": int(label)}


def _single_label(name: str, source: Path, description: str) -> Dataset:
    arrays = {split: read_split(source, split) for split in _FILE_PREFIXES}
    return Dataset(
        name=name,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(32, 32, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=CLASS_NAMES),
            }
        ),
        splits={split: _examples(images, labels) for split, (images, labels) in arrays.items()},
        description=description,
        expected={split: len(labels) for split, (_, labels) in arrays.items()},
    )


def _examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, (image, label) in enumerate(zip(np.pad(images, _PADDING), labels, strict=True)):
        yield str(index), {"image": _png(image), "label": int(label)}


def _scenes(images: np.ndarray, labels: np.ndarray, count: int, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rng = np.random.default_rng(list(split.encode()))
    garments = np.pad(images, _PADDING)
    side = garments.shape[1]
    for index in range(count):
        chosen = rng.choice(len(garments), size=rng.integers(1, MAX_GARMENTS + 1), replace=False)
        cells = rng.permutation(MAX_GARMENTS)[: len(chosen)]
        scene = np.zeros((SCENE_SIZE, SCENE_SIZE), np.uint8)
        for cell, garment in zip(cells, chosen, strict=True):
            top, left = divmod(int(cell), SCENE_SIZE // side)
            scene[top * side : (top + 1) * side, left * side : (left + 1) * side] = garments[garment]
        yield str(index), {"image": _png(scene), "labels": sorted({int(label) for label in labels[chosen]})}


def _png(image: UInt8[np.ndarray, "h w"] | UInt8[np.ndarray, "h w 3"]) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def read_split(source: Path, split: str) -> tuple[UInt8[np.ndarray, "n 28 28"], UInt8[np.ndarray, " n"]]:
    """Reads images and labels of 'train' or 'test' from idx files, compressed or not.

    Raises:
      InputMissingError: a file is missing.
      BadDataError: a file is damaged, the images have another size, or the numbers of images and labels differ.
    """
    prefix = _FILE_PREFIXES[split]
    images = _read_idx(source / f"{prefix}-images-idx3-ubyte", num_dimensions=3)
    labels = _read_idx(source / f"{prefix}-labels-idx1-ubyte", num_dimensions=1)
    if images.shape[1:] != (28, 28):
        what = f"the images have {images.shape[1]} x {images.shape[2]} pixels, not 28 x 28"
        raise BadDataError(
            what, str(source / f"{prefix}-*"), "use the files of Fashion-MNIST, or `prepare image_folder`"
        )
    if len(images) != len(labels):
        raise BadDataError(
            f"there are {len(images)} images but {len(labels)} labels",
            str(source / f"{prefix}-*"),
            "use all four files from the same copy of Fashion-MNIST",
        )
    return images, labels


def _read_idx(path: Path, num_dimensions: int) -> np.ndarray:
    compressed = not path.is_file()
    path = path.with_name(path.name + ".gz") if compressed else path
    try:
        with open_regular(path) as file:
            data = (gzip.GzipFile(fileobj=file) if compressed else file).read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputMissingError(
            f"{path.name} is missing",
            str(path),
            "point --source at the four files of Fashion-MNIST (Debian: apt install dataset-fashion-mnist, then "
            "--source /usr/share/datasets/fashion-mnist)",
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadDataError(f"the file is damaged: {error}", str(path), "download it again") from error
    except OSError as error:
        what = f"the file cannot be read: {error.strerror}"
        raise StorageError(what, str(path), "check what it is, and its permissions") from error
    header = struct.Struct(f">HBB{num_dimensions}I")
    if len(data) >= header.size:
        zero, kind, dimensions, *shape = header.unpack_from(data)
        if (zero, kind, dimensions) == (0, 8, num_dimensions) and len(data) == header.size + math.prod(shape):
            return np.frombuffer(data, np.uint8, offset=header.size).reshape(shape)
    raise BadDataError("the file is not a complete idx file of bytes", str(path), "download it again")
