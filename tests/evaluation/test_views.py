"""The views that networks of timm were evaluated with, and networks scaled by another mean and deviation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.data.small_imagenet import photographs
from xception_jax.data import images
from xception_jax.data.images import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# timm evaluates the first as its Xception, the second as its Inception V3.
VIEWS = ("299:0.8975:bicubic", "299:0.875:bicubic", "71:0.9:bilinear", "96:1.0:bicubic")
GOLDEN = Path(__file__).parent / "timm_views.npz"  # of tests/peers/test_timm_views.py
STRIDE = 23


def cases():
    wide, _, cat, *_ = photographs()
    return {"square": wide, "wide": cat, "tall": np.ascontiguousarray(wide[:, :301]), "small": cat[:57, :83]}


def ours(photograph, view):
    size, crop, interpolation = view.split(":")
    out = np.zeros((int(size), int(size), 3), np.float32)
    Preprocessing(int(size), float(crop), f"antialiased_{interpolation}", MEAN, STD)(photograph, out)
    return out


def largest_difference(timm, stride):
    """In levels of 255."""
    photos = cases()
    differences = []
    for key, expected in timm.items():
        name, _, view = key.partition(":")
        difference = np.abs(ours(photos[name], view)[::stride, ::stride] - expected)
        differences.append(float((difference * STD).max() * 255))
    assert len(differences) == len(photos) * len(VIEWS)
    return max(differences)


def test_antialiased_views_are_timms():
    assert largest_difference(np.load(GOLDEN), STRIDE) < 0.01


def test_the_default_view_is_that_of_training_to_the_bit():
    photograph = photographs()[1]
    out, expected = np.zeros((2, 71, 71, 3), np.float32)
    Preprocessing(71, 0.875)(photograph, out)
    images.to_float(images.central_view(photograph, 71, 0.875), expected)
    np.testing.assert_array_equal(out, expected)


def test_bicubic_differs_from_bilinear_but_shows_the_same():
    photograph = photographs()[1]
    bilinear, bicubic = (Preprocessing(71, 0.875, name).pixels(photograph) for name in ("bilinear", "bicubic"))
    difference = np.abs(bilinear.astype(int) - bicubic)
    assert 0 < difference.mean() < 4


def test_a_strip_costs_no_more_than_a_photograph():
    strip = np.zeros((1, 1 << 20, 3), np.uint8)
    strip[:, 1 << 19 :] = 255
    view = Preprocessing(96, 0.875, "antialiased_bicubic").pixels(strip)
    assert view.shape == (96, 96, 3)
    assert view[:, 0].max() < 128 < view[:, -1].min()
