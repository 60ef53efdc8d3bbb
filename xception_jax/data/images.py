"""Decodes image files, and crops, resizes and scales images for evaluation. Random views are in augmentation.py.

Decoding accepts JPEG, PNG and WebP and returns RGB bytes. An image is cropped before it is resized and stays uint8
until it has its final size, because one pass over a full photograph costs more than all later passes together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Float32, UInt8
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from xception_jax.config import DataConfig
from xception_jax.data.decoding_memory import DECODING
from xception_jax.data.image_headers import Header, HeaderError, read_header
from xception_jax.data.turn import BLOCK, Turn
from xception_jax.files import open_regular
from xception_jax.names import one_line

MAX_FILE_BYTES = 1 << 30
"""Limit for the size of an image file; more than any image within the default limits needs."""

MAX_SIDE = 65_535
"""Limit for width and height, which is that of JPEG. Decoders keep data of each row, even if a row has one pixel."""

Interpolation = Literal["bilinear", "bicubic", "antialiased_bilinear", "antialiased_bicubic"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_ASPECT = 16

# Most bytes for each pixel that decoding needs at once: decoder, conversions and result.
_JPEG_BYTES, _SCANS_BYTES, _PILLOW_BYTES, _WEBP_BYTES = 8, 8, 16, 24
_JPEG_END = b"\xff\xd9"
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
}
"""Pillow's readers. `Image.open` would also try others, and has a limit of its own for pixels."""

_TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
"""Turns an image upright, by its orientation in Exif data."""

# The pipeline decodes many images in parallel; OpenCV's own threads would only compete with its threads.
cv2.setNumThreads(0)


class DamagedImageError(ValueError):
    """The bytes are not a complete image in a supported format: damaged, truncated, of another format or too large."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits for decoding. Images above the first two are refused from their headers, as if they were damaged.

    Attributes:
      max_pixels: width x height; `config.data.max_pixels`, the largest image of ImageNet has 61 million.
      max_scans: passes over the pixels of a JPEG; `config.data.max_scans`. Encoders write 1 to 20.
      memory: bytes that all images in this process that are being decoded may need; `config.data.decoding_memory`.
    """

    max_pixels: int = DataConfig.max_pixels
    max_scans: int = DataConfig.max_scans
    memory: int = DataConfig.decoding_memory << 20

    @classmethod
    def of(cls, data: DataConfig) -> Limits:
        """Returns the limits that `config.data` sets."""
        return cls(data.max_pixels, data.max_scans, data.decoding_memory << 20)


def read(path: Path) -> bytes:
    """Reads an image file.

    Raises:
      DamagedImageError: it is larger than `MAX_FILE_BYTES`.
      OSError: it cannot be read, or is a pipe or a device, which may never end.
    """
    with open_regular(path) as file:
        # Read at once unless it is too large: a limit would cost a second copy.
        data = file.read(-1 if os.fstat(file.fileno()).st_size <= MAX_FILE_BYTES else MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise DamagedImageError(f"the file has more than {MAX_FILE_BYTES:,} bytes")
    return data


def decode(data: bytes, limits: Limits | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a JPEG, PNG or WebP image to RGB.

    Grey and palette images are expanded, CMYK is converted, 16-bit values keep their upper 8 bits, alpha is dropped (as
    in tf.io.decode_png with three channels), the EXIF orientation is applied, and only the first frame of an animation
    is returned.

    Raises:
      DamagedImageError: the image is damaged, truncated or empty, has another format, or exceeds a limit.
    """
    with decoded(data, limits) as image:
        return image


@contextlib.contextmanager
def decoded(data: bytes, limits: Limits | None = None) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Decodes like `decode`. The image counts as being decoded until the block ends; do not nest such blocks."""
    limits = limits or _DEFAULT_LIMITS
    try:
        header = read_header(data)
    except Exception as error:
        raise _damage(error) from error
    _check(header, limits)
    with DECODING.reserve(header.width * header.height * _bytes_per_pixel(header), limits.memory):
        try:
            if header.format == "JPEG" and not header.by_pillow:
                image = _decode_jpeg(header.content)
            else:
                image = _decode_with_pillow(header)
            if turn := _TURNED.get(header.orientation):
                image = turn(image)
        except Exception as error:
            raise _damage(error) from error
        yield image


def _decode_jpeg(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decodes a JPEG, and ignores no warning except about zeros before the end marker, which some cameras write."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        end = data.rfind(_JPEG_END)
        pixels = data[:end].rstrip(b"\0")
        if end - len(pixels) <= 1:  # FF is always followed by 00 among pixels
            raise
        return simplejpeg.decode_jpeg(pixels + b"\0" * pixels.endswith(b"\xff") + data[end:], colorspace="RGB")


def _damage(error: Exception) -> Exception:
    """Returns what to raise for an error of a decoder."""
    if isinstance(error, MemoryError):
        return error  # the image may be intact
    # Pillow's plugins raise a dozen types for damaged bytes: OSError, SyntaxError, struct.error, ValueError, ...
    message = str(error) if isinstance(error, HeaderError) else f"{type(error).__name__}: {error}"
    return DamagedImageError(one_line(message))


def _check(header: Header, limits: Limits) -> None:
    """Raises DamagedImageError if an image exceeds a limit."""
    if header.width * header.height > limits.max_pixels:
        what = f"{header.width} x {header.height} pixels, above max_pixels={limits.max_pixels:,}"
    elif max(header.width, header.height) > MAX_SIDE:
        what = f"{header.width} x {header.height} pixels; the limit for each side is {MAX_SIDE:,}"
    elif header.scans > limits.max_scans:
        what = f"{header.scans:,} scans, above max_scans={limits.max_scans:,}"
    else:
        return
    raise DamagedImageError(f"the header says {what}")


def _bytes_per_pixel(header: Header) -> int:
    if header.format == "WEBP":
        return _WEBP_BYTES
    copies = header.format == "PNG" or header.by_pillow or header.orientation > 1
    return (_PILLOW_BYTES if copies else _JPEG_BYTES) + (_SCANS_BYTES if header.scans > 1 else 0)


def _decode_with_pillow(header: Header) -> np.ndarray:
    with _PLUGINS[header.format](io.BytesIO(header.content)) as file:
        if file.size != (header.width, header.height):
            raise HeaderError(f"two sizes, {header.width} x {header.height} and {file.size[0]} x {file.size[1]}")
        file.load()
        if file.mode.startswith("I"):
            image = np.repeat((np.asarray(file) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        else:
            image = np.asarray(file if file.mode == "RGB" else file.convert("RGB"))
    return image


_DEFAULT_LIMITS = Limits()


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
      turn: applied last; None for none.
    """

    size: int = 299
    crop: float = 0.875
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    turn: Turn | None = None

    @classmethod
    def of(cls, data: DataConfig) -> Preprocessing:
        """Returns the view of evaluation images that `config.data` describes."""
        return cls(data.image_size, data.eval_crop, turn=Turn.of(data))

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
        if given.get("turn") is not None:
            given["turn"] = Turn.from_fields(given["turn"])
        new = cls(**given)
        numbers = (new.crop, *new.mean, *new.std)
        if not all(isinstance(number, float | int) and math.isfinite(number) for number in numbers):
            raise ValueError("crop, mean and std must be numbers")
        if not isinstance(new.size, int) or new.size < 1 or not 0 < new.crop <= 1 or min(new.std) <= 0:
            raise ValueError("size, crop and std must be above 0, and crop at most 1")
        if (len(new.mean), len(new.std)) != (3, 3) or new.interpolation not in _VIEWS:
            raise ValueError(f"mean and std must have three values, and interpolation be one of {sorted(_VIEWS)}")
        if new.turn is not None and new.size % BLOCK:
            raise ValueError(f"images of {new.size} pixels cannot be turned in blocks of {BLOCK} x {BLOCK}")
        return new

    def to_fields(self) -> dict[str, Any]:
        """Returns the fields for a file, which has a turn only if there is one."""
        fields = dataclasses.asdict(self)
        return fields if self.turn is not None else {name: fields[name] for name in fields if name != "turn"}

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], out: Float32[np.ndarray, "s s 3"]) -> None:
        if set(self.mean) == set(self.std) == {0.5}:
            to_float(self.pixels(image), out)
        else:
            std = np.asarray(self.std, np.float32)
            np.multiply(self.pixels(image), 1 / (255 * std), out=out)
            np.subtract(out, np.asarray(self.mean, np.float32) / std, out=out)
        if self.turn is not None:
            self.turn(out)

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
