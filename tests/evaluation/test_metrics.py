import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score

from xception_jax.errors import BadDataError, InputMissingError
from xception_jax.evaluation import metrics

pytestmark = pytest.mark.smoke


def single(logits, labels, mask=None):
    logits = jnp.asarray(logits)
    mask = jnp.ones(len(logits), bool) if mask is None else jnp.asarray(mask)
    return jax.device_get(jax.jit(metrics.single_label_sums)(logits, jnp.asarray(labels), mask))


def multi(logits, labels, k, mask=None):
    logits = jnp.asarray(logits)
    mask = jnp.ones(len(logits), bool) if mask is None else jnp.asarray(mask)
    return jax.device_get(jax.jit(metrics.multi_label_sums, static_argnums=3)(logits, jnp.asarray(labels), mask, k))


def random_batch(n=37, c=11, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, c)).astype(np.float32), rng.integers(0, c, n)


def random_labels(n=29, c=12, seed=1):
    """Logits and labels, some images without any, one with all."""
    rng = np.random.default_rng(seed)
    labels = rng.random((n, c)) < 0.25
    labels[:3], labels[3] = False, True
    return rng.normal(size=(n, c)).astype(np.float32), labels


# --- one label -------------------------------------------------------------------------------------------------------


def test_single_label_sums_agree_with_a_loop():
    logits, labels = random_batch()
    loss, correct = 0.0, {1: 0, 5: 0}
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        loss -= math.log(math.exp(row[label]) / sum(math.exp(x) for x in row))
        for k in correct:
            correct[k] += label in sorted(range(len(row)), key=lambda c: -row[c])[:k]
    sums = single(logits, labels)
    assert (sums["count"], sums["top1"], sums["top5"]) == (37, correct[1], correct[5])
    assert sums["loss"] == pytest.approx(loss, rel=1e-5)
    summary = metrics.summarise(sums)
    assert summary == pytest.approx(
        {"count": 37, "loss": loss / 37, "top1": correct[1] / 37, "top5": correct[5] / 37}, rel=1e-5
    )


def test_padding_counts_for_nothing_and_batches_add_up():
    logits, labels = random_batch(n=40)
    whole = single(logits[:37], labels[:37])
    logits[37:], labels[37:] = np.nan, -1
    parts = [
        single(logits[part], labels[part], np.arange(40)[part] < 37)
        for part in (slice(0, 16), slice(16, 32), slice(32, 40))
    ]
    total = jax.tree.map(lambda *x: sum(x), *parts)
    for name in whole:
        assert total[name] == pytest.approx(whole[name], rel=1e-5), name


@pytest.mark.parametrize("num_classes", [1, 3, 5])
def test_top5_of_at_most_five_classes_is_one(num_classes):
    logits, labels = random_batch(c=num_classes)
    assert single(logits, labels)["top5"] == 37


def test_ties_are_broken_against_the_model():
    constant = single(np.zeros((4, 10)), [0, 3, 8, 9])
    assert (constant["top1"], constant["top5"]) == (0, 0)
    five_share_the_lead = np.zeros((1, 10))
    five_share_the_lead[0, :5] = 1
    assert (single(five_share_the_lead, [0])["top1"], single(five_share_the_lead, [0])["top5"]) == (0, 1)


@pytest.mark.parametrize(("class_", "value"), [(0, np.nan), (2, np.nan), (2, np.inf), (0, np.inf), (0, -np.inf)])
def test_an_example_with_a_logit_that_is_not_finite_is_wrong(class_, value):
    logits = np.array([[0.0, 1.0, 9.0], [0.0, 1.0, 9.0]])
    logits[0, class_] = value
    sums = single(logits, [2, 2])
    assert (sums["count"], sums["top1"], sums["top5"]) == (2, 1, 1)


def test_half_precision_logits_are_summed_in_float32():
    logits, labels = random_batch(n=2000, c=4)
    low = jnp.asarray(logits, jnp.bfloat16)
    sums, reference = single(low, labels), single(low.astype(jnp.float32), labels)
    assert sums["loss"].dtype == jnp.float32
    assert sums["loss"] == reference["loss"]


def test_a_mean_over_nothing_is_nan():
    summary = metrics.summarise(single(np.zeros((2, 3)), [0, 1], [False, False]))
    assert summary["count"] == 0
    assert math.isnan(summary["top1"])


# --- several labels --------------------------------------------------------------------------------------------------


def loop_map(logits, labels, k):
    """MAP@k by both denominators, in plain Python."""
    by_min, by_all, images = 0.0, 0.0, 0
    for row, relevant in zip(logits, labels, strict=True):
        number = int(relevant.sum())
        if not number:
            continue
        images += 1
        hits, total = 0, 0.0
        for rank, c in enumerate(sorted(range(len(row)), key=lambda c: (-row[c], relevant[c]))[:k], 1):
            if relevant[c]:
                hits += 1
                total += hits / rank
        by_min += total / min(k, number)
        by_all += total / number
    return by_min / images, by_all / images


@pytest.mark.parametrize("k", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("levels", [None, 3])
def test_map_agrees_with_a_loop(k, levels):
    logits, labels = random_labels()
    if levels:  # many ties
        logits = np.round(logits * levels / 4)
    summary = metrics.summarise(multi(logits, labels, k))
    assert (summary["map_at_k"], summary["map_at_k_all"]) == pytest.approx(loop_map(logits, labels, k), rel=1e-5)
    assert (summary["count"], summary["unlabelled"]) == (29, 3)


def test_map_over_all_classes_agrees_with_scikit_learn():
    logits, labels = random_labels()
    summary = metrics.summarise(multi(logits, labels, 100))
    labelled = labels.any(axis=1)
    by_image = [average_precision_score(y, x) for y, x in zip(labels[labelled], logits[labelled], strict=True)]
    assert summary["map_at_k"] == pytest.approx(np.mean(by_image), rel=1e-5)
    expected = label_ranking_average_precision_score(labels[labelled], logits[labelled])
    assert summary["map_at_k_all"] == pytest.approx(expected, rel=1e-5)


def test_the_two_denominators_differ_where_the_ranking_is_too_short():
    summary = metrics.summarise(multi([[3.0, 2.0, 1.0, 0.0]], [[1, 1, 1, 1]], 2))
    assert (summary["map_at_k"], summary["map_at_k_all"]) == (1.0, 0.5)


def test_multi_label_padding_and_merging():
    logits, labels = random_labels()
    whole = multi(logits, labels, 5)
    padded = np.concatenate([logits, np.full((3, 12), np.nan, np.float32)])
    padded_labels = np.concatenate([labels, np.zeros((3, 12), bool)])
    mask = np.arange(32) < 29
    parts = [multi(padded[p], padded_labels[p], 5, mask[p]) for p in (slice(0, 16), slice(16, 32))]
    total = jax.tree.map(np.add, *parts)
    for name in whole:
        assert total[name] == pytest.approx(whole[name], rel=1e-5), name


def test_multi_label_logits_that_are_not_finite_score_zero():
    summary = metrics.summarise(multi([[np.inf, 0.0], [1.0, 0.0]], [[1, 0], [1, 0]], 2))
    assert summary["map_at_k"] == 0.5


def test_sigmoid_loss_agrees_with_the_definition_and_is_stable():
    logits, labels = random_labels(n=6)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -np.sum(np.where(labels, np.log(p), np.log(1 - p)), axis=1)
    np.testing.assert_allclose(metrics.sigmoid_loss(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)
    extreme = metrics.sigmoid_loss(jnp.array([[1e4, -1e4]]), jnp.array([[1, 1]]))
    assert extreme[0] == pytest.approx(1e4)


# --- saved predictions -----------------------------------------------------------------------------------------------


def make_predictions(n=50, c=7, k=3, seed=2, multi_label=False):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(c), n)
    classes = np.argsort(-scores, axis=1)[:, :k]
    label = rng.random((n, c)) < 0.3 if multi_label else rng.integers(0, c, n)
    best = np.take_along_axis(scores, classes, axis=1)
    return metrics.Predictions(rng.permutation(n), label, classes.astype(np.int32), best.astype(np.float32)), scores


@pytest.mark.parametrize("multi_label", [False, True])
def test_predictions_round_trip_in_the_order_of_their_index(tmp_path, multi_label):
    saved, _ = make_predictions(multi_label=multi_label)
    metrics.save_predictions(tmp_path / "test.npz", saved)
    loaded = metrics.load_predictions(tmp_path / "test.npz")
    order = np.argsort(saved.index)
    np.testing.assert_array_equal(loaded.index, np.arange(50))
    for name in ("label", "classes", "probabilities"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name)[order])
    assert (loaded.index.dtype, loaded.label.dtype) == (np.int64, bool if multi_label else np.int64)
    assert loaded.right.sum() == saved.right.sum()
    assert loaded.labelled.sum() == (saved.label.any(axis=1).sum() if multi_label else 50)
    assert multi_label != loaded.labelled.all()
    assert [path.name for path in tmp_path.iterdir()] == ["test.npz"]


def test_predictions_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    path = tmp_path / "test.npz"
    saved, _ = make_predictions()
    metrics.save_predictions(path, saved)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        metrics.save_predictions(path, make_predictions(seed=3)[0])
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["test.npz"]


def test_predictions_missing_or_damaged(tmp_path):
    path = tmp_path / "test.npz"
    with pytest.raises(InputMissingError):
        metrics.load_predictions(path)
    metrics.save_predictions(path, make_predictions()[0])
    whole = path.read_bytes()
    damaged = [b"", b"text", whole[: len(whole) // 2]]
    # Among these places are a name, a checksum and a compressed stream, which fail differently.
    damaged += [whole[:i] + b"\xff" * 40 + whole[i + 40 :] for i in range(0, len(whole) // 2, 40)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(BadDataError):
            metrics.load_predictions(path)
    np.savez(path, index=np.arange(3))
    with pytest.raises(BadDataError):
        metrics.load_predictions(path)


def test_confusion_matrix_and_most_confused():
    label = np.array([0, 0, 0, 1, 2, 2, 2])
    best = np.array([0, 1, 1, 1, 0, 0, 0])
    predictions = metrics.Predictions(np.arange(7), label, best[:, None], np.ones((7, 1)))
    expected = [[1, 2, 0], [0, 1, 0], [3, 0, 0]]
    np.testing.assert_array_equal(metrics.confusion_matrix(predictions, 3), expected)
    assert metrics.most_confused(predictions, 5) == [(2, 0, 3), (0, 1, 2)]
    assert metrics.most_confused(predictions, 1) == [(2, 0, 3)]
    perfect = metrics.Predictions(np.arange(7), label, label[:, None], np.ones((7, 1)))
    assert metrics.most_confused(perfect, 5) == []


def test_class_average_precision_is_exact_with_all_classes_and_a_lower_bound_with_fewer():
    predictions, scores = make_predictions(k=7, multi_label=True)
    predictions.label[:, 4] = False
    expected = [average_precision_score(predictions.label[:, c], scores[:, c]) for c in range(7) if c != 4]
    exact = metrics.class_average_precision(predictions)
    np.testing.assert_allclose(np.delete(exact, 4), expected, rtol=1e-5)
    assert math.isnan(exact[4])
    short = metrics.Predictions(
        predictions.index, predictions.label, predictions.classes[:, :2], predictions.probabilities[:, :2]
    )
    bound = np.delete(metrics.class_average_precision(short), 4)
    assert (bound <= np.array(expected) + 1e-6).all()
    assert (bound < np.array(expected)).any()


def test_calibration_error():
    def error(confidence, right):
        n = len(confidence)
        classes = np.where(right, 0, 1)[:, None]
        return metrics.expected_calibration_error(
            metrics.Predictions(np.arange(n), np.zeros(n, int), classes, np.array(confidence)[:, None])
        )

    assert error([0.75] * 4, np.array([1, 1, 1, 0])) == pytest.approx(0)
    assert error([0.9] * 4, np.array([1, 1, 0, 0])) == pytest.approx(0.4)
    # Too sure in one bin and not sure enough in another do not cancel.
    assert error([1.0] * 2 + [0.5] * 2, np.array([1, 0, 1, 1])) == pytest.approx(0.5)
    assert math.isnan(error([np.nan], np.array([1])))


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.5, 10, 0.2366, 0.7634), (1.0, 20, 0.8389, 1.0), (0.0, 20, 0.0, 0.1611), (0.79, 50_000, 0.7864, 0.7935)],
)
def test_wilson_interval(share, count, low, high):
    assert metrics.wilson_interval(share, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_of_nothing_is_everything():
    assert metrics.wilson_interval(math.nan, 0) == (0.0, 1.0)
