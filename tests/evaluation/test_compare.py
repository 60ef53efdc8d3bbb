import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from tests.conftest import run_command
from xception_jax.cli import evaluate as command
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.evaluation.compare import check_same_images, compare
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import Predictions, save_predictions


def predictions(right, seed=0):
    """Predictions of five classes that are right where they should be."""
    label = np.random.default_rng(seed).integers(0, 5, len(right))
    best = np.where(right, label, (label + 1) % 5)
    return Predictions(
        np.arange(len(right)), label, best[:, None].astype(np.int32), np.ones((len(right), 1), np.float32)
    )


def pair(n=400, share=0.7, differing=0.15, seed=1):
    rng = np.random.default_rng(seed)
    a = rng.random(n) < share
    b = np.where(rng.random(n) < differing, rng.random(n) < 0.9, a)
    return a, b


run = partial(run_command, command)


@pytest.mark.parametrize("seed", range(3))
def test_against_the_definition_of_mcnemars_test_and_scipys_bootstrap(seed):
    a, b = pair(seed=seed)
    found = compare(predictions(a), predictions(b))
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    uneven = only_a + only_b
    tail = sum(math.comb(uneven, k) for k in range(min(only_a, only_b) + 1))
    assert found.p_value == pytest.approx(min(1, 2 * tail / 2**uneven), rel=1e-9)
    assert (found.only_a, found.only_b, found.count) == (only_a, only_b, 400)
    assert (found.accuracy_a, found.accuracy_b) == (a.mean(), b.mean())
    assert found.difference == pytest.approx(b.mean() - a.mean())
    values = b.astype(float) - a
    reference = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(5))
    assert found.interval == pytest.approx(tuple(reference.confidence_interval), abs=0.004)
    assert found.interval[0] < found.difference < found.interval[1]


def test_equal_networks_differ_by_nothing():
    a, _ = pair()
    found = compare(predictions(a), predictions(a))
    assert (found.p_value, found.difference, found.interval) == (1.0, 0.0, (0.0, 0.0))


def test_images_without_a_label_are_left_out():
    label = np.array([[True, False], [False, False], [True, True]])
    a, b = (
        Predictions(np.arange(3), label, np.array(best)[:, None], np.ones((3, 1))) for best in ([0, 0, 0], [1, 1, 1])
    )
    found = compare(a, b)
    assert (found.count, found.accuracy_a, found.accuracy_b) == (2, 1.0, 0.5)


def in_groups(a, b, size, seed=0):
    """Both predictions of groups in which all images have the same outcome."""
    groups = np.repeat([f"patient {n}" for n in range(len(a))], size)
    return [dataclasses.replace(predictions(np.repeat(right, size), seed), group=groups) for right in (a, b)]


def test_images_of_a_group_count_as_one():
    a, b = np.arange(40) < 21, (np.arange(40) > 0) & (np.arange(40) < 27)  # only A is right in one, only B in six
    single, grouped = compare(predictions(a), predictions(b)), compare(*in_groups(a, b, size=25))
    independent = compare(*[dataclasses.replace(each, group=None) for each in in_groups(a, b, size=25)])
    assert (grouped.count, grouped.groups, single.groups) == (1000, 40, None)
    assert grouped.p_value == pytest.approx(single.p_value, abs=1e-9)  # exact, because few groups differ
    assert grouped.interval == pytest.approx(single.interval, abs=0.03)
    assert grouped.interval_a == pytest.approx(single.interval_a, abs=0.03)
    assert independent.p_value < 1e-6 < grouped.p_value
    assert np.diff(independent.interval)[0] < np.diff(grouped.interval)[0] / 3


def test_groups_of_different_sizes_against_scipys_bootstrap():
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 30, 60)
    groups = np.repeat(np.arange(60), sizes)
    a = rng.random(len(groups)) < 0.7
    b = rng.random(len(groups)) < np.repeat(rng.choice([0.4, 0.95], 60), sizes)
    found = compare(*[dataclasses.replace(predictions(right), group=groups.astype(str)) for right in (a, b)])
    sums = np.bincount(groups, b.astype(float) - a)
    reference = bootstrap(
        (sums, sizes), lambda d, n, axis: d.sum(axis) / n.sum(axis), paired=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(7),
    )  # fmt: skip
    assert found.interval == pytest.approx(tuple(reference.confidence_interval), abs=0.01)
    assert found.difference == pytest.approx(b.mean() - a.mean())
    signs = np.random.default_rng(5).choice([-1, 1], (100_000, len(sums)))  # A and B exchanged in whole groups
    as_extreme = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9
    assert found.p_value == pytest.approx(as_extreme.mean(), abs=0.02)


def test_one_group_that_differs_shows_nothing():
    group = np.repeat(["a", "b"], 5)
    a, b = (dataclasses.replace(predictions([1] * 9 + [last]), group=group) for last in (0, 1))
    assert compare(a, b).p_value == 1.0


def test_other_groups_are_refused():
    a, b = in_groups(*pair(n=4), size=2)
    with pytest.raises(BadDataError, match="groups"):
        check_same_images(a, dataclasses.replace(b, group=b.group[::-1]), "here")


@pytest.mark.parametrize(("share", "count"), [(0.5, 10), (1.0, 20), (0.0, 20), (0.79, 50_000)])
def test_the_wilson_interval_is_scipys(share, count):
    reference = binomtest(round(share * count), count).proportion_ci(method="wilson")
    assert wilson_interval(share, count) == pytest.approx((reference.low, reference.high), abs=1e-6)


def test_the_command_in_words_and_as_json(tmp_path, capsys):
    a, b = pair()
    save_predictions(tmp_path / "a.npz", predictions(a))
    save_predictions(tmp_path / "b.npz", predictions(b))
    assert run("--compare", tmp_path / "a.npz", tmp_path / "b.npz", "--json") == 0
    expected = dataclasses.asdict(compare(predictions(a), predictions(b)))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected))
    run("--compare", tmp_path / "a.npz", tmp_path / "b.npz")
    text = capsys.readouterr().out
    for words in ("400 images", f"{a.mean():.4f}", f"{b.mean() - a.mean():+.4f}", "McNemar"):
        assert words in text


def test_other_images_and_other_labels_are_refused(tmp_path):
    a, b = pair()
    whole = predictions(a)
    save_predictions(tmp_path / "a.npz", whole)
    others = {
        "400 and 399 images": predictions(b[1:]),
        "different images: 0 and 1": dataclasses.replace(predictions(b), index=np.arange(1, 401)),
        "of 400 images differ": predictions(b, seed=2),
        "shapes": Predictions(np.arange(400), np.ones((400, 5), bool), whole.classes, whole.probabilities),
    }
    for words, other in others.items():
        save_predictions(tmp_path / "b.npz", other)
        with pytest.raises(BadDataError, match=words):
            run("--compare", tmp_path / "a.npz", tmp_path / "b.npz")
    with pytest.raises(InputMissingError):
        run("--compare", tmp_path / "a.npz", tmp_path / "nothing.npz")
    with pytest.raises(UsageError):
        run(tmp_path, "--compare", tmp_path / "a.npz", tmp_path / "a.npz")
    with pytest.raises(UsageError):
        run()
