"""Computes the classification loss of each image, and the weights of classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from xception_jax.config import ExperimentConfig
from xception_jax.data.sources import Source
from xception_jax.metrics.multi_label import sigmoid_cross_entropy
from xception_jax.metrics.single_label import two_class_logits


def softmax_loss(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Returns the cross-entropy for one label per image, in nats, with label smoothing uniform over all classes.

    For a single logit, which is that of class 1 of two, it is the logistic loss.
    """
    logits = two_class_logits(logits)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, label_smoothing))


def sigmoid_loss(
    logits: Float[Array, "b c"], labels: Float[Array, "b c"], label_smoothing: float = 0.0
) -> Float[Array, " b"]:
    """Returns the logistic loss for any number of labels (0 or 1) per image, in nats, summed over the classes."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return sigmoid_cross_entropy(logits, labels * (1 - label_smoothing) + label_smoothing / 2)


LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


def class_weights(config: ExperimentConfig, train: Source) -> tuple[float, ...] | None:
    """Returns the weight of each class in the loss of a training step, or None.

    Args:
      config: `loss.class_weights` has the weights. With 'balanced', a class with n_c of all n images and C classes has
        the weight n / (C n_c), so that every class contributes equally and the average image has the weight 1.
      train: the training data. Its labels are read if the weights are 'balanced'.
    """
    weights = config.loss.class_weights
    if weights == "balanced":
        counts = np.bincount(np.asarray(train.column("label")), minlength=train.info.num_classes)
        present = np.maximum(counts, 1)  # a class without images has no loss to weigh
        return tuple((len(train) / (np.count_nonzero(counts) * present)).tolist())
    return weights if isinstance(weights, tuple) else None
