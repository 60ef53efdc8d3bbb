import numpy as np
import pytest
from ml_collections import ConfigDict

from xception_jax.config import resolve_model
from xception_jax.errors import InputMissingError
from xception_jax.models import create_model
from xception_jax.study.kernels.measure import (
    Spread,
    draw_alike,
    energies,
    first_component,
    random_dials,
    random_kernels,
    rank_errors,
)
from xception_jax.study.kernels.networks import KernelReport, LayerSeparability, analyse, regular_kernels
from xception_jax.study.kernels.table import format_kernels
from xception_jax.study.separability import dial
from xception_jax.weights import Network, Preprocessing, save_network, tree

RNG = np.random.default_rng(0)


def separable_sum(rank, k=3, c=4, f=6):
    """A kernel that is a sum of depthwise separable convolutions: a spatial kernel a channel, weights to filters."""
    depthwise, pointwise = RNG.normal(0, 1, (rank, k, k, c)), RNG.normal(0, 1, (rank, c, f))
    return np.einsum("rijc,rcf->ijcf", depthwise, pointwise)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_sum_of_separable_convolutions_has_that_rank(rank):
    errors = rank_errors(separable_sum(rank))
    assert errors[rank - 1] < 1e-7
    assert rank == 1 or errors[rank - 2] > 0.05
    assert (np.diff(errors) <= 1e-7).all()
    assert errors[-1] == 0


def test_rank_errors_are_those_of_the_best_approximation():
    kernel = RNG.normal(0, 1, (3, 3, 4, 20))
    left = np.zeros_like(kernel)
    for channel in range(4):
        u, s, v = np.linalg.svd(kernel[:, :, channel].reshape(9, 20), full_matrices=False)
        left[:, :, channel] = ((u[:, 2:] * s[2:]) @ v[2:]).reshape(3, 3, 20)
    assert rank_errors(kernel)[1] == pytest.approx(np.linalg.norm(left) / np.linalg.norm(kernel))


def test_one_blueprint_a_filter_is_all_of_it():
    blueprint = np.einsum("ijf,cf->ijcf", RNG.normal(0, 1, (3, 3, 6)), RNG.normal(0, 1, (4, 6)))
    np.testing.assert_allclose(first_component(blueprint), 1.0)
    # Two orthogonal blueprints of norms 2 and 1: the first holds four fifths.
    two = np.zeros((3, 3, 4, 1))
    two[0, 0, 0, 0], two[1, 1, 1, 0] = 2, 1
    np.testing.assert_allclose(first_component(two), 0.8)
    # A filter that is zero says nothing.
    dead = np.concatenate([two, np.zeros_like(two)], axis=-1)
    assert np.isnan(first_component(dead)[1])


def test_random_kernels_have_a_first_component_too():
    firsts, errors = random_kernels((3, 3, 32, 32))
    assert 0.18 < firsts.mean < 0.26  # nine equal components would hold a ninth each
    assert firsts.high - firsts.low < 0.02
    assert 0.85 < errors[0] < 0.92


def uneven_kernel(shape=(3, 3, 6, 10)):
    """Random numbers with a strong centre, channels of different strength, and dead filters and channels."""
    kernel = RNG.normal(size=shape) * np.geomspace(1, 30, shape[2])[:, None] * np.geomspace(1, 9, shape[3])
    kernel[shape[0] // 2, shape[1] // 2] *= 5
    kernel[..., 4] = kernel[:, :, 2] = 0
    return kernel


@pytest.mark.parametrize("shape", [(3, 3, 6, 10), (1, 7, 6, 10), (2, 2, 3, 5)])
def test_random_kernels_have_the_energies_of_the_kernel(shape):
    kernel = uneven_kernel(shape)
    drawn = draw_alike(np.random.default_rng(1), kernel)
    for theirs, ours in zip(energies(drawn), energies(kernel), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=0)
    other = draw_alike(np.random.default_rng(2), kernel)
    correlation = np.corrcoef((drawn / np.abs(kernel).max()).ravel(), (other / np.abs(kernel).max()).ravel())[0, 1]
    assert abs(correlation) < 0.4  # signs and places are new


def test_energies_alone_do_not_count_as_separable():
    kernel = uneven_kernel((3, 3, 24, 40))
    shape_only = 1 - random_kernels(kernel.shape)[0].mean
    for family, null in random_dials(kernel).items():
        assert dial(kernel, family) < shape_only - 0.1  # it would look separable
        assert dial(kernel, family) == pytest.approx(null.mean, abs=0.05)
        assert null.low <= null.mean <= null.high


def test_only_regular_convolutions_are_looked_at():
    small = {"name": "xception", "num_classes": 10, "width_multiplier": 0.05, "middle_blocks": 0}

    def names(**fields):
        model = create_model(ConfigDict(small | fields))
        zeros = _Zeros()
        return list(regular_kernels(model, zeros, 32).kernels)

    assert names() == ["block1_conv1", "block1_conv2"]
    regular = names(segments=1)
    assert regular[2:4] == ["block2_sepconv1/spatial", "block2_sepconv2/spatial"]
    assert len(regular) == 2 + 10
    assert names(segments=2) == ["block1_conv1", "block1_conv2"]
    assert "block3_sepconv1/tower_double_2" in names(module="inception")
    assert names(module="regular") == regular


class _Zeros:
    """Parameters of any path."""

    def __getitem__(self, name):
        return np.zeros((3, 3, 4, 4)) if name == "kernel" else self


def test_the_table_has_means_over_seeds():
    layers = [
        LayerSeparability(
            f"regular seed {seed}",
            "block2/spatial",
            (3, 3, 4, 4),
            share,
            Spread(0.5, 0.4, 0.6),
            (0.8,) * 9,
            (0.9,) * 9,
            0.25,
            0.35,
            Spread(0.55, 0.5, 0.6),
            Spread(0.45, 0.4, 0.5),
        )
        for seed, share in ((0, 0.6), (1, 0.7))
    ]
    table = format_kernels(KernelReport(tuple(layers), {}, {}))
    assert "0.250 (0.550)" in table
    assert "0.350 (0.450)" in table
    assert "65.0% (7.1%)" in table
    assert "0.800 (0.900)" in table
    assert table.splitlines()[0] == "regular"


def test_a_weight_file(tmp_path):
    small = {"name": "xception", "num_classes": 3, "width_multiplier": 0.05, "middle_blocks": 0}
    model = resolve_model(ConfigDict(small))
    leaves = {name: RNG.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in tree.shapes(model).items()}
    file = tmp_path / "weights.safetensors"
    save_network(file, Network(model, tree.unflatten(leaves), Preprocessing(size=32), None, "", ""))
    report = analyse(file)
    layers = report.layers
    assert report.axes == {}  # our own files describe their network
    assert len(report.left_out[file.name]["1 x 1"]) == 14  # ten pointwise ones and four shortcuts
    assert {layer.network for layer in layers} == {"weights.safetensors"}
    assert [layer.layer for layer in layers] == ["block1_conv1", "block1_conv2"]
    expected = first_component(leaves["params/block1_conv2/kernel"].astype(np.float64)).mean()
    assert layers[1].first_component == pytest.approx(expected)


def test_nothing_to_analyse(tmp_path):
    with pytest.raises(InputMissingError, match="no run and no study"):
        analyse(tmp_path)
