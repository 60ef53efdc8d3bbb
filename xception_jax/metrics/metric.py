"""Defines the base class of all metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

State = dict[str, Any]  # of arrays


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of an evaluation, measured batch by batch.

    `measure` runs on the devices under jit and returns a state; `merge` and `compute` run on the host. Padding never
    counts, and the result depends neither on the batch size nor on the sharding. By default the state has sums, which
    `merge` adds. A metric that is not additive overrides `merge`.

    Ties count as errors, and so does an example with a logit that is not finite. Otherwise a network with the same
    logit for all classes would be correct for every example of class 0.
    """

    higher_is_better = True
    is_share = True  # values are in [0, 1], and reports show percentages

    @property
    def name(self) -> str:
        """Name in metrics.jsonl."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Name in reports."""
        return self.name

    def format(self, value: float) -> str:
        """Formats a value as text."""
        return f"{value:.4f}"

    def suits(self, num_classes: int) -> bool:
        """Returns whether the metric supports this number of classes."""
        return True

    def measure(self, logits: Float[Array, "b c"], labels: Shaped[Array, "b ..."], mask: Bool[Array, " b"]) -> State:
        """Measures one batch.

        Args:
          logits: [b, c], at least float32.
          labels: [b] in [0, c), or [b, c] of zeros and ones. Masked labels may have any value.
          mask: [b], False for padding.
        """
        raise NotImplementedError

    def merge(self, states: Iterable[State]) -> State:
        """Merges the states of several batches, as NumPy arrays."""
        return jax.tree.map(lambda *sums: np.sum(sums, axis=0, dtype=np.result_type(sums[0], np.int64)), *states)

    def compute(self, state: State) -> float:
        """Returns the value of a merged state, or NaN if there are no examples."""
        count = float(state["count"])
        return float(state["total"]) / count if count else math.nan


def masked_sum(values: Shaped[Array, " b"], mask: Bool[Array, " b"]) -> Shaped[Array, ""]:
    """Sums values where the mask is True. Uses `where` because padding may contain NaN, and 0 * NaN is NaN."""
    return jnp.sum(jnp.where(mask, values, 0))


def masked_count(condition: Bool[Array, " b"]) -> Int[Array, ""]:
    """Counts True values as an integer, because a float32 cannot count beyond 16.8 million."""
    return jnp.sum(condition, dtype=jnp.int32)


def describe(values: Mapping[str, Any], metrics: Iterable[Metric], prefixes: Iterable[str]) -> str:
    """Formats the values of the given metrics as one line: 'top1 0.9010  loss 0.3210  ema_top1 0.9050'."""
    return "  ".join(
        f"{prefix}{metric.name} {metric.format(values[prefix + metric.name])}"
        for prefix in prefixes
        for metric in metrics
        if values.get(prefix + metric.name) is not None
    )
