"""Augmentations: random views of training images, chosen by `config.data.augmentation`.

To add one, write a function with the signature of `Augmentation`, and add a line to `AUGMENTATIONS` and its name to the
options of `data.augmentation` in config/experiment.py. A function must draw all its randomness from the generator that
it is given, whose seed is (run seed, epoch, index of the example): batches then do not depend on threads, workers or
hosts, and a resumed run repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from xception_jax.config import DataConfig
from xception_jax.data import images

Augmentation = Callable[
    [UInt8[np.ndarray, "h w 3"], DataConfig, np.random.Generator, Float32[np.ndarray, "s s 3"]], None
]
"""Writes a random view of a decoded image, scaled to [-1, 1], to its last argument: (image, config, rng, out)."""

CROP_ATTEMPTS = 10
CROP_ASPECT = (3 / 4, 4 / 3)
MAX_BRIGHTNESS_DELTA = 32 / 255
SATURATION = (0.5, 1.5)

_PIXELS_PER_BAND = 1 << 15


def inception(
    image: UInt8[np.ndarray, "h w 3"],
    data: DataConfig,
    rng: np.random.Generator,
    out: Float32[np.ndarray, "s s 3"],
) -> None:
    """Crops and flips as in Inception's preprocessing, and changes the colors if `data.color_distortion`."""
    view = inception_view(image, data.image_size, data.crop_area, rng)
    if data.color_distortion:
        to_float_with_distorted_color(view, out, rng)
    else:
        images.to_float(view, out)


def shift(
    image: UInt8[np.ndarray, "h w 3"],
    data: DataConfig,
    rng: np.random.Generator,
    out: Float32[np.ndarray, "s s 3"],
) -> None:
    """Shifts the evaluation view by up to `data.shift_pixels` and flips it, as is common for small images."""
    view = images.central_view(image, data.image_size, data.eval_crop)
    images.to_float(shifted_view(view, data.shift_pixels, rng), out)


AUGMENTATIONS: dict[str, Augmentation | None] = {"inception": inception, "shift": shift, "none": None}
"""By the value of `config.data.augmentation`; None is the evaluation view, which needs no generator."""


def inception_view(
    image: UInt8[np.ndarray, "h w 3"], size: int, area: tuple[float, float], rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
    """Resizes a random crop to size x size and flips it with probability 1/2."""
    top, left, height, width = random_crop_box(image.shape[0], image.shape[1], area, rng)
    return _random_flip(images.resize(image[top : top + height, left : left + width], size), rng)


def random_crop_box(
    height: int, width: int, area: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws the crop of Inception's preprocessing: a random share of the area, an aspect ratio in `CROP_ASPECT`.

    Args:
      height: height of the image in pixels.
      width: width of the image in pixels.
      area: smallest and largest share of the image's area.
      rng: random generator.

    Returns:
      (top, left, height, width) in pixels. If none of `CROP_ATTEMPTS` draws fits into the image, the largest central
      crop with an allowed aspect ratio.
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


def shifted_view(
    image: UInt8[np.ndarray, "s s 3"], pixels: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
    """Moves the image by up to `pixels` along each axis, fills in black, and flips it with probability 1/2."""
    top, left = (int(offset) - pixels for offset in rng.integers(2 * pixels + 1, size=2))
    size = image.shape[0]
    visible = image[max(top, 0) : size + min(top, 0), max(left, 0) : size + min(left, 0)]
    shifted = np.zeros_like(image)
    shifted[max(-top, 0) :, max(-left, 0) :][: visible.shape[0], : visible.shape[1]] = visible
    return _random_flip(shifted, rng)


def _random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # A copy: reading a mirrored view makes every later pass several times slower.
    return cv2.flip(image, 1) if rng.integers(2) else image


def to_float_with_distorted_color(
    image: UInt8[np.ndarray, "s s 3"], out: Float32[np.ndarray, "s s 3"], rng: np.random.Generator
) -> None:
    """Scales like `images.to_float` and changes brightness and saturation, in random order.

    This is the "fast mode" of Inception's preprocessing: no hue and no contrast; the result is clipped to [-1, 1].
    Saturation is that of HSV, as in tf.image.adjust_saturation: V is the largest of R, G and B, and S is
    (V - smallest) / V. Scaling S by f maps each value c to V - (V - c) * f; f is limited so that S stays at most 1.
    Brightness shifts V and leaves V - c unchanged, so both together are one weighted sum from uint8 to float32.
    """
    brightness = 255 * rng.uniform(-MAX_BRIGHTNESS_DELTA, MAX_BRIGHTNESS_DELTA)
    saturation = np.float32(rng.uniform(*SATURATION))
    brightness_is_first = rng.integers(2)
    # In bands, so that intermediate values stay in the processor's caches and their memory is reused.
    rows = max(1, _PIXELS_PER_BAND // image.shape[1])
    for top in range(0, image.shape[0], rows):
        band, result = image[top : top + rows], out[top : top + rows]
        red, green, blue = cv2.split(band)
        value = cv2.max(cv2.max(red, green), blue)
        chroma = cv2.subtract(value, cv2.min(cv2.min(red, green), blue))
        current = np.maximum(value + np.float32(brightness if brightness_is_first else 0), 0)
        factor = np.minimum(saturation, current / np.maximum(chroma, np.float32(1)))
        values = cv2.merge((value, value, value))
        cv2.multiply(cv2.subtract(values, band), cv2.merge((factor, factor, factor)), dst=result, dtype=cv2.CV_32F)
        cv2.addWeighted(values, 2 / 255, result, -2 / 255, 2 / 255 * brightness - 1, dst=result, dtype=cv2.CV_32F)
        np.clip(result, -1, 1, out=result)
