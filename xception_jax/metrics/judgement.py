"""Judges a classifier from its saved predictions: by class, by threshold and by group, with intervals.

`evaluate` and the report show the result of `judge`. Thresholds come from `choose_thresholds` on the development split;
no threshold is ever chosen on the examples that it is judged by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from xception_jax.metrics import ranking
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import Predictions
from xception_jax.metrics.ranking import AIMS, Ranking
from xception_jax.metrics.resampling import DRAWS, Estimate, Statistics, estimate

AT = 0.95  # the specificity, or sensitivity, that thresholds are chosen for
_MAX_RESAMPLED = 200_000  # examples x classes; 2,000 draws of more take over ten seconds

_OF_RANKING = {
    "roc_auc": ranking.roc_area,
    "average_precision": ranking.average_precision,
    "equal_error_rate": ranking.equal_error_rate,
}


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A threshold that was chosen on the development split.

    Attributes:
      label: the class whose probability it is compared with.
      aim: 'equal_error', 'specificity' or 'sensitivity'.
      at: the wanted specificity or sensitivity; None for 'equal_error'.
      value: the threshold; NaN if the development split has no positives or no negatives.
      logit: the same for logits, if the development split was ranked by them: float32 has few probabilities close to 1.
    """

    label: int
    aim: str
    at: float | None
    value: float
    logit: float | None = None


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """What a threshold gives on the examples that are judged."""

    threshold: Threshold
    sensitivity: Estimate
    specificity: Estimate


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """The results of one class against all others. Rates without examples are NaN.

    Attributes:
      label: number of the class.
      support: number of its examples.
      precision, recall, f1: of the decision for the most probable class, or for each probability of at least 0.5 if an
        example may have several labels.
      roc_auc, average_precision, equal_error_rate: over all thresholds; NaN unless all probabilities are known.
    """

    label: int
    support: int
    precision: Estimate
    recall: Estimate
    f1: Estimate
    roc_auc: Estimate
    average_precision: Estimate
    equal_error_rate: Estimate


@dataclasses.dataclass(frozen=True)
class GroupScores:
    """The results of whole groups, each with the mean probabilities of its examples.

    Attributes:
      count: number of groups whose examples have one label.
      mixed: number of groups that are left out, because their examples have several labels.
      accuracy, roc_auc: over these groups.
    """

    count: int
    mixed: int
    accuracy: Estimate
    roc_auc: Estimate


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The results of a classifier on one split.

    Attributes:
      count: number of examples with a label.
      groups: number of groups, or None if the dataset has none.
      draws: number of bootstrap draws behind the intervals, 0 if there are none.
      overall: accuracy (single label only) and, over all classes with examples, macro_precision, macro_recall and
        macro_f1, the same weighted by support, and the means of the areas and of the equal error rate.
      classes: the results of each class.
      points: what the thresholds of the development split give.
      by_group: the results of whole groups, or None.
      rankings: rankings of each class, for curves; empty unless all probabilities are known.
    """

    count: int
    groups: int | None
    draws: int
    overall: dict[str, Estimate]
    classes: tuple[ClassScores, ...]
    points: tuple[OperatingPoint, ...]
    by_group: GroupScores | None
    rankings: tuple[Ranking, ...]


@dataclasses.dataclass(frozen=True)
class _Examples:
    """Labelled examples: decisions, labels and, if known, all scores, each [n, c]; and the group of each example.

    Scores are probabilities. `logits` rank the examples instead where they are kept, and rise with the probabilities.
    """

    decision: Bool[np.ndarray, "n c"]
    positive: Bool[np.ndarray, "n c"]
    scores: Float[np.ndarray, "n c"] | None
    group: Int[np.ndarray, " n"]
    multi_label: bool
    logits: Float[np.ndarray, "n c"] | None = None

    @property
    def resampled(self) -> bool:
        return 0 < self.positive.size <= _MAX_RESAMPLED

    def rankings(self, *, every: bool = False) -> tuple[Ranking, ...]:
        if self.scores is None or not len(self.scores):
            return ()
        ranked = self.scores if self.logits is None else self.logits
        return tuple(ranking.rank(s, p, every=every) for s, p in zip(ranked.T, self.positive.T, strict=True))

    def above(self, threshold: Threshold) -> Bool[np.ndarray, " n"]:
        """Returns which examples reach a threshold."""
        assert self.scores is not None
        if self.logits is not None and threshold.logit is not None:
            return self.logits[:, threshold.label] >= threshold.logit
        return self.scores[:, threshold.label] >= threshold.value


def choose_thresholds(development: Predictions, at: float = AT) -> list[Threshold]:
    """Chooses thresholds for each class on the development split; none if not all probabilities are known.

    For two classes of one label, the thresholds of both are chosen; either may be the one to be found.
    """
    if development.all_probabilities is None:
        return []
    examples = _examples(development, development.all_probabilities.shape[1])
    found = []
    for label, of_class in enumerate(examples.rankings(every=True)):
        for aim in AIMS:
            value, logit = ranking.choose_threshold(of_class, aim, at), None
            if examples.logits is not None:
                value, logit = float(np.exp(-np.logaddexp(0, -value))), value  # the sigmoid
            found.append(Threshold(label, aim, None if aim == "equal_error" else at, value, logit))
    return found


def judge(
    predictions: Predictions, num_classes: int, thresholds: Sequence[Threshold] = (), *, draws: int = DRAWS
) -> Judgement:
    """Judges a classifier.

    Args:
      predictions: predictions on the split to judge by.
      num_classes: number of classes.
      thresholds: the result of `choose_thresholds` on another split.
      draws: number of bootstrap draws, over groups if there are any, else over images. There are none if there are more
        than `_MAX_RESAMPLED` examples x classes.
    """
    if predictions.all_probabilities is None and len(predictions.label) * num_classes > _MAX_RESAMPLED:
        return _judge_decisions(predictions, num_classes)
    examples = _examples(predictions, num_classes)
    draws = draws if examples.resampled else 0
    rankings = examples.rankings()
    thresholds = [entry for entry in thresholds if examples.scores is not None and math.isfinite(entry.value)]
    found: dict[str, list[Estimate]] = {}
    if len(examples.group):
        found = estimate(lambda w: _statistics(examples, rankings, thresholds, w), examples.group, draws)
    by_group = _judge_groups(examples, draws) if predictions.group is not None else None
    return Judgement(
        count=len(examples.group),
        groups=None if predictions.group is None else int(examples.group.max(initial=-1)) + 1,
        draws=draws,
        overall=_overall(found),
        classes=_classes(found, examples.positive.sum(axis=0)),
        points=tuple(
            OperatingPoint(entry, found["sensitivity"][i], found["specificity"][i])
            for i, entry in enumerate(thresholds)
            if found
        ),
        by_group=by_group,
        rankings=rankings,
    )


def _judge_decisions(predictions: Predictions, num_classes: int) -> Judgement:
    """Judges decisions only, without a table of examples x classes: it has a billion cells for 20,000 classes."""
    labelled = predictions.labelled
    label, classes = predictions.label[labelled], predictions.classes[labelled].astype(np.int64)
    probabilities = predictions.probabilities[labelled]
    if predictions.multi_label:
        decided = probabilities >= 0.5
        support = label.sum(axis=0)
        columns = classes[decided], classes[decided & np.take_along_axis(label, classes, axis=1)]
    else:
        support = np.bincount(label, minlength=num_classes)
        columns = classes[np.isfinite(probabilities[:, 0]), 0], label[predictions.right[labelled]]
    counts = [support, *(np.bincount(found, minlength=num_classes) for found in columns)]
    found = _decisions(*(column[:, None].astype(float) for column in counts))
    if not predictions.multi_label:
        found["accuracy"] = predictions.right[labelled].mean(keepdims=True)
    estimates = {name: [Estimate(float(v)) for v in np.atleast_2d(values)[:, 0]] for name, values in found.items()}
    groups = None if predictions.group is None else len(np.unique(predictions.group[labelled]))
    return Judgement(len(label), groups, 0, _overall(estimates), _classes(estimates, support), (), None, ())


_MEANS = [f"{kind}_{field}" for kind in ("macro", "weighted") for field in ("precision", "recall", "f1")]
_OVERALL = ("accuracy", *_MEANS, *(f"mean_{name}" for name in _OF_RANKING))


def _overall(found: dict[str, list[Estimate]]) -> dict[str, Estimate]:
    return {name.removeprefix("mean_"): values[0] for name, values in found.items() if name in _OVERALL}


def _classes(found: dict[str, list[Estimate]], support: Int[np.ndarray, " c"]) -> tuple[ClassScores, ...]:
    nothing = [Estimate(math.nan)] * len(support)
    columns = {field: found.get(field, nothing) for field in ("precision", "recall", "f1", *_OF_RANKING)}
    return tuple(
        ClassScores(label, int(count), **{field: values[label] for field, values in columns.items()})
        for label, count in enumerate(support)
    )


def _examples(predictions: Predictions, num_classes: int) -> _Examples:
    labelled = predictions.labelled
    label, scores = predictions.label[labelled], predictions.all_probabilities
    if scores is not None:
        scores = scores[labelled]
    finite = np.isfinite(predictions.probabilities[labelled, 0])[:, None]
    if predictions.multi_label:
        positive = label.astype(bool)
        decision = scores >= 0.5 if scores is not None else _top(predictions, labelled, positive.shape)
    else:
        positive = label[:, None] == np.arange(num_classes)
        decision = predictions.classes[labelled, :1] == np.arange(num_classes)
    logits = _ranking_logits(predictions)
    if logits is not None:
        logits = _worst_if_not_finite(logits[labelled], positive, -3e38, 3e38)  # no logit of float32 is beyond
    if scores is not None:
        scores = _worst_if_not_finite(scores, positive, -1.0, 2.0)
    names = np.arange(len(label)) if predictions.group is None else predictions.group[labelled]
    group = np.unique(names, return_inverse=True)[1]
    return _Examples(decision & finite, positive, scores, group, predictions.multi_label, logits)


def _ranking_logits(predictions: Predictions) -> Float[np.ndarray, "n c"] | None:
    """Returns logits that rise with the probabilities, as `metrics.roc` ranks by; None if there are none."""
    logits = predictions.logits
    if logits is None or predictions.all_probabilities is None:
        return None
    if predictions.multi_label:
        return logits
    return logits - logits[:, ::-1] if logits.shape[1] == 2 else None


def _worst_if_not_finite(
    scores: Float[np.ndarray, "n c"], positive: Bool[np.ndarray, "n c"], low: float, high: float
) -> Float[np.ndarray, "n c"]:
    """Gives the worst rank to an example with a score that is not finite, as in training."""
    return np.where(np.isfinite(scores).all(axis=1, keepdims=True), scores, np.where(positive, low, high))


def _top(predictions: Predictions, labelled: np.ndarray, shape: tuple[int, ...]) -> Bool[np.ndarray, "n c"]:
    """Returns which of the saved classes have a probability of at least 0.5."""
    decision = np.zeros(shape, bool)
    classes, probabilities = predictions.classes[labelled].astype(np.int64), predictions.probabilities[labelled]
    np.put_along_axis(decision, classes, probabilities >= 0.5, axis=1)
    return decision


def _statistics(
    examples: _Examples, rankings: Sequence[Ranking], thresholds: Sequence[Threshold], weights: np.ndarray
) -> Statistics:
    """Computes all statistics for columns of weights [n, b]: [b] or [classes, b] for each name."""
    decision, positive = (a.astype(weights.dtype).T for a in (examples.decision, examples.positive))
    support, decided, hit = positive @ weights, decision @ weights, (positive * decision) @ weights
    found = _decisions(support, decided, hit)
    if rankings:
        counts = [ranking.count(entry, weights) for entry in rankings]
        found |= {name: np.stack([area(c) for c in counts]) for name, area in _OF_RANKING.items()}
        found |= {f"mean_{name}": _mean(found[name], np.ones_like(support)) for name in _OF_RANKING}
    if not examples.multi_label:
        found["accuracy"] = hit.sum(axis=0) / weights.sum(axis=0)
    if thresholds and examples.scores is not None:
        above = np.stack([examples.above(entry) for entry in thresholds])
        wanted = examples.positive[:, [entry.label for entry in thresholds]].T
        for name, kept, right in (("sensitivity", wanted, above), ("specificity", ~wanted, ~above)):
            total = kept.astype(weights.dtype) @ weights
            share = ((kept & right).astype(weights.dtype) @ weights) / np.maximum(total, 1)
            found[name] = np.where(total > 0, share, np.nan)
    return found


def _decisions(
    support: Float[np.ndarray, "c b"], decided: Float[np.ndarray, "c b"], hit: Float[np.ndarray, "c b"]
) -> Statistics:
    """Computes precision, recall and F1 from the positives, the decisions and the right decisions for each class."""
    found = {
        # A class with examples that is never decided for has a precision of 0.
        "precision": np.where(support > 0, hit / np.maximum(decided, 1), np.nan),
        "recall": np.where(support > 0, hit / np.maximum(support, 1), np.nan),
        "f1": np.where(support > 0, 2 * hit / np.maximum(support + decided, 1), np.nan),
    }
    for field in ("precision", "recall", "f1"):
        found[f"macro_{field}"] = _mean(found[field], np.ones_like(support))
        found[f"weighted_{field}"] = _mean(found[field], support)
    return found


def _mean(values: Float[np.ndarray, "c b"], weights: Float[np.ndarray, "c b"]) -> Float[np.ndarray, " b"]:
    """Returns the weighted mean over the classes with a value; NaN if there are none."""
    weights = np.where(np.isnan(values), 0, weights)
    total = weights.sum(axis=0)
    return np.where(total > 0, (np.nan_to_num(values) * weights).sum(axis=0) / np.maximum(total, 1e-30), np.nan)


def _judge_groups(examples: _Examples, draws: int) -> GroupScores | None:
    """Judges groups by the mean probabilities of their examples; None for several labels or unknown probabilities."""
    if examples.scores is None or examples.multi_label or not len(examples.group):
        return None
    sizes = np.bincount(examples.group)
    scores, labels = (
        np.stack([np.bincount(examples.group, column) for column in table.T], axis=1) / sizes[:, None]
        for table in (examples.scores, examples.positive)
    )
    uniform = labels.max(axis=1) == 1
    if not uniform.any():
        return None
    scores, positive = scores[uniform], labels[uniform] == 1
    # Ties count as errors, as for single images.
    best = scores.max(axis=1, keepdims=True)
    right = (positive & (scores == best)).any(axis=1) & ((scores == best).sum(axis=1) == 1)
    count = len(scores)
    whole = _Examples(positive, positive, scores, np.arange(count), multi_label=False)
    found = estimate(lambda w: _statistics(whole, whole.rankings(), (), w), whole.group, draws)
    share = float(right.mean())
    return GroupScores(
        count=count,
        mixed=int((~uniform).sum()),
        accuracy=Estimate(share, *wilson_interval(share, count)),
        roc_auc=found["mean_roc_auc"][0],
    )
