from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from xception_jax.errors import BadDataError, InputMissingError, StorageError
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import (
    Predictions,
    class_average_precision,
    confidence_bins,
    confusion_matrix,
    expected_calibration_error,
    load_predictions,
    mistakes,
    most_confused,
    save_predictions,
)


def make_predictions(n=50, c=7, k=3, seed=2, multi_label=False):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(c), n)
    classes = np.argsort(-scores, axis=1)[:, :k]
    label = rng.random((n, c)) < 0.3 if multi_label else rng.integers(0, c, n)
    best = np.take_along_axis(scores, classes, axis=1)
    return Predictions(rng.permutation(n), label, classes.astype(np.int32), best.astype(np.float32)), scores


@pytest.mark.parametrize("multi_label", [False, True])
def test_predictions_round_trip_in_the_order_of_their_index(tmp_path, multi_label):
    saved, _ = make_predictions(multi_label=multi_label)
    save_predictions(tmp_path / "test.npz", saved)
    loaded = load_predictions(tmp_path / "test.npz")
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
    save_predictions(path, saved)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space"):
        save_predictions(path, make_predictions(seed=3)[0])
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["test.npz"]


def test_predictions_missing_or_damaged(tmp_path):
    path = tmp_path / "test.npz"
    with pytest.raises(InputMissingError):
        load_predictions(path)
    save_predictions(path, make_predictions()[0])
    whole = path.read_bytes()
    damaged = [b"", b"text", whole[: len(whole) // 2]]
    # Among these places are a name, a checksum and a compressed stream, which fail differently.
    damaged += [whole[:i] + b"\xff" * 40 + whole[i + 40 :] for i in range(0, len(whole) // 2, 40)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(BadDataError):
            load_predictions(path)
    np.savez(path, index=np.arange(3))
    with pytest.raises(BadDataError):
        load_predictions(path)


def test_confusion_matrix_and_most_confused():
    label = np.array([0, 0, 0, 1, 2, 2, 2])
    best = np.array([0, 1, 1, 1, 0, 0, 0])
    predictions = Predictions(np.arange(7), label, best[:, None], np.ones((7, 1)))
    expected = [[1, 2, 0], [0, 1, 0], [3, 0, 0]]
    np.testing.assert_array_equal(confusion_matrix(predictions, 3), expected)
    assert most_confused(predictions, 5) == [(2, 0, 3), (0, 1, 2)]
    assert most_confused(predictions, 1) == [(2, 0, 3)]
    perfect = Predictions(np.arange(7), label, label[:, None], np.ones((7, 1)))
    assert most_confused(perfect, 5) == []


def test_an_image_without_a_finite_probability_has_no_predicted_class():
    found, _ = make_predictions()
    broken = np.where(np.arange(50)[:, None] < 20, np.nan, found.probabilities).astype(np.float32)
    found = dataclasses.replace(found, probabilities=broken)
    assert confusion_matrix(found, 7).sum() == 30
    assert all(label != wrong for label, wrong, _ in most_confused(found, 100))
    assert found.right.sum() == np.trace(confusion_matrix(found, 7))
    rows = mistakes(found, list("abcdefg"))
    assert [(row["predicted"], row["probability"]) for row in rows[-20:]] == 20 * [(None, None)]
    assert all(row["predicted"] for row in rows[:-20])


def test_bins_of_confidence_include_their_upper_end():
    confidence = np.array([0.11, 0.19, 0.2, 0.21])[:, None]
    found = confidence_bins(Predictions(np.arange(4), np.zeros(4, int), np.zeros((4, 1), int), confidence), 10)
    assert [entry.count for entry in found] == [3, 1]


def test_class_average_precision_is_exact_with_all_classes_and_a_lower_bound_with_fewer():
    predictions, scores = make_predictions(k=7, multi_label=True)
    predictions.label[:, 4] = False
    expected = [average_precision_score(predictions.label[:, c], scores[:, c]) for c in range(7) if c != 4]
    exact = class_average_precision(predictions)
    np.testing.assert_allclose(np.delete(exact, 4), expected, rtol=1e-5)
    assert math.isnan(exact[4])
    short = Predictions(
        predictions.index, predictions.label, predictions.classes[:, :2], predictions.probabilities[:, :2]
    )
    bound = np.delete(class_average_precision(short), 4)
    assert (bound <= np.array(expected) + 1e-6).all()
    assert (bound < np.array(expected)).any()


def test_calibration_error():
    def error(confidence, right):
        n = len(confidence)
        classes = np.where(right, 0, 1)[:, None]
        return expected_calibration_error(
            Predictions(np.arange(n), np.zeros(n, int), classes, np.array(confidence)[:, None])
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
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=1e-4)


def test_wilson_interval_of_nothing_is_everything():
    assert wilson_interval(math.nan, 0) == (0.0, 1.0)
