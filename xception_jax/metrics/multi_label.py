"""Defines metrics for examples with any number of labels (section 4.1: MAP@100 on JFT)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from xception_jax.metrics.metric import Metric, State, masked_count, masked_sum


def sigmoid_cross_entropy(logits: Float[Array, "b c"], labels: Shaped[Array, "b c"]) -> Float[Array, " b"]:
    """Returns the logistic loss of each example in nats, summed over the classes. Labels are in [0, 1]."""
    return jnp.sum(jax.nn.softplus(logits) - logits * labels, axis=-1)


@dataclasses.dataclass(frozen=True)
class MeanAveragePrecision(Metric):
    """Mean average precision over the k highest classes of each example. Examples without a label are excluded.

    The average precision of an example is the sum of precision@i over all ranks i <= k of its labels, divided by
    min(k, number of labels). With `over_all_labels`, it is divided by the number of labels, so a perfect ranking may
    score less than 1. Publications use both, and the paper does not specify which.
    """

    k: int
    over_all_labels: bool = False

    @property
    def name(self) -> str:
        """Name in metrics.jsonl: 'map_at_k' or 'map_at_k_all'."""
        return "map_at_k_all" if self.over_all_labels else "map_at_k"

    @property
    def title(self) -> str:
        """Name in reports, such as 'MAP@100'."""
        return f"MAP@{self.k}" + (" over all labels" if self.over_all_labels else "")

    def measure(self, logits: Float[Array, "b c"], labels: Shaped[Array, "b c"], mask: Bool[Array, " b"]) -> State:
        relevant = labels.astype(jnp.int32)
        # Among equal scores, the second key sorts irrelevant classes first.
        _, ranking = jax.lax.sort((-logits, relevant), dimension=-1, num_keys=2)
        ranking = ranking[:, : self.k]
        precision = jnp.cumsum(ranking, axis=-1) / jnp.arange(1, ranking.shape[-1] + 1)
        precisions = jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.sum(precision * ranking, axis=-1), 0.0)
        num_labels = jnp.sum(relevant, axis=-1)
        labelled = mask & (num_labels > 0)
        denominator = jnp.maximum(num_labels if self.over_all_labels else jnp.minimum(num_labels, self.k), 1)
        return {"total": masked_sum(precisions / denominator, labelled), "count": masked_count(labelled)}


class SigmoidLoss(Metric):
    """Mean over examples of the logistic loss in nats, summed over the classes."""

    name = "loss"
    higher_is_better = False
    is_share = False

    def measure(self, logits: Float[Array, "b c"], labels: Shaped[Array, "b c"], mask: Bool[Array, " b"]) -> State:
        loss = sigmoid_cross_entropy(logits, labels.astype(jnp.int32))
        return {"total": masked_sum(loss, mask), "count": masked_count(mask)}
