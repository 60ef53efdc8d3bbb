from __future__ import annotations

import cv2
import numpy as np
import pytest
import scipy.stats

from tests.data.small_imagenet import photograph
from xception_jax.config import FIELDS, DataConfig
from xception_jax.data import augmentation, images
from xception_jax.data.augmentation import AUGMENTATIONS


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_config_offers_exactly_the_augmentations_of_the_table():
    assert FIELDS["data.augmentation"].expects == "one of " + ", ".join(map(repr, AUGMENTATIONS))


@pytest.mark.parametrize("name", [name for name, function in AUGMENTATIONS.items() if function])
def test_every_augmentation_fills_its_output_and_draws_from_its_generator_only(name):
    data = DataConfig(augmentation=name, image_size=40)

    def view(seed: int) -> np.ndarray:
        out = np.full((40, 40, 3), np.nan, np.float32)
        AUGMENTATIONS[name](photograph(1), data, rng(seed), out)
        return out

    assert np.abs(view(1)).max() <= 1
    np.testing.assert_array_equal(view(1), view(1))
    assert not np.array_equal(view(1), view(2))


def test_random_crops_have_the_area_and_the_aspect_that_were_asked_for():
    source = rng()
    boxes = np.array([augmentation.random_crop_box(400, 400, (0.05, 1.0), source) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 400).all()
    assert (left + width <= 400).all()
    area, aspect = height * width / 400**2, width / height
    assert area.min() < 0.06
    assert area.max() > 0.9
    assert 0.72 < aspect.min() < 0.78
    assert 1.30 < aspect.max() < 1.36
    assert abs(np.mean(np.log(aspect))) < 0.02
    assert top.std() > 20


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    assert augmentation.random_crop_box(10, 1000, (0.9, 1.0), rng()) == (0, 493, 10, 13)
    assert augmentation.random_crop_box(1000, 10, (0.9, 1.0), rng()) == (493, 0, 13, 10)


def test_inception_view_shows_the_box_and_flips_every_second_one():
    image = photograph(3)
    flips = 0
    for seed in range(200):
        top, left, height, width = augmentation.random_crop_box(*image.shape[:2], (0.3, 1.0), rng(seed))
        straight = images.resize(image[top : top + height, left : left + width], 40)
        view = augmentation.inception_view(image, 40, (0.3, 1.0), rng(seed))
        flipped = np.array_equal(view, straight[:, ::-1])
        assert flipped or np.array_equal(view, straight)
        flips += flipped
    assert 70 < flips < 130


def test_the_area_of_a_box_is_uniformly_distributed():
    source = rng()
    boxes = np.array([augmentation.random_crop_box(4000, 4000, (0.05, 0.5), source) for _ in range(4000)])
    shares = boxes[:, 2] * boxes[:, 3] / 4000**2
    assert scipy.stats.kstest(shares, "uniform", (0.05, 0.45)).pvalue > 0.001


def test_shifted_view_flips_every_second_image():
    image = np.arange(9, dtype=np.uint8)[None, :, None].repeat(9, 0).repeat(3, 2)
    views = [augmentation.shifted_view(image, 0, rng(seed)) for seed in range(200)]
    assert all(np.array_equal(view, image) or np.array_equal(view, image[:, ::-1]) for view in views)
    assert 70 < sum(np.array_equal(view, image) for view in views) < 130


def test_shifted_view_moves_by_up_to_its_pixels_and_brings_in_black():
    image = np.zeros((9, 9, 3), np.uint8)
    image[4, 4] = 255
    places = {tuple(np.argwhere(augmentation.shifted_view(image, 2, rng(seed))[..., 0])[0]) for seed in range(400)}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}
    white = np.full((8, 8, 3), 255, np.uint8)
    views = [augmentation.shifted_view(white, 2, rng(seed)) for seed in range(20)]
    assert all(view.shape == white.shape for view in views)
    assert any((view == 0).any() for view in views)


class Given:
    """Replaces a Generator and returns the values that the test chooses."""

    def __init__(self, brightness: float, saturation: float, brightness_is_first: int):
        self._uniform, self._first = [brightness, saturation], brightness_is_first
        self._ranges = [(-32 / 255, 32 / 255), (0.5, 1.5)]

    def uniform(self, low: float, high: float) -> float:
        assert (low, high) == self._ranges.pop(0)
        return self._uniform.pop(0)

    def integers(self, high: int) -> int:
        return self._first


@pytest.mark.parametrize("brightness", [-32 / 255, 0.0, 32 / 255])
@pytest.mark.parametrize("saturation", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("brightness_is_first", [0, 1])
def test_color_is_distorted_as_in_hsv(brightness, saturation, brightness_is_first):
    noise = rng().integers(0, 256, (200, 200, 3), np.uint8)  # with the photograph, more than one band
    image = np.concatenate([cv2.resize(photograph(2), (200, 200)), noise])[::2]
    out = np.full(image.shape, np.nan, np.float32)
    augmentation.to_float_with_distorted_color(image[:, ::-1], out, Given(brightness, saturation, brightness_is_first))

    def scale_saturation(rgb):
        hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = np.minimum(hsv[..., 1] * saturation, 1)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)

    expected = image[:, ::-1] / np.float32(255)
    inside = np.ones(image.shape[:2], bool)  # where OpenCV's HSV is defined
    if brightness_is_first:
        inside = expected.min(-1) + brightness >= 0
        expected = scale_saturation(expected + np.float32(brightness))
    else:
        expected = scale_saturation(expected) + brightness
    np.testing.assert_allclose(out[inside], (np.clip(expected, 0, 1) * 2 - 1)[inside], atol=2e-3)
    assert out.min() >= -1
    assert out.max() <= 1


def test_the_same_rng_gives_the_same_view():
    image = photograph(5)

    def view(seed: int) -> np.ndarray:
        out = np.empty((32, 32, 3), np.float32)
        source = rng(seed)
        augmentation.to_float_with_distorted_color(
            augmentation.inception_view(image, 32, (0.05, 1.0), source), out, source
        )
        return out

    np.testing.assert_array_equal(view(1), view(1))
    assert not np.array_equal(view(1), view(2))
