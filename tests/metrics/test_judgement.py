"""Areas, rates, thresholds and intervals, beside scikit-learn and SciPy."""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import (
    average_precision_score,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)

from xception_jax.evaluation.tables import judgement_as_dict
from xception_jax.logs.metrics_log import json_ready
from xception_jax.metrics import judgement
from xception_jax.metrics.judgement import choose_thresholds, judge
from xception_jax.metrics.predictions import Predictions
from xception_jax.metrics.ranking import choose_threshold, rank
from xception_jax.metrics.resampling import bootstrap_weights
from xception_jax.metrics.roc import AreaUnderROC


def make_predictions(n=300, c=4, seed=0, *, rounded=False, multi_label=False, absent=(), groups=0):
    """Scores that know something; `rounded` ones have many ties."""
    rng = np.random.default_rng(seed)
    label = rng.choice([k for k in range(c) if k not in absent], n)
    logits = rng.normal(size=(n, c))
    logits[np.arange(n), label] += 1.5
    scores = 1 / (1 + np.exp(-logits)) if multi_label else np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = (scores.round(1) if rounded else scores).astype(np.float32)
    if multi_label:
        label = (rng.random((n, c)) < 0.2) | (np.arange(c) == label[:, None])
        label[:10] = False
    classes = np.argsort(-scores, axis=1, kind="stable")[:, :3]
    best = np.take_along_axis(scores, classes, axis=1)
    group = np.array([f"patient {i % groups}" for i in range(n)]) if groups else None
    return Predictions(np.arange(n), label, classes, best, all_probabilities=scores, group=group)


def equal_error_rate(positive, scores):
    """The usual recipe with SciPy."""
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    return brentq(lambda x: 1.0 - x - interp1d(false, true)(x), 0.0, 1.0)


@pytest.mark.parametrize("kind", ["plain", "ties", "two classes", "several labels", "an absent class"])
def test_every_class_has_scikit_learns_numbers(kind):
    predictions = make_predictions(
        c=2 if kind == "two classes" else 4,
        rounded=kind == "ties",
        multi_label=kind == "several labels",
        absent=(2,) if kind == "an absent class" else (),
    )
    scores = predictions.all_probabilities[predictions.labelled]
    c = scores.shape[1]
    label = predictions.label[predictions.labelled]
    if kind == "several labels":
        positive, decided = label, scores >= 0.5
    else:
        positive, decided = label[:, None] == np.arange(c), predictions.classes[:, :1] == np.arange(c)
    result = judge(predictions, c, draws=0)
    present = [k for k in range(c) if positive[:, k].any()]
    assert len(present) == c - (kind == "an absent class")
    expected = precision_recall_fscore_support(positive, decided, labels=present, zero_division=0)
    rows = [result.classes[k] for k in present]
    for i, field in enumerate(("precision", "recall", "f1")):
        np.testing.assert_allclose([getattr(row, field).value for row in rows], expected[i])
        assert result.overall[f"macro_{field}"].value == pytest.approx(expected[i].mean())
        weighted = np.average(expected[i], weights=expected[3])
        assert result.overall[f"weighted_{field}"].value == pytest.approx(weighted)
    assert [row.support for row in rows] == expected[3].tolist()
    for row in rows:
        assert row.roc_auc.value == pytest.approx(roc_auc_score(positive[:, row.label], scores[:, row.label]))
        precision = average_precision_score(positive[:, row.label], scores[:, row.label])
        assert row.average_precision.value == pytest.approx(precision)
        expected_rate = equal_error_rate(positive[:, row.label], scores[:, row.label])
        assert row.equal_error_rate.value == pytest.approx(expected_rate, abs=1e-9)
    assert result.overall["roc_auc"].value == pytest.approx(np.mean([row.roc_auc.value for row in rows]))
    if kind == "an absent class":
        gone = result.classes[2]
        assert gone.support == 0
        assert all(math.isnan(getattr(gone, field).value) for field in ("precision", "recall", "f1", "roc_auc"))
    if kind == "several labels":
        assert "accuracy" not in result.overall
        assert result.count == 290  # images without a label do not count
    else:
        assert result.overall["accuracy"].value == pytest.approx(predictions.right.mean())


def test_a_perfect_and_a_useless_ranking():
    label = np.array([0, 0, 1, 1])
    classes = np.array([[0, 1], [0, 1], [1, 0], [1, 0]])
    perfect = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]], np.float32)
    for scores, area, rate in ((perfect, 1.0, 0.0), (np.full((4, 2), 0.5, np.float32), 0.5, 0.5)):
        best = np.take_along_axis(scores, classes, axis=1)
        result = judge(Predictions(np.arange(4), label, classes, best, all_probabilities=scores), 2, draws=0)
        assert [row.roc_auc.value for row in result.classes] == [area, area]
        assert [row.equal_error_rate.value for row in result.classes] == [rate, rate]
    # Every draw of a perfect result is perfect, so draws cannot give an interval.
    twice = Predictions(np.arange(4), label, classes, np.take_along_axis(perfect, classes, axis=1))
    assert judge(twice, 2).overall["accuracy"].low is None


def test_thresholds_reach_their_aim_where_they_are_chosen_and_nothing_better_does():
    for rounded in (False, True):
        predictions = make_predictions(c=2, rounded=rounded)
        scores, positive = predictions.all_probabilities[:, 1], predictions.label == 1
        ranking = rank(scores, positive, every=True)
        false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
        for at in (0.5, 0.9, 0.95, 1.0):
            chosen = choose_threshold(ranking, "specificity", at)
            assert np.mean(scores[~positive] < chosen) >= at
            assert np.mean(scores[positive] >= chosen) == pytest.approx(true[1 - false >= at].max())
            chosen = choose_threshold(ranking, "sensitivity", at)
            assert np.mean(scores[positive] >= chosen) >= at
            assert np.mean(scores[~positive] >= chosen) == pytest.approx(false[true >= at].min())
        chosen = choose_threshold(ranking, "equal_error", 0.95)
        gap = abs(np.mean(scores[~positive] >= chosen) - np.mean(scores[positive] < chosen))
        assert gap == pytest.approx(np.abs(false - (1 - true)).min())


def test_errors_may_be_equal_between_two_positives():
    """At 0.7, where no curve turns, half of the positives and half of the negatives are on the wrong side."""
    development = Predictions(
        index=np.arange(6),
        label=np.array([1, 0, 0, 0, 0, 1]),
        classes=np.zeros((6, 1), int),
        probabilities=np.ones((6, 1)),
        all_probabilities=np.stack([1 - (p := np.arange(9, 3, -1) / 10), p], axis=1),
    )
    equal = choose_thresholds(development)[3]
    assert (equal.label, equal.aim, equal.value) == (1, "equal_error", 0.7)


def test_a_threshold_that_no_example_reaches():
    negatives_first = rank(np.array([0.9, 0.1], np.float32), np.array([False, True]))
    assert choose_threshold(negatives_first, "specificity", 0.95) > np.float32(0.9)
    assert math.isnan(choose_threshold(rank(np.array([0.5]), np.array([True])), "sensitivity", 0.9))


def test_thresholds_come_from_the_development_split():
    development, test = make_predictions(seed=1, c=2), make_predictions(seed=2, c=2, groups=30)
    thresholds = choose_thresholds(development, at=0.9)
    assert [(t.label, t.aim, t.at) for t in thresholds[:3]] == [
        (0, "equal_error", None),
        (0, "specificity", 0.9),
        (0, "sensitivity", 0.9),
    ]
    result = judge(test, 2, thresholds)
    for point in result.points:
        label = point.threshold.label
        above = test.all_probabilities[:, label] >= point.threshold.value
        assert point.sensitivity.value == pytest.approx(above[test.label == label].mean())
        assert point.specificity.value == pytest.approx((~above)[test.label != label].mean())
        assert point.sensitivity.low < point.sensitivity.value < point.sensitivity.high
    # The other split decides: on the test split itself the aim is not met exactly.
    assert result.points[1].specificity.value != pytest.approx(0.9, abs=1e-3)
    own = judge(test, 2, choose_thresholds(test, at=0.9))
    assert own.points[1].threshold != result.points[1].threshold
    for first in (0, 3):
        assert own.points[first + 1].specificity.value >= 0.9
        assert own.points[first + 2].sensitivity.value >= 0.9


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_confident_classifier_is_ranked_by_its_logits(multi_label):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 2000)
    margin = (rng.normal(size=2000) * 8 + np.where(label == 1, 30, 20)).astype(np.float32)
    logits = np.stack([-margin if multi_label else np.zeros_like(margin), margin], axis=1)
    probabilities = np.asarray(jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits))
    assert (probabilities[:, 1] == 1).mean() > 0.5
    if multi_label:
        label = np.stack([label == 0, label == 1], axis=1)
    classes = np.argsort(-logits, axis=1)
    best = np.take_along_axis(probabilities, classes, axis=1)
    both = Predictions(np.arange(2000), label, classes, best, logits, probabilities)
    parts = [
        Predictions(**{name: value if value is None else value[rows] for name, value in vars(both).items()})
        for rows in (np.arange(1000), np.arange(1000, 2000))
    ]
    thresholds = choose_thresholds(parts[0], at=0.9)
    assert all(0 < entry.value <= 1 for entry in thresholds)
    result = judge(parts[1], 2, thresholds, draws=0)
    metric = AreaUnderROC(multi_label)
    state = metric.measure(jnp.asarray(parts[1].logits), jnp.asarray(parts[1].label), jnp.ones(1000, bool))
    area = metric.compute(metric.merge([jax.tree.map(np.asarray, state)]))
    assert result.overall["roc_auc"].value == pytest.approx(area, abs=1e-6)
    assert judge(dataclasses.replace(parts[1], logits=None), 2, draws=0).overall["roc_auc"].value < area - 0.05
    # On the split that they are chosen on, thresholds reach their aim.
    for point in judge(parts[0], 2, thresholds, draws=0).points:
        if point.threshold.aim != "equal_error":
            assert getattr(point, point.threshold.aim).value == pytest.approx(0.9, abs=0.01)
    assert result.points[1].sensitivity.value > 0.1
    # Predictions from a file have no logits: the probability of the threshold is applied.
    without = judge(dataclasses.replace(parts[1], logits=None), 2, thresholds, draws=0).points[0]
    above = parts[1].all_probabilities[:, 0] >= thresholds[0].value
    positive = parts[1].label[:, 0] if multi_label else parts[1].label == 0
    assert without.sensitivity.value == pytest.approx(above[positive].mean())


def test_logits_that_are_not_finite_have_the_worst_rank():
    predictions = make_predictions(c=2)
    logits = np.log(predictions.all_probabilities)
    expected = judge(predictions, 2, draws=0)
    assert judge(dataclasses.replace(predictions, logits=logits), 2, draws=0).classes == expected.classes
    for array in (predictions.all_probabilities, predictions.probabilities, logits):
        array[:50] = np.nan
    expected = judge(predictions, 2, choose_thresholds(predictions))
    result = judge(found := dataclasses.replace(predictions, logits=logits), 2, choose_thresholds(found))
    assert result.classes == expected.classes
    assert [(p.sensitivity, p.specificity) for p in result.points] == [
        (p.sensitivity, p.specificity) for p in expected.points
    ]


def test_a_bootstrap_over_groups_is_wider_and_repeats():
    independent = make_predictions(n=200, c=2)
    # Every image five times: as groups, nothing is known more exactly than from one image each.
    five = {name: np.repeat(getattr(independent, name), 5, axis=0) for name in ("label", "classes", "probabilities")}
    scores = np.repeat(independent.all_probabilities, 5, axis=0)
    group = np.repeat(np.arange(200), 5).astype(str)
    grouped = Predictions(np.arange(1000), **five, all_probabilities=scores, group=group)
    narrow, wide, single = (judge(p, 2) for p in (dataclasses.replace(grouped, group=None), grouped, independent))
    for name in ("accuracy", "macro_f1", "roc_auc", "equal_error_rate"):
        widths = [result.overall[name].high - result.overall[name].low for result in (narrow, wide, single)]
        assert widths[0] < 0.6 * widths[1], name
        assert widths[1] == pytest.approx(widths[2], rel=0.15), name
    assert wide.overall["accuracy"].value == pytest.approx(single.overall["accuracy"].value)
    assert (wide.groups, narrow.groups, wide.draws) == (200, None, 2000)
    assert judge(grouped, 2).overall == wide.overall
    # The textbook's standard error of a share.
    share = single.overall["accuracy"]
    assert (share.high - share.low) / 2 == pytest.approx(
        1.96 * math.sqrt(share.value * (1 - share.value) / 200), rel=0.1
    )


def test_a_draw_takes_whole_groups():
    groups = np.array([0, 0, 1, 2, 2, 2])
    drawn = np.concatenate(list(bootstrap_weights(groups, 500)), axis=1)
    assert drawn.shape == (6, 500)
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[3] == drawn[5]).all()
    assert (drawn[[0, 2, 3]].sum(axis=0) == 3).all()
    assert drawn.mean() == pytest.approx(1, abs=0.05)


def test_groups_are_judged_by_their_mean_probability():
    scores = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5], [0.3, 0.7]], np.float32)
    label = np.array([0, 0, 1, 1, 0, 1])
    group = np.array(["a", "a", "b", "b", "mixed", "mixed"])
    classes = np.argsort(-scores, axis=1, kind="stable")
    best = np.take_along_axis(scores, classes, axis=1)
    result = judge(Predictions(np.arange(6), label, classes, best, all_probabilities=scores, group=group), 2)
    assert result.overall["accuracy"].value == pytest.approx(4 / 6)
    by_group = result.by_group
    assert (by_group.count, by_group.mixed) == (2, 1)
    assert (by_group.accuracy.value, by_group.roc_auc.value) == (1.0, 1.0)


def test_without_all_probabilities_there_are_no_areas():
    predictions = dataclasses.replace(make_predictions(groups=20), all_probabilities=None)
    result = judge(predictions, 4, choose_thresholds(predictions))
    assert "roc_auc" not in result.overall
    assert math.isnan(result.classes[0].roc_auc.value)
    assert result.classes[0].f1.low is not None
    assert result.points == result.rankings == ()
    assert result.by_group is None


@pytest.mark.parametrize("multi_label", [False, True])
def test_many_classes_give_the_same_without_a_table(multi_label, monkeypatch):
    predictions = dataclasses.replace(make_predictions(c=7, multi_label=multi_label, groups=9), all_probabilities=None)
    small = judge(predictions, 7, draws=0)
    monkeypatch.setattr(judgement, "_MAX_RESAMPLED", 0)
    assert judge(predictions, 7) == small
    # 20,000 classes and 50,000 examples would take a gigabyte in every table.
    rng = np.random.default_rng(0)
    label = rng.integers(0, 20_000, 50_000)
    large = Predictions(np.arange(50_000), label, label[:, None].astype(np.int32), np.ones((50_000, 1), np.float32))
    tracemalloc.start()
    result = judge(large, 20_000)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert result.overall["macro_f1"].value == 1


def test_what_is_not_finite_counts_as_wrong():
    predictions = make_predictions(c=2)
    for name in ("all_probabilities", "probabilities"):
        getattr(predictions, name)[:50] = np.nan
    result = judge(predictions, 2)
    label = predictions.label
    assert result.overall["accuracy"].value == pytest.approx(predictions.right.mean())
    assert predictions.right[:50].sum() == 0
    scores = np.where(np.arange(300) < 50, np.where(label == 1, -1, 2), predictions.all_probabilities[:, 1])
    assert result.classes[1].roc_auc.value == pytest.approx(roc_auc_score(label, scores))


def test_no_examples_and_one_class():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        empty = make_predictions(n=0)
        assert judge(empty, 4, choose_thresholds(make_predictions())).count == 0
        same = make_predictions(c=2, absent=(1,))
        result = judge(same, 2, choose_thresholds(same))
    assert result.points == ()
    assert math.isnan(result.overall["roc_auc"].value)
    assert result.overall["macro_recall"].value == pytest.approx(same.right.mean())


def test_json_has_every_number_with_its_interval():
    test = make_predictions(c=2, groups=12)
    found = judgement_as_dict(judge(test, 2, choose_thresholds(make_predictions(c=2, seed=3))), ["cat", "dog"])
    found = json.loads(json.dumps(json_ready(found)))
    assert (found["images"], found["groups"], found["bootstrap_draws"]) == (300, 12, 2000)
    assert len(found["roc_auc_interval"]) == 2
    assert [row["name"] for row in found["classes"]] == ["cat", "dog"]
    assert found["thresholds"][1]["aim"] == "specificity"
    assert set(found["thresholds"][1]) >= {"at", "threshold", "sensitivity", "sensitivity_interval", "specificity"}
