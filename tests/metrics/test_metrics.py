"""Metric objects: values, masks, merging; with plain loops and scikit-learn as oracles."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score, roc_auc_score

from xception_jax.config import override, resolve
from xception_jax.metrics import METRICS, Metric, describe, main_metric, metrics_of
from xception_jax.metrics.multi_label import MeanAveragePrecision, SigmoidLoss, sigmoid_cross_entropy
from xception_jax.metrics.roc import AreaUnderROC
from xception_jax.metrics.single_label import SoftmaxLoss, TopK

pytestmark = pytest.mark.smoke


def state_of(metric: Metric, logits, labels, mask=None):
    logits = jnp.asarray(logits)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mask = jnp.ones(len(logits), bool) if mask is None else jnp.asarray(mask)
    return jax.device_get(jax.jit(metric.measure)(logits, jnp.asarray(labels), mask))


def value(metric: Metric, *states) -> float:
    return metric.compute(metric.merge(states))


def measured(metric: Metric, logits, labels, mask=None) -> float:
    return value(metric, state_of(metric, logits, labels, mask))


def random_batch(n=37, c=11, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, c)).astype(np.float32), rng.integers(0, c, n)


def random_labels(n=29, c=12, seed=1):
    """Logits and labels, some images without any, one with all."""
    rng = np.random.default_rng(seed)
    labels = rng.random((n, c)) < 0.25
    labels[:3], labels[3] = False, True
    return rng.normal(size=(n, c)).astype(np.float32), labels


SINGLE = [TopK(1), TopK(5), SoftmaxLoss(), AreaUnderROC(multi_label=False)]
MULTI = [
    MeanAveragePrecision(5),
    MeanAveragePrecision(5, over_all_labels=True),
    SigmoidLoss(),
    AreaUnderROC(multi_label=True),
]


def names(metrics):
    return [metric.name for metric in metrics]


# --- all metrics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [*SINGLE, *MULTI], ids=lambda metric: f"{type(metric).__name__}-{metric.name}")
def test_padding_counts_for_nothing_and_batches_merge(metric):
    logits, labels = random_batch(n=40) if metric in SINGLE else random_labels(n=40)
    expected = measured(metric, logits[:37], labels[:37])
    logits[37:], labels[37:] = np.nan, -1 if metric in SINGLE else True
    parts = [
        state_of(metric, logits[part], labels[part], np.arange(40)[part] < 37)
        for part in (slice(0, 16), slice(16, 32), slice(32, 40))
    ]
    assert value(metric, *parts) == pytest.approx(expected, rel=1e-6)
    assert value(metric, *parts[::-1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("metric", [*SINGLE, *MULTI], ids=lambda metric: f"{type(metric).__name__}-{metric.name}")
def test_a_mean_over_nothing_is_nan(metric):
    labels = [0, 1] if metric in SINGLE else [[0, 1, 0], [1, 0, 0]]
    assert math.isnan(measured(metric, np.zeros((2, 3)), labels, [False, False]))


def test_the_tables_lead_with_the_main_metric_and_names_are_unique():
    for loss in METRICS:
        config = override(resolve({}), {"loss.name": loss, "model.num_classes": 10})
        metrics = metrics_of(config)
        assert main_metric(config) is metrics[0] or main_metric(config) == metrics[0]
        assert main_metric(config).higher_is_better
        assert len(set(names(metrics))) == len(metrics)
    assert main_metric(override(config, {"loss.name": "softmax"})).name == "top1"
    assert names(metrics_of(resolve({}))) == ["top1", "top5", "loss"]  # too many classes for the area under ROC


def test_describe_takes_the_values_that_are_there():
    values = {"top1": 0.25, "loss": 1.5, "ema_top1": 0.5, "images_per_second": 3.0, "loss_scale": 8.0}
    assert describe(values, SINGLE, ("", "ema_")) == "top1 0.2500  loss 1.5000  ema_top1 0.5000"


# --- one label -------------------------------------------------------------------------------------------------------


def test_single_label_metrics_agree_with_a_loop():
    logits, labels = random_batch()
    loss, correct = 0.0, {1: 0, 5: 0}
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        loss -= math.log(math.exp(row[label]) / sum(math.exp(x) for x in row))
        for k in correct:
            correct[k] += label in sorted(range(len(row)), key=lambda c: -row[c])[:k]
    assert measured(SoftmaxLoss(), logits, labels) == pytest.approx(loss / 37, rel=1e-5)
    for k, count in correct.items():
        assert measured(TopK(k), logits, labels) == count / 37


@pytest.mark.parametrize(("num_classes", "shown"), [(1, False), (2, False), (5, False), (6, True), (10, True)])
def test_top5_is_a_metric_only_if_it_can_be_below_one(num_classes, shown):
    found = names(metrics_of(override(resolve({}), {"model.num_classes": num_classes})))
    assert ("top5" in found) == shown
    assert found[0] == "top1"


@pytest.mark.parametrize("num_classes", [1, 3, 5])
def test_top5_of_at_most_five_classes_is_one(num_classes):
    logits, labels = random_batch(c=num_classes)
    assert measured(TopK(5), logits, labels) == 1.0


def test_ties_are_broken_against_the_model():
    assert measured(TopK(1), np.zeros((4, 10)), [0, 3, 8, 9]) == measured(TopK(5), np.zeros((4, 10)), [0, 3, 8, 9]) == 0
    five_share_the_lead = np.zeros((1, 10))
    five_share_the_lead[0, :5] = 1
    assert (measured(TopK(1), five_share_the_lead, [0]), measured(TopK(5), five_share_the_lead, [0])) == (0, 1)


@pytest.mark.parametrize(("class_", "bad"), [(0, np.nan), (2, np.nan), (2, np.inf), (0, np.inf), (0, -np.inf)])
def test_an_example_with_a_logit_that_is_not_finite_is_wrong(class_, bad):
    logits = np.array([[0.0, 1.0, 9.0], [0.0, 1.0, 9.0], [9.0, 1.0, 0.0]])
    logits[0, class_] = bad
    assert measured(TopK(1), logits[:2], [2, 2]) == measured(TopK(5), logits[:2], [2, 2]) == 0.5
    # The one positive of class 2 ranks below the negative where it is not finite; class 0 the other way round.
    assert measured(AreaUnderROC(multi_label=False), logits[[0, 2]], [2, 0]) == 0.0


def test_half_precision_logits_are_summed_in_float32():
    logits, labels = random_batch(n=2000, c=4)
    low = jnp.asarray(logits, jnp.bfloat16)
    state = state_of(SoftmaxLoss(), low, labels)
    assert state["total"].dtype == jnp.float32
    assert state["total"] == state_of(SoftmaxLoss(), low.astype(jnp.float32), labels)["total"]


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


def both(logits, labels, k):
    return tuple(measured(MeanAveragePrecision(k, over_all_labels=every), logits, labels) for every in (False, True))


@pytest.mark.parametrize("k", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("levels", [None, 3])
def test_map_agrees_with_a_loop(k, levels):
    logits, labels = random_labels()
    if levels:  # many ties
        logits = np.round(logits * levels / 4)
    assert both(logits, labels, k) == pytest.approx(loop_map(logits, labels, k), rel=1e-5)


def test_map_over_all_classes_agrees_with_scikit_learn():
    logits, labels = random_labels()
    labelled = labels.any(axis=1)
    by_image = [average_precision_score(y, x) for y, x in zip(labels[labelled], logits[labelled], strict=True)]
    expected = label_ranking_average_precision_score(labels[labelled], logits[labelled])
    assert both(logits, labels, 100) == pytest.approx((np.mean(by_image), expected), rel=1e-5)


def test_the_two_denominators_differ_where_the_ranking_is_too_short():
    assert both([[3.0, 2.0, 1.0, 0.0]], [[1, 1, 1, 1]], 2) == (1.0, 0.5)


def test_multi_label_logits_that_are_not_finite_score_zero():
    assert both([[np.inf, 0.0], [1.0, 0.0]], [[1, 0], [1, 0]], 2) == (0.5, 0.5)


def test_sigmoid_loss_agrees_with_the_definition_and_is_stable():
    logits, labels = random_labels(n=6)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = -np.sum(np.where(labels, np.log(p), np.log(1 - p)), axis=1)
    np.testing.assert_allclose(sigmoid_cross_entropy(jnp.asarray(logits), jnp.asarray(labels)), expected, rtol=1e-5)
    assert measured(SigmoidLoss(), logits, labels) == pytest.approx(expected.mean(), rel=1e-5)
    assert measured(SigmoidLoss(), [[1e4, -1e4]], [[1, 1]]) == pytest.approx(1e4)


# --- area under ROC --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 2, 1])
def test_area_under_roc_of_two_classes_agrees_with_scikit_learn(levels):
    logits, labels = random_batch(n=200, c=2)
    if levels:  # ties within and across the classes
        logits = np.round(logits * levels)
    scores = jax.jit(jax.nn.softmax)(logits)[:, 1]
    expected = roc_auc_score(labels, scores)
    assert 0.3 < expected < 0.7
    assert measured(AreaUnderROC(multi_label=False), logits, labels) == pytest.approx(expected, abs=1e-12)


def test_probabilities_that_are_one_in_float32_are_ranked():
    logits = np.array([[0.0, 40.0], [0.0, 35.0], [0.0, 25.0], [0.0, 20.0]], np.float32)
    assert measured(AreaUnderROC(multi_label=False), logits, [1, 1, 0, 0]) == 1.0
    assert measured(AreaUnderROC(multi_label=True), logits, [[0, 1], [1, 1], [0, 0], [1, 0]]) == 0.75


@pytest.mark.parametrize("levels", [None, 1])
def test_area_under_roc_of_many_classes_agrees_with_scikit_learn(levels):
    logits, labels = random_batch(n=300, c=6)
    logits = logits if levels is None else np.round(logits * levels)
    # As indicators: scikit-learn takes a matrix of probabilities only if its rows sum to one in float64.
    expected = roc_auc_score(np.eye(6)[labels], jax.jit(jax.nn.softmax)(logits), average="macro")
    assert measured(AreaUnderROC(multi_label=False), logits, labels) == pytest.approx(expected, abs=1e-12)

    logits, labels = random_labels(n=60, c=5)
    logits = logits if levels is None else np.round(logits * levels)
    expected = roc_auc_score(labels, jax.jit(jax.nn.sigmoid)(logits), average="macro")
    assert measured(AreaUnderROC(multi_label=True), logits, labels) == pytest.approx(expected, abs=1e-12)


def test_classes_without_positives_or_negatives_are_left_out_of_the_area():
    logits, labels = random_batch(n=50, c=4)
    labels[labels == 3] = 0
    scores = np.asarray(jax.jit(jax.nn.softmax)(logits))
    expected = np.mean([roc_auc_score(labels == c, scores[:, c]) for c in range(3)])
    assert measured(AreaUnderROC(multi_label=False), logits, labels) == pytest.approx(expected, abs=1e-12)
    assert math.isnan(measured(AreaUnderROC(multi_label=False), logits[:4, :2], [1, 1, 1, 1]))
