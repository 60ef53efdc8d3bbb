"""Computes the area under the receiver operating characteristic (ROC) curve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from xception_jax.metrics.metric import Metric, State
from xception_jax.metrics.predictions import MAX_CLASSES


@dataclasses.dataclass(frozen=True)
class AreaUnderROC(Metric):
    """Area under the ROC curve: the probability that a positive scores higher than a negative. Ties count half.

    With two classes, it is the area of class 1. With more classes, or with multi-label data, it is the one-vs-rest mean
    over all classes that have both positives and negatives (scikit-learn's `average='macro'`).

    Scores are logits, or differences of two, because probabilities close to 0 or 1 are equal in float32; with more than
    two classes they are probabilities. The metric is not additive, so the state has the scores of all examples. An
    example with a logit that is not finite gets the worst possible rank.
    """

    multi_label: bool

    name = "roc_auc"
    title = "area under ROC"
    is_share = False

    def suits(self, num_classes: int) -> bool:
        """Returns whether there are enough classes for a curve, and few enough to keep all scores."""
        return (2 - self.multi_label) <= num_classes <= MAX_CLASSES

    def measure(self, logits: Float[Array, "b c"], labels: Shaped[Array, "b ..."], mask: Bool[Array, " b"]) -> State:
        scores = jax.nn.softmax(logits)
        if self.multi_label:
            scores = logits
        elif logits.shape[-1] == 2:
            scores = logits - logits[:, ::-1]
        positive = labels.astype(bool) if self.multi_label else jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        finite = jnp.isfinite(logits).all(axis=-1, keepdims=True)
        scores = jnp.where(finite, scores, jnp.where(positive, -jnp.inf, jnp.inf))
        return {"scores": scores, "positive": positive, "mask": mask}

    def merge(self, states: Iterable[State]) -> State:
        """Concatenates the examples, without the padding."""
        states = [{name: column[np.asarray(s["mask"])] for name, column in s.items()} for s in states]
        return {name: np.concatenate([state[name] for state in states]) for name in states[0]}

    def compute(self, state: State) -> float:
        """Returns the area, or NaN if no class has both positives and negatives."""
        scores, positive = state["scores"], state["positive"]
        classes = range(1, 2) if positive.shape[1] == 2 and not self.multi_label else range(positive.shape[1])
        areas = [_area(scores[:, c], positive[:, c]) for c in classes]
        found = [area for area in areas if not math.isnan(area)]
        return float(np.mean(found)) if found else math.nan


def _area(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Returns the area of one class, computed by the Mann-Whitney statistic with average ranks for ties."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return math.nan
    _, position, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[position]
    return (ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives)
