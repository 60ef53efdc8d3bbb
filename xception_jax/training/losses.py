"""Computes classification losses, averaged over the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Scalar

from xception_jax.metrics.multi_label import sigmoid_cross_entropy


def softmax_loss(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], label_smoothing: float = 0.0
) -> Float[Scalar, ""]:
    """Returns the cross-entropy for one label per image, in nats, with label smoothing uniform over all classes."""
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, label_smoothing)).mean()


def sigmoid_loss(
    logits: Float[Array, "b c"], labels: Float[Array, "b c"], label_smoothing: float = 0.0
) -> Float[Scalar, ""]:
    """Returns the logistic loss for any number of labels (0 or 1) per image, in nats, summed over the classes."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return sigmoid_cross_entropy(logits, labels * (1 - label_smoothing) + label_smoothing / 2).mean()


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}
