"""Decodes image files, and crops, resizes and scales images for evaluation. Random views are in augmentation.py.

Decoding accepts JPEG, PNG and WebP and returns RGB bytes. An image is cropped before it is resized and stays uint8
until it has its final size, because one pass over a full photograph costs more than all later passes together.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 1 << 26
"""Limit for decoding, 67 million pixels; the largest image of ImageNet has 61 million."""

Interpolation = Literal["bilinear", "bicubic", "antialiased_bilinear", "antialiased_bicubic"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_ASPECT = 16

_ORIENTATION_TAG = 0x0112
_APP1, _START_OF_SCAN = b"\xe1", b"\xda"
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")

# The pipeline decodes many images in parallel; OpenCV's own threads would only compete with its threads.
cv2.setNumThreads(0)


class DamagedImageError(ValueError):
    """The bytes are not a complete image in a supported format: damaged, truncated, of another format or too large."""


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a JPEG, PNG or WebP image to RGB.

    Grey and palette images are expanded, CMYK is converted, 16-bit values keep their upper 8 bits, alpha is dropped (as
    in tf.io.decode_png with three channels), the EXIF orientation is applied, and only the first frame of an animation
    is returned.

    Raises:
      DamagedImageError: the image is damaged, truncated or empty, has another format, or has more than `MAX_PIXELS`.
        The size is read from the header before anything is decoded.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _decode_jpeg(data)
        return _decode_with_pillow(data)
    except DamagedImageError:
        raise
    except UnidentifiedImageError:  # its message shows a Python object
        raise DamagedImageError("not a JPEG, PNG or WebP image, or damaged at the start") from None
    except Exception as error:
        # Pillow's plugins raise a dozen types for damaged bytes: OSError, SyntaxError, struct.error, ValueError, ...
        raise DamagedImageError(f"{type(error).__name__}: {error}") from error


def _decode_jpeg(data: bytes) -> np.ndarray:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    if _has_exif(data):
        return _decode_with_pillow(data)
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


def _has_exif(data: bytes) -> bool:
    """Returns whether a JPEG has an Exif segment, which may hold an orientation, before its scan."""
    offset = 2
    while data[offset : offset + 1] == b"\xff":
        marker = data[offset + 1 : offset + 2]
        if marker == b"\xff":  # fill bytes may precede a marker
            offset += 1
        elif marker == _START_OF_SCAN or (marker == _APP1 and data.startswith(b"Exif\0\0", offset + 4)):
            return marker == _APP1
        else:
            offset += 2 + int.from_bytes(data[offset + 2 : offset + 4])
    return False


def _decode_with_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
        _check_size(*image.size)
        image.load()
        upright = image if image.getexif().get(_ORIENTATION_TAG, 1) == 1 else ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            grey = (np.asarray(upright) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DamagedImageError(f"the header says {width} x {height} pixels, above the limit of {MAX_PIXELS:,}")


def resize(
    image: UInt8[np.ndarray, "h w 3"], size: int, interpolation: int = cv2.INTER_LINEAR
) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes to size x size without antialiasing and with half-pixel centres.

    The default, bilinear interpolation, matches the default of tf.image.resize.
    """
    if image.shape[:2] == (size, size):
        return image
    return cv2.resize(image, (size, size), interpolation=interpolation)


def central_view(
    image: UInt8[np.ndarray, "h w 3"], size: int, share: float, interpolation: int = cv2.INTER_LINEAR
) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes the central `share` of each side to size x size."""
    height, width = image.shape[:2]
    top, left, height, width = _central_box(height, width, share)
    return resize(image[top : top + height, left : left + width], size, interpolation)


def _central_box(height: int, width: int, share: float) -> tuple[int, int, int, int]:
    crop_height, crop_width = max(1, round(height * share)), max(1, round(width * share))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def antialiased_view(
    image: UInt8[np.ndarray, "h w 3"], size: int, share: float, resampling: Image.Resampling
) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes the shorter side to size / share with antialiasing and returns the central square.

    Unlike `central_view` it keeps the aspect ratio. Rounding follows torchvision's Resize and CenterCrop as timm's
    evaluation combines them, so that published accuracies are reproduced on the same pixels.
    """
    # Only the middle of a long strip is visible. Resizing all of it could take a thousand times the memory.
    longest = MAX_ASPECT * min(image.shape[:2])
    height, width = (min(side, longest) for side in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    image = image[top : top + height, left : left + width]
    shorter, side = min(height, width), math.floor(size / share)
    height, width = int(side * height / shorter), int(side * width / shorter)
    top, left = round((height - size) / 2), round((width - size) / 2)
    # Cropping inside the resize would move the samples by a fraction of a pixel.
    resized = Image.fromarray(image).resize((width, height), resampling)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _antialiased_box(height: int, width: int, size: int, share: float) -> tuple[float, float, float, float]:
    longest, side = MAX_ASPECT * min(height, width), math.floor(size / share)
    strip = np.minimum((height, width), longest)
    resized = np.floor(side * strip / strip.min())
    scale = strip / resized
    top, left = (np.array((height, width)) - strip) // 2 + np.round((resized - size) / 2) * scale
    return float(top), float(left), float(size * scale[0]), float(size * scale[1])


_VIEWS: dict[Interpolation, Callable[[np.ndarray, int, float], np.ndarray]] = {
    "bilinear": central_view,
    "bicubic": functools.partial(central_view, interpolation=cv2.INTER_CUBIC),
    "antialiased_bilinear": functools.partial(antialiased_view, resampling=Image.Resampling.BILINEAR),
    "antialiased_bicubic": functools.partial(antialiased_view, resampling=Image.Resampling.BICUBIC),
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Turns a decoded image into the input of a network for evaluation: `preprocessing(image, out)` writes to `out`.

    Attributes:
      size: side of the square input in pixels.
      crop: central share of the image's sides that is visible.
      interpolation: 'bilinear' and 'bicubic' resize the central crop without antialiasing and ignore its aspect ratio;
        'antialiased_bilinear' and 'antialiased_bicubic' use `antialiased_view`.
      mean: subtracted from the pixels, one value per channel, after scaling them to [0, 1].
      std: divides the result, one value per channel. The defaults scale to [-1, 1], as Keras does.
    """

    size: int = 299
    crop: float = 0.875
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Builds the preprocessing from fields of a file; missing fields have their defaults.

        Raises:
          ValueError, TypeError: a field is unknown, has the wrong type or is out of range.
        """
        given: dict[str, Any] = {
            name: tuple(map(float, value)) if isinstance(value, list | tuple) else value
            for name, value in fields.items()
        }
        new = cls(**given)
        numbers = (new.crop, *new.mean, *new.std)
        if not all(isinstance(number, float | int) and math.isfinite(number) for number in numbers):
            raise ValueError("crop, mean and std must be numbers")
        if not isinstance(new.size, int) or new.size < 1 or not 0 < new.crop <= 1 or min(new.std) <= 0:
            raise ValueError("size, crop and std must be above 0, and crop at most 1")
        if (len(new.mean), len(new.std)) != (3, 3) or new.interpolation not in _VIEWS:
            raise ValueError(f"mean and std must have three values, and interpolation be one of {sorted(_VIEWS)}")
        return new

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], out: Float32[np.ndarray, "s s 3"]) -> None:
        if set(self.mean) == set(self.std) == {0.5}:
            to_float(self.pixels(image), out)
            return
        std = np.asarray(self.std, np.float32)
        np.multiply(self.pixels(image), 1 / (255 * std), out=out)
        np.subtract(out, np.asarray(self.mean, np.float32) / std, out=out)

    def pixels(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        """Returns the view as bytes, before it is scaled."""
        return _VIEWS[self.interpolation](image, self.size, self.crop)

    def visible_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Returns (top, left, height, width) of the part of an image that the network sees, in pixels."""
        if self.interpolation.startswith("antialiased"):
            return _antialiased_box(height, width, self.size, self.crop)
        return _central_box(height, width, self.crop)


def thumbnail(image: UInt8[np.ndarray, "h w 3"], longest: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Shrinks the image so that its longer side has at most `longest` pixels."""
    height, width = image.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def to_float(image: UInt8[np.ndarray, "s s 3"], out: Float32[np.ndarray, "s s 3"]) -> None:
    """Scales the image from [0, 255] to [-1, 1] and writes it to `out`."""
    np.copyto(out, image)
    np.multiply(out, np.float32(2 / 255), out=out)
    np.subtract(out, np.float32(1), out=out)
