"""Defines metrics for examples with one label."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from xception_jax.metrics.metric import Metric, State, masked_count, masked_sum


def two_class_logits(logits: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Returns (0, z) for the only logit z of a network: its softmax is (1 - sigmoid(z), sigmoid(z)).

    Several logits are returned unchanged.
    """
    return jnp.pad(logits, ((0, 0), (1, 0))) if logits.shape[-1] == 1 else logits


def _true_logit(logits: Float[Array, "b c"], labels: Int[Array, " b"]) -> Float[Array, "b 1"]:
    return jnp.take_along_axis(logits, labels[:, None], axis=-1, mode="clip")


@dataclasses.dataclass(frozen=True)
class TopK(Metric):
    """Share of examples whose label is among the k highest logits (section 4.1)."""

    k: int

    @property
    def name(self) -> str:
        """Name in metrics.jsonl: 'top1' or 'top5'."""
        return f"top{self.k}"

    @property
    def title(self) -> str:
        """Name in reports: 'top-1 accuracy' or 'top-5 accuracy'."""
        return f"top-{self.k} accuracy"

    def suits(self, num_classes: int) -> bool:
        """Returns whether the metric can be below 1 for every network; top-1 is always measured."""
        return self.k == 1 or self.k < num_classes

    def measure(self, logits: Float[Array, "b c"], labels: Int[Array, " b"], mask: Bool[Array, " b"]) -> State:
        rank = jnp.sum(logits >= _true_logit(logits, labels), axis=-1)  # 1 is the best
        finite = jnp.isfinite(logits).all(axis=-1)
        return {"total": masked_count(mask & finite & (rank <= self.k)), "count": masked_count(mask)}


class SoftmaxLoss(Metric):
    """Mean cross-entropy in nats, without label smoothing. NaN or infinite if a logit is."""

    name = "loss"
    higher_is_better = False
    is_share = False

    def measure(self, logits: Float[Array, "b c"], labels: Int[Array, " b"], mask: Bool[Array, " b"]) -> State:
        loss = jax.nn.logsumexp(logits, axis=-1) - _true_logit(logits, labels)[:, 0]
        return {"total": masked_sum(loss, mask), "count": masked_count(mask)}
