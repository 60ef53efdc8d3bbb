"""Fields of `config.data` that no other test would miss, by what they do to a batch."""

from __future__ import annotations

import contextlib
from itertools import product

import numpy as np
import pytest

from xception_jax.config import DataConfig
from xception_jax.data.pipeline import EvaluationBatches, train_batches
from xception_jax.data.synthetic import SyntheticSource


def find_shift(image: np.ndarray, view: np.ndarray, reach: int) -> tuple[int, int]:
    """Returns by how many pixels an image is the shifted or mirrored view, apart from the margin that came in."""
    middle = slice(reach, view.shape[0] - reach)
    for y, x in product(range(-reach, reach + 1), repeat=2):
        shifted = np.roll(view, (y, x), (0, 1))
        for candidate in (shifted, shifted[:, ::-1]):
            if np.array_equal(candidate[middle, middle], image[middle, middle]):
                return y, x
    raise AssertionError(f"the image is not its view, shifted by at most {reach} pixels")


@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_an_image_is_shifted_by_shift_pixels_at_most(pixels):
    data = DataConfig(image_size=24, augmentation="shift", shift_pixels=pixels, threads=1)
    source = SyntheticSource(64, "train")
    (evaluated,) = EvaluationBatches(data, source, batch_size=64)
    views = dict(zip(evaluated["index"], evaluated["image"], strict=True))
    with contextlib.closing(train_batches(data, source, batch_size=64, seed=0, start_step=0)) as batches:
        batch = next(batches)
    shifts = [
        find_shift(image, views[index], reach=4) for index, image in zip(batch["index"], batch["image"], strict=True)
    ]
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(-pixels, pixels + 1))
