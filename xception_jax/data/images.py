"""Images: from the bytes of a file to the pixels that a network sees.

Decoding accepts JPEG, PNG and WebP and gives RGB bytes whatever the file holds. Views cut and resize those bytes: the
random ones take a `numpy.random.Generator`, and nothing else, as their source of chance. An image is cropped before it
is resized, and stays uint8 until it has its final size, because every pass over a full photograph costs more than all
the later ones together.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 1 << 26
"""The largest image that is decoded: 67 million pixels. The largest of ImageNet has 61 million."""

Interpolation = Literal["bilinear", "bicubic", "antialiased_bilinear", "antialiased_bicubic"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_ASPECT = 16
CROP_ATTEMPTS = 10
CROP_ASPECT = (3 / 4, 4 / 3)
MAX_BRIGHTNESS_DELTA = 32 / 255
SATURATION = (0.5, 1.5)

_PIXELS_IN_A_BAND = 1 << 15

_ORIENTATION_TAG = 0x0112
_APP1, _START_OF_SCAN = b"\xe1", b"\xda"
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")

# The pipeline decodes many images at a time; OpenCV's own threads would only compete with them.
cv2.setNumThreads(0)


class DamagedImageError(ValueError):
    """The bytes are not an image that can be decoded whole: damaged, truncated, of another format, or too large."""


def decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a JPEG, PNG or WebP image to RGB.

    Grey and palette images are expanded, CMYK is converted, 16 bits become the upper 8, alpha is dropped (as
    tf.io.decode_png does for three channels), an EXIF orientation is applied, and an animation gives its first frame.

    Raises:
      DamagedImageError: the image is damaged, truncated or empty, has another format, or has more than `MAX_PIXELS`,
        which is read from the header before anything is decoded.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _decode_jpeg(data)
        return _decode_with_pillow(data)
    except DamagedImageError:
        raise
    except UnidentifiedImageError:  # whose message shows the object that the bytes were read from
        raise DamagedImageError("neither JPEG, PNG nor WebP, or damaged at its beginning") from None
    except Exception as error:
        # Pillow's plugins raise a dozen types on damaged bytes: OSError, SyntaxError, struct.error, ValueError, ...
        raise DamagedImageError(f"{type(error).__name__}: {error}") from error


def _decode_jpeg(data: bytes) -> np.ndarray:
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(width, height)
    if _has_exif(data):
        return _decode_with_pillow(data)
    return simplejpeg.decode_jpeg(data, colorspace="RGB")


def _has_exif(data: bytes) -> bool:
    """Says whether an APP1 segment of a JPEG, before the scan, is Exif: it may hold an orientation."""
    place = 2
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1 : place + 2]
        if marker == b"\xff":  # a marker may have any number of these before it
            place += 1
        elif marker == _START_OF_SCAN or (marker == _APP1 and data.startswith(b"Exif\0\0", place + 4)):
            return marker == _APP1
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
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
        raise DamagedImageError(f"{width} x {height} pixels in the header, more than the limit of {MAX_PIXELS:,}")


def resize(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes to size x size: bilinear, half-pixel centres, no antialiasing, as tf.image.resize does by default."""
    if image.shape[:2] == (size, size):
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def central_view(image: UInt8[np.ndarray, "h w 3"], size: int, share: float) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes the central `share` of each side to size x size: the view for evaluation."""
    return resize(_central_crop(image, share), size)


def _central_crop(image: np.ndarray, share: float) -> np.ndarray:
    height, width = image.shape[:2]
    crop_height, crop_width = max(1, round(height * share)), max(1, round(width * share))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return image[top : top + crop_height, left : left + crop_width]


def antialiased_view(
    image: UInt8[np.ndarray, "h w 3"], size: int, share: float, resampling: Image.Resampling
) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes the shorter side to size / share with antialiasing, and cuts the central square of `size` out of it.

    Roundings are those of torchvision's Resize and CenterCrop as timm's evaluation combines them, so that a network
    sees the pixels that its accuracy was published with. Unlike `central_view` it keeps the aspect ratio.
    """
    # Of a strip only the middle, which is all that is seen: resized, it could be a thousand times as large.
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


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a network in evaluation; called with an image, writes it into `out`.

    Attributes:
      size: side of the square input, in pixels.
      crop: central share of the image's sides that is seen.
      interpolation: 'bilinear' and 'bicubic' resize the central crop, whatever its aspect ratio, without antialiasing;
        'antialiased_bilinear' and 'antialiased_bicubic' are `antialiased_view`.
      mean: subtracted from the pixels, one value a channel, after scaling to [0, 1].
      std: the result is divided by it. The defaults scale to [-1, 1], as Keras and this code base do.
    """

    size: int = 299
    crop: float = 0.875
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Returns what a file describes; fields that are not given have their defaults.

        Raises:
          ValueError, TypeError: a field is unknown, of the wrong type or out of range.
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
        if (len(new.mean), len(new.std)) != (3, 3) or new.interpolation not in get_args(Interpolation):
            raise ValueError("mean and std must have three values, and the interpolation be known")
        return new

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], out: Float32[np.ndarray, "s s 3"]) -> None:
        if set(self.mean) == set(self.std) == {0.5}:
            to_float(self.pixels(image), out)
            return
        std = np.asarray(self.std, np.float32)
        np.multiply(self.pixels(image), 1 / (255 * std), out=out)
        np.subtract(out, np.asarray(self.mean, np.float32) / std, out=out)

    def pixels(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        """Returns the view before it is scaled."""
        match self.interpolation:
            case "bilinear":
                return central_view(image, self.size, self.crop)
            case "bicubic":
                crop = _central_crop(image, self.crop)
                return cv2.resize(crop, (self.size, self.size), interpolation=cv2.INTER_CUBIC)
            case "antialiased_bilinear":
                return antialiased_view(image, self.size, self.crop, Image.Resampling.BILINEAR)
            case "antialiased_bicubic":
                return antialiased_view(image, self.size, self.crop, Image.Resampling.BICUBIC)
        raise ValueError(f"there is no interpolation {self.interpolation!r}")


def random_crop_box(
    height: int, width: int, area: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws the crop of Inception's preprocessing: a random share of the area, an aspect ratio in `CROP_ASPECT`.

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      area: the smallest and the largest share of the image's area.
      rng: source of chance.

    Returns:
      top, left, height, width, in pixels. If none of `CROP_ATTEMPTS` draws fits into the image, the largest central
      crop whose aspect ratio is allowed.
    """
    log_low, log_high = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    for _ in range(CROP_ATTEMPTS):
        pixels = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(log_low, log_high))
        crop_height, crop_width = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_width = max(1, min(width, round(height * CROP_ASPECT[1])))
    crop_height = max(1, min(height, round(width / CROP_ASPECT[0])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def inception_view(
    image: UInt8[np.ndarray, "h w 3"], size: int, area: tuple[float, float], rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes a random crop to size x size and flips every second one: the view for training on photographs."""
    top, left, height, width = random_crop_box(image.shape[0], image.shape[1], area, rng)
    return _random_flip(resize(image[top : top + height, left : left + width], size), rng)


def shifted_view(
    image: UInt8[np.ndarray, "s s 3"], pixels: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
    """Moves the image by up to `pixels` up, down, left or right (black comes in), and flips every second one."""
    top, left = (int(offset) - pixels for offset in rng.integers(2 * pixels + 1, size=2))
    size = image.shape[0]
    seen = image[max(top, 0) : size + min(top, 0), max(left, 0) : size + min(left, 0)]
    shifted = np.zeros_like(image)
    shifted[max(-top, 0) :, max(-left, 0) :][: seen.shape[0], : seen.shape[1]] = seen
    return _random_flip(shifted, rng)


def _random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Copied: to read a mirrored view costs every later pass several times as much.
    return cv2.flip(image, 1) if rng.integers(2) else image


def thumbnail(image: UInt8[np.ndarray, "h w 3"], longest: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Shrinks the whole image until its longer side has at most `longest` pixels."""
    height, width = image.shape[:2]
    scale = min(1.0, longest / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def to_float(image: UInt8[np.ndarray, "s s 3"], out: Float32[np.ndarray, "s s 3"]) -> None:
    """Writes the image, scaled from [0, 255] to [-1, 1], into `out`."""
    np.copyto(out, image)
    np.multiply(out, np.float32(2 / 255), out=out)
    np.subtract(out, np.float32(1), out=out)


def to_float_with_distorted_color(
    image: UInt8[np.ndarray, "s s 3"], out: Float32[np.ndarray, "s s 3"], rng: np.random.Generator
) -> None:
    """Does what `to_float` does, and changes brightness and saturation at random, in random order.

    The "fast mode" of Inception's preprocessing: no hue, no contrast; clipped to [-1, 1] at the end. Saturation is that
    of HSV, as in tf.image.adjust_saturation: V is the largest of R, G, B, and S is (V - smallest) / V. Scaling S by f
    turns each value c into V - (V - c) * f, but no further than S = 1, where the smallest is 0. Brightness shifts V and
    leaves V - c as it is, so that both are one weighted sum, from uint8 to float32.
    """
    brightness = 255 * rng.uniform(-MAX_BRIGHTNESS_DELTA, MAX_BRIGHTNESS_DELTA)
    saturation = np.float32(rng.uniform(*SATURATION))
    brightness_is_first = rng.integers(2)
    # In bands, so that what is in between stays in the processor's caches, and in memory that need not be mapped anew.
    rows = max(1, _PIXELS_IN_A_BAND // image.shape[1])
    for top in range(0, image.shape[0], rows):
        band, result = image[top : top + rows], out[top : top + rows]
        red, green, blue = cv2.split(band)
        value = cv2.max(cv2.max(red, green), blue)
        chroma = cv2.subtract(value, cv2.min(cv2.min(red, green), blue))
        seen = np.maximum(value + np.float32(brightness if brightness_is_first else 0), 0)
        factor = np.minimum(saturation, seen / np.maximum(chroma, np.float32(1)))
        values = cv2.merge((value, value, value))
        cv2.multiply(cv2.subtract(values, band), cv2.merge((factor, factor, factor)), dst=result, dtype=cv2.CV_32F)
        cv2.addWeighted(values, 2 / 255, result, -2 / 255, 2 / 255 * brightness - 1, dst=result, dtype=cv2.CV_32F)
        np.clip(result, -1, 1, out=result)
