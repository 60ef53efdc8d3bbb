"""The area under the receiver operating characteristic curve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped
from scipy.stats import rankdata

from xception_jax.metrics.metric import Metric, State

MAX_CLASSES = 100  # all probabilities of a split are kept: 8 MB for 20,000 images of this many classes


@dataclasses.dataclass(frozen=True)
class AreaUnderROC(Metric):
    """The area under the ROC curve: how often a positive has a higher probability than a negative; a tie counts half.

    With two classes it is that of class 1. With more, or with any number of labels, it is the mean of one class against
    the rest over all classes that have both positives and negatives (scikit-learn's `average='macro'`).

    It is not additive: the state holds the probabilities of the examples. An example with a logit that is not finite
    is ranked as wrongly as possible.
    """

    multi_label: bool

    name = "roc_auc"
    title = "area under ROC"
    is_share = False

    def suits(self, num_classes: int) -> bool:
        """Whether there are few enough classes to keep all probabilities, and more than one."""
        return (2 - self.multi_label) <= num_classes <= MAX_CLASSES

    def measure(self, logits: Float[Array, "b c"], labels: Shaped[Array, "b ..."], mask: Bool[Array, " b"]) -> State:
        probabilities = jax.nn.sigmoid(logits) if self.multi_label else jax.nn.softmax(logits)
        positive = labels.astype(bool) if self.multi_label else jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        finite = jnp.isfinite(logits).all(axis=-1, keepdims=True)
        probabilities = jnp.where(finite, probabilities, jnp.where(positive, -1.0, 2.0))
        return {"probabilities": probabilities, "positive": positive, "mask": mask}

    def merge(self, states: Iterable[State]) -> State:
        """Concatenates the examples, without the padding."""
        states = [{name: column[np.asarray(s["mask"])] for name, column in s.items()} for s in states]
        return {name: np.concatenate([state[name] for state in states]) for name in states[0]}

    def compute(self, state: State) -> float:
        """Returns the area; NaN where no class has both positives and negatives."""
        probabilities, positive = state["probabilities"], state["positive"]
        classes = range(1, 2) if positive.shape[1] == 2 and not self.multi_label else range(positive.shape[1])
        areas = [_area(probabilities[:, c], positive[:, c]) for c in classes]
        found = [area for area in areas if not math.isnan(area)]
        return float(np.mean(found)) if found else math.nan


def _area(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Returns the area of one class by the Mann-Whitney statistic; ranks of ties are averaged."""
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return math.nan
    ranks = rankdata(scores)
    return (ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives)
