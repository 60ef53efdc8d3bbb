"""A small ImageNet of real photographs: the two archives in the layout of ILSVRC 2012, with the oddities of the set."""

from __future__ import annotations

import functools
import io
import tarfile
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from xception_jax.data.imagenet_classes import class_names
from xception_jax.data.prepare import imagenet

VALIDATION_NAME = "ILSVRC2012_val_{:08d}.JPEG"


@functools.cache
def photographs() -> tuple[np.ndarray, ...]:
    """RGB photographs that scikit-image and scikit-learn ship, uint8 [h, w, 3]."""
    # Imported late: both take seconds, and several tests start processes.
    import skimage.data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "coffee", "chelsea")
    return (*(getattr(skimage.data, name)() for name in names), *load_sample_images().images)


def photograph(number: int, size: int = 120) -> np.ndarray:
    """Cuts an image out of a photograph: another one for each number; taller than wide if the number is odd."""
    rng = np.random.default_rng(number)
    source = photographs()[number % len(photographs())]
    height, width = (size, size * 3 // 4) if number % 2 else (size * 3 // 4, size)
    top, left = rng.integers(source.shape[0] - height), rng.integers(source.shape[1] - width)
    return np.ascontiguousarray(source[top : top + height, left : left + width])


def jpeg(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(image, quality=90, colorspace="RGB")


def encoded(image: np.ndarray, image_format: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def odd_image(number: int) -> bytes:
    """Every fifth image is grey, CMYK or a PNG whose name ends in .JPEG, as some of ImageNet are."""
    image = photograph(number)
    match number % 15:
        case 4:
            return encoded(image, "JPEG", "L")
        case 9:
            return encoded(image, "JPEG", "CMYK")
        case 14:
            return encoded(image, "PNG")
    return jpeg(image)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def class_archive(wnid: str, images: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, image in enumerate(images):
            add(archive, f"{wnid}_{number}.JPEG", image)
    return buffer.getvalue()


def validation_numbers(classes: int, count: int) -> list[int]:
    """The first images of the validation set whose label is one of the first classes."""
    labels = {wnid: label for label, wnid in enumerate(class_names())}
    wnids = imagenet.validation_wnids()
    return [number for number, wnid in enumerate(wnids, start=1) if labels[wnid] < classes][:count]


def write_small_imagenet(directory: Path, *, classes: int = 3, train_per_class: int = 10, validation: int = 12) -> Path:
    """Writes ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.

    Args:
      directory: where to; it is made if it is not there.
      classes: the first so many of the 1,000.
      train_per_class: images in the archive of each class.
      validation: images in the validation archive, at most 50 for each class.

    Returns:
      The directory, for `prepare imagenet2012 --source`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(directory / imagenet.TRAIN_ARCHIVE, "w") as outer:
        for label, wnid in enumerate(class_names()[:classes]):
            numbers = range(label * train_per_class, (label + 1) * train_per_class)
            add(outer, f"{wnid}.tar", class_archive(wnid, [odd_image(number) for number in numbers]))
    with tarfile.open(directory / imagenet.VALIDATION_ARCHIVE, "w") as archive:
        for number in validation_numbers(classes, validation):
            add(archive, VALIDATION_NAME.format(number), odd_image(number))
    return directory
