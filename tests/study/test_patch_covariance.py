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
    measure,
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
    free = whiten(random_covariance(rng, 27), 3)
    assert kronecker_share(free, 3) < 0.9


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


def separable_images(rng, images, patches, alike=0.0, contrast=0.0):
    """Patches with one separable covariance; those of an image have the share `alike` of their variance in common."""
    across, space = (
        rng.normal(size=(3, 3)),
        np.linalg.cholesky(np.exp(-np.abs(np.subtract.outer(range(9), range(9)) / 3))),
    )

    def image():
        noise = np.sqrt(alike) * rng.normal(size=(3, 9)) + np.sqrt(1 - alike) * rng.normal(size=(patches, 3, 9))
        values = np.einsum("cd,ndt,ut->nuc", across, noise, space) * np.exp(contrast * rng.normal())
        return values.reshape(patches, 3, 3, 3)

    return [image() for _ in range(images)]


def test_white_noise_is_no_more_free_than_separable_patches_are_by_chance():
    rng = np.random.default_rng(3)
    for images, patches in ((100, 1), (2000, 10)):
        for shares in measure(list(rng.normal(size=(images, patches, 3, 3, 3))), rng):
            assert shares.position == pytest.approx(1, abs=0.2)
            assert shares.chance == pytest.approx(1, abs=0.2)


def test_a_separable_covariance_stays_separable_only_after_kronecker_turns():
    for shares in measure(separable_images(np.random.default_rng(5), 200, 1000), np.random.default_rng(0)):
        assert shares.share > 0.99
        assert shares.kronecker[1] == pytest.approx(shares.share)
        assert shares.free[2] < 0.9


@pytest.mark.parametrize(
    ("images", "patches", "alike", "contrast"), [(100, 1, 0, 0), (40, 25, 0.9, 0), (200, 10, 0.5, 0.7), (2000, 1, 0, 0)]
)
def test_the_position_by_chance_is_that_of_separable_images(images, patches, alike, contrast):
    """Also if the patches of an image resemble each other, or images differ in contrast."""
    rng = np.random.default_rng(4)
    found = [measure(separable_images(rng, images, patches, alike, contrast), rng) for _ in range(8)]
    for kind in (0, 1):
        position, chance = (
            np.mean([getattr(shares[kind], name) for shares in found]) for name in ("position", "chance")
        )
        assert chance == pytest.approx(position, rel=0.4 if kind == 0 else 0.15)


def test_each_patch_is_read_once(tmp_path):
    """As many patches as there are places, each once: of images of three pixels a side, one each."""
    rng = np.random.default_rng(6)
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8)).save(tmp_path / f"{number}.png")
    found = measure_patches(str(tmp_path), patches=4000, side=3, seed=0)
    assert (found.images, found.patches) == (40, 40)
    assert measure_patches(str(tmp_path), patches=10, side=3, seed=0).images == 10


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(2)
    (tmp_path / "class").mkdir()
    for number in range(12):
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
    assert (found["images"], found["skipped"], found["patches"]) == (12, 2, 864)
    raw = found["raw"]
    assert raw["dial"] == pytest.approx(1 - raw["share"])
    assert raw["position"] == pytest.approx(raw["dial"] / (1 - raw["free"][0]))
    assert raw["kronecker"][1] == pytest.approx(raw["share"])
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    output = capsys.readouterr().out
    assert "864 patches of 4 x 4 pixels from 12 images, 2 files skipped" in output
    assert "unclear" not in output
    for number in range(8):
        (folder / "class" / f"{number}.png").unlink()
    assert main() == 0
    assert "The positions are unclear: the variation between 4 images" in capsys.readouterr().out
    for number in range(8, 11):
        (folder / "class" / f"{number}.png").unlink()
    assert main() == 0
    assert "unknown" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    assert main() == 0
    assert json.loads(capsys.readouterr().out)["raw"]["chance"] is None
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
