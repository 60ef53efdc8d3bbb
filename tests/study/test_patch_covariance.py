import json
import sys

import numpy as np
import pytest
from PIL import Image

from xception_jax.cli import main
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.study.patch_covariance import (
    covariance,
    kronecker_share,
    measure_covariance,
    measure_patches,
    whiten,
)


def random_covariance(rng, size):
    root = rng.normal(size=(size, size))
    return root @ root.T


def test_a_kronecker_product_is_separable_until_it_is_turned_freely():
    rng = np.random.default_rng(0)
    matrix = np.kron(random_covariance(rng, 3), random_covariance(rng, 9))
    assert kronecker_share(matrix, 3) == pytest.approx(1)
    np.testing.assert_allclose(whiten(matrix, 3), np.eye(27) * whiten(matrix, 3)[0, 0], atol=1e-9)
    for shares in measure_covariance(matrix, 3, 20_000, rng):
        assert shares.share == pytest.approx(1)
        assert shares.kronecker[1] == pytest.approx(1)
        assert shares.free[2] < 0.9
        assert shares.position == pytest.approx(0, abs=1e-9)


def test_the_share_of_a_sum_of_two_orthogonal_products_is_known():
    a, b = np.diag([1.0, 1, 0]), np.diag([0.0, 0, 2])
    c, d = np.diag([1.0, 0, 0, 0]), np.diag([0.0, 1, 1, 0])
    first, second = np.square(np.kron(a, c)).sum(), np.square(np.kron(b, d)).sum()
    assert (first, second) == (2, 8)
    assert kronecker_share(np.kron(a, c) + np.kron(b, d), 3) == pytest.approx(0.8)


def test_patches_with_a_known_covariance():
    rng = np.random.default_rng(1)
    across, space = rng.normal(size=(3, 3)), rng.normal(size=(4, 4))
    patches = np.einsum("cd,tu,ndu->ntc", across, space, rng.normal(size=(200_000, 3, 4))).reshape(-1, 2, 2, 3)
    found = covariance(patches)
    np.testing.assert_allclose(found, np.kron(across @ across.T, space @ space.T), atol=0.3)
    assert kronecker_share(found, 3) > 0.999


def test_white_noise_is_no_more_free_than_separable_patches_are_by_chance():
    rng = np.random.default_rng(3)
    for patches in (100, 20_000):
        for shares in measure_covariance(covariance(rng.normal(size=(patches, 3, 3, 3))), 3, patches, rng):
            assert shares.position == pytest.approx(1, abs=0.2)
            assert shares.chance == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("patches", [100, 1000])
def test_the_position_by_chance_is_that_of_separable_patches(patches):
    """Patches of which the covariance is a product; of few of them it does not look like one."""
    rng = np.random.default_rng(4)
    across, space = rng.normal(size=(3, 3)), rng.normal(size=(4, 4))

    def sample():
        return np.einsum("cd,tu,ndu->ntc", across, space, rng.normal(size=(patches, 3, 4))).reshape(-1, 2, 2, 3)

    raw, whitened = measure_covariance(covariance(sample()), 3, patches, rng)
    others = [measure_covariance(covariance(sample()), 3, patches, rng) for _ in range(10)]
    assert raw.chance == pytest.approx(np.mean([other.position for other, _ in others]), rel=0.5)
    assert whitened.chance == pytest.approx(np.mean([other.position for _, other in others]), rel=0.2)
    assert (whitened.chance > 0.1) == (patches == 100)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(2)
    (tmp_path / "class").mkdir()
    for number in range(3):
        noise = rng.normal(size=(40, 50, 3)).cumsum(0).cumsum(1)
        Image.fromarray((128 + 40 * np.tanh(noise / noise.std())).astype(np.uint8)).save(
            tmp_path / "class" / f"{number}.png"
        )
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG")
    Image.fromarray(np.zeros((2, 9, 3), np.uint8)).save(tmp_path / "small.png")
    return tmp_path


def test_a_folder_of_images(folder, monkeypatch, capsys):
    command = ["xception-jax", "study", "separability", str(folder), "--patches=1000", "--side=4"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    assert main() == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["skipped"], found["patches"]) == (3, 2, 600)
    raw = found["raw"]
    assert raw["dial"] == pytest.approx(1 - raw["share"])
    assert raw["position"] == pytest.approx(raw["dial"] / (1 - raw["free"][0]))
    assert raw["kronecker"][1] == pytest.approx(raw["share"])
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    output = capsys.readouterr().out
    assert "600 patches of 4 x 4 pixels from 3 images, 2 files skipped" in output
    assert "unclear" not in output
    monkeypatch.setattr(sys, "argv", [*command, "--patches=100"])
    assert main() == 0
    assert "The position of whitened is unclear" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command[:-1], "--side=12"])
    with pytest.raises(UsageError, match="--side: invalid choice"):
        main()


def test_what_cannot_be_measured(folder, tmp_path):
    options = {"patches": 100, "side": 3, "seed": 0}
    for path in (folder / "class").iterdir():
        Image.open(path).convert("L").save(path)
    with pytest.raises(BadDataError, match="all images are grey"):
        measure_patches(str(folder), **options)
    with pytest.raises(InputMissingError, match="no image that can be read"):
        measure_patches(str(folder), **options | {"side": 41})
    for path in (folder / "class").iterdir():
        Image.new("RGB", (8, 8), "red").save(path)
    with pytest.raises(BadDataError, match="all patches are equal"):
        measure_patches(str(folder), **options)
    with pytest.raises(InputMissingError, match="no such folder and no such dataset"):
        measure_patches(str(folder / "nothing"), **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputMissingError, match="there is no image"):
        measure_patches(str(tmp_path / "empty"), **options)
