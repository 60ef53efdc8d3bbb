"""Turns of images: orthogonal, of equal norm, one kind separable and the other not, and seen by all readers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.test_pipeline import train
from xception_jax.config import DataConfig
from xception_jax.data.datasets import open_dataset
from xception_jax.data.images import Preprocessing
from xception_jax.data.pipeline import EvaluationBatches
from xception_jax.data.turn import CHANNELS, KINDS, RMS_ANGLE, SIZE, TAPS, Turn, kronecker_part
from xception_jax.errors import ConfigError
from xception_jax.study.patch_covariance import kronecker_share

SEEDS = range(5)


def noise(size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_matrix_is_orthogonal_and_its_generator_skew_with_the_stated_norm(kind, seed):
    turn = Turn(kind, 1.0, seed)
    generator, matrix = turn.generator(), turn.matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(SIZE), atol=1e-12)
    assert np.linalg.det(matrix) == pytest.approx(1)
    np.testing.assert_allclose(generator, -generator.T, atol=1e-12)
    assert np.linalg.norm(generator) == pytest.approx(RMS_ANGLE * SIZE**0.5, abs=1e-12)
    half = Turn(kind, 0.5, seed).matrix()
    np.testing.assert_allclose(half @ half, matrix, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kronecker_turn_is_a_product_and_a_free_one_orthogonal_to_all_of_them(seed):
    kronecker, free = (Turn(kind, 1.0, seed) for kind in ("kronecker", "free"))
    assert kronecker_share(kronecker.matrix(), CHANNELS) == pytest.approx(1, abs=1e-12)
    assert kronecker_share(free.matrix(), CHANNELS) < 0.8
    rng = np.random.default_rng(100 + seed)
    for _ in range(5):
        across, space = rng.normal(size=(CHANNELS, CHANNELS)), rng.normal(size=(TAPS, TAPS))
        form = np.kron(across - across.T, np.eye(TAPS)) + np.kron(np.eye(CHANNELS), space - space.T)
        np.testing.assert_allclose(kronecker_part(form), form, atol=1e-12)
        assert np.sum(form * free.generator()) == pytest.approx(0, abs=1e-10)


def test_directions_of_two_seeds_differ_and_one_seed_gives_one_direction():
    assert np.abs(Turn("free", 1.0, 0).matrix() - Turn("free", 1.0, 1).matrix()).max() > 0.1
    np.testing.assert_array_equal(Turn("free", 1.0, 3).matrix(), Turn("free", 1.0, 3).matrix())


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_turned_block_by_block_and_turned_back(kind):
    turn, image = Turn(kind, 0.7, 4), noise()
    turned = image.copy()
    turn(turned)
    for row in range(0, 8, 2):
        for column in range(0, 8, 2):
            block, found = (x[row : row + 2, column : column + 2] for x in (image, turned))
            expected = turn.matrix() @ block.transpose(2, 0, 1).reshape(-1)
            np.testing.assert_allclose(found.transpose(2, 0, 1).reshape(-1), expected, atol=1e-6)
    np.testing.assert_allclose(np.square(turned).sum(), np.square(image).sum(), rtol=1e-6)
    turn.back()(turned)
    np.testing.assert_allclose(turned, image, atol=1e-6)


def test_a_kronecker_turn_of_a_separable_image_is_separable_and_a_free_one_is_not():
    colour, pattern = np.array([0.9, -0.2, 0.4]), np.array([[0.1, 0.8], [-0.5, 0.3]])
    image = np.tile(pattern[..., None] * colour, (2, 2, 1)).astype(np.float32)
    ranks = {}
    for kind in KINDS:
        turned = image.copy()
        Turn(kind, 1.0, 0)(turned)
        values = np.linalg.svd(turned[:2, :2].reshape(TAPS, CHANNELS), compute_uv=False)
        ranks[kind] = int((values > 1e-5 * values[0]).sum())
    assert ranks == {"kronecker": 1, "free": 3}


@pytest.mark.parametrize("augmentation", ["none", "shift"])
def test_training_and_evaluation_are_turned_alike_after_everything_else(data, augmentation):
    data = data.replace(augmentation=augmentation, turn="free", turn_seed=2)
    plain, turn = data.replace(turn="none", turn_seed=0), Turn("free", 1.0, 2)
    for batch, expected in zip(train(data, 2), train(plain, 2), strict=True):
        np.testing.assert_array_equal(batch["index"], expected["index"])
        assert np.abs(batch["image"] - expected["image"]).max() > 0.1
        for image, original in zip(batch["image"], expected["image"], strict=True):
            turn.back()(image)
            np.testing.assert_allclose(image, original, atol=1e-5)
    source = open_dataset(data, "test[:20]")
    (batch,), (expected,) = (EvaluationBatches(each, source, batch_size=20) for each in (data, plain))
    for image, original in zip(batch["image"], expected["image"], strict=True):
        turn(original)
        np.testing.assert_array_equal(image, original)


def test_an_angle_of_zero_changes_no_bit(data):
    (batch,) = train(data.replace(turn="kronecker", turn_angle=0.0, turn_seed=5), 1)
    np.testing.assert_array_equal(batch["image"], train(data, 1)[0]["image"])


def test_odd_images_cannot_be_turned(data):
    with pytest.raises(ConfigError, match="33 x 33 pixels cannot be turned") as error:
        DataConfig(image_size=33, turn="free")
    assert "config.data.image_size" in str(error.value)
    assert len(str(error.value).splitlines()) == 3
    with pytest.raises(ConfigError, match="7 x 7 pixels cannot be turned"):
        Turn("free", 1.0, 0)(noise(7))
    with pytest.raises(ConfigError, match="no effect"):
        DataConfig(turn_seed=1)


def test_a_file_records_the_turn_and_refuses_one_that_makes_no_sense(data):
    view = Preprocessing.of(data.replace(turn="free", turn_angle=0.5, turn_seed=7))
    fields = json.loads(json.dumps(view.to_fields()))
    assert Preprocessing.from_fields(fields) == view
    assert "turn" not in Preprocessing.of(data).to_fields()
    good = {"kind": "free", "angle": 0.5, "seed": 7}
    assert fields["turn"] == good
    for wrong in ({"kind": "up"}, {"kind": []}, {"angle": 1.5}, {"angle": float("nan")}, {"seed": -1}, {"seed": 0.5}):
        with pytest.raises(ValueError, match="turn must be"):
            Preprocessing.from_fields(fields | {"turn": good | wrong})
    for wrong in ("free", 3, {"kind": "free"}, good | {"more": 1}):
        with pytest.raises((ValueError, TypeError)):
            Preprocessing.from_fields(fields | {"turn": wrong})
    with pytest.raises(ValueError, match="33 pixels cannot be turned"):
        Preprocessing.from_fields(fields | {"size": 33})
