"""Evaluates features with simple classifiers: nearest neighbours and ridge regression.

Options are chosen on a part of the training features that is held out; the test features are used once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from xception_jax.errors import BadDataError

NEIGHBOURS = (1, 3, 5, 9, 15, 25)
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 3))
"""Penalties of ridge regression, relative to the mean sum of squares of a centred feature."""
HELD_OUT = 0.2
"""Share of the training features of each class on which options are chosen."""
_ROWS = 1024  # test features that are compared at once

Scores = Float[np.ndarray, "n classes"]
Fitted = Callable[[Float[np.ndarray, "n c"]], Iterator[Scores]]
"""Returns the scores of the classes for features, once for each option."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one classifier.

    Attributes:
      name: the classifier.
      option: the chosen option, in words.
      held_out: its accuracy on the held-out training features.
      accuracy: its accuracy on the test features, fitted to all training features.
      predicted: predicted classes of the test features.
    """

    name: str
    option: str
    held_out: float
    accuracy: float
    predicted: Int[np.ndarray, " n"]


def fit_neighbours(
    features: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], classes: int, options: Sequence[float]
) -> Fitted:
    """Returns k nearest neighbours by cosine similarity: the scores are shares of the neighbours.

    Ties go to the smaller class. More neighbours than there are features count as all of them.
    """
    directions, counted = _directions(features), [min(int(k), len(features)) for k in options]
    most = max(counted)

    def scores_of(others: np.ndarray) -> Iterator[Scores]:
        nearest = np.concatenate(
            [
                np.argsort(-_directions(others[start : start + _ROWS]) @ directions.T, axis=1, kind="stable")[:, :most]
                for start in range(0, len(others), _ROWS)
            ]
        )
        rows = np.arange(len(nearest))[:, None]
        for k in counted:
            votes = np.zeros((len(nearest), classes))
            np.add.at(votes, (rows, labels[nearest[:, :k]]), 1)
            yield votes / k

    return scores_of


def fit_ridge(
    features: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], classes: int, options: Sequence[float]
) -> Fitted:
    """Returns ridge regression on indicators of the classes, in closed form, with an intercept that is not penalized.

    The penalty is an option times the mean sum of squares of a centred feature.
    """
    mean, targets = features.mean(axis=0, dtype=np.float64), np.eye(classes)[labels]
    centred, target_mean = features - mean, targets.mean(axis=0)
    targets -= target_mean
    if len(features) >= features.shape[1]:
        eigenvalues, basis = np.linalg.eigh(centred.T @ centred)
        projected = basis.T @ (centred.T @ targets)
    else:  # the same solution, from a smaller matrix
        eigenvalues, vectors = np.linalg.eigh(centred @ centred.T)
        basis, projected = centred.T @ vectors, vectors.T @ targets
    scale = max(eigenvalues.sum() / features.shape[1], np.finfo(np.float64).tiny)

    def scores_of(others: np.ndarray) -> Iterator[Scores]:
        rotated = (others - mean) @ basis
        for option in options:
            yield rotated @ (projected / (np.maximum(eigenvalues, 0) + option * scale)[:, None]) + target_mean

    return scores_of


CLASSIFIERS: dict[str, tuple[Callable[..., Fitted], Sequence[float], str]] = {
    "nearest neighbours": (fit_neighbours, NEIGHBOURS, "k = {:.0f}"),
    "ridge regression": (fit_ridge, PENALTIES, "penalty {:.0e}"),
}
"""The classifiers, with the options from which one is chosen and their text."""


def probe(
    train: tuple[Float[np.ndarray, "n c"], Int[np.ndarray, " n"]],
    test: tuple[Float[np.ndarray, "m c"], Int[np.ndarray, " m"]],
    classes: int,
    seed: int = 0,
) -> Iterator[Result]:
    """Yields the result of each classifier.

    Args:
      train: features and labels to fit to.
      test: features and labels to evaluate on.
      classes: number of classes.
      seed: seed of the choice of held-out features.
    """
    features, labels = train
    held_out = hold_out(labels, seed)
    if not held_out.any():
        what = "every class has one image, so that none can be held out to choose the options of a classifier"
        raise BadDataError(what, "the features to fit to", "add images")
    for name, (fit, options, text) in CLASSIFIERS.items():
        fitted = fit(features[~held_out], labels[~held_out], classes, options)
        accuracies = [_accuracy(scores, labels[held_out]) for scores in fitted(features[held_out])]
        best = int(np.argmax(accuracies))
        (scores,) = fit(features, labels, classes, [options[best]])(test[0])
        yield Result(
            name, text.format(options[best]), accuracies[best], _accuracy(scores, test[1]), scores.argmax(axis=1)
        )


def hold_out(labels: Int[np.ndarray, " n"], seed: int = 0) -> np.ndarray:
    """Returns [n] bool: `HELD_OUT` of the examples of each class, rounded, but never its only example."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(HELD_OUT * len(members))), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    return chosen


def count_shared(train: Float[np.ndarray, "n c"], test: Float[np.ndarray, "m c"]) -> int:
    """Returns how many test features are exactly those of a training image."""
    known = {row.tobytes() for row in np.ascontiguousarray(train)}
    return sum(row.tobytes() in known for row in np.ascontiguousarray(test))


def _accuracy(scores: Scores, labels: Int[np.ndarray, " n"]) -> float:
    return float(np.mean(scores.argmax(axis=1) == labels))


def _directions(features: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, np.finfo(features.dtype).tiny)
