"""Evaluates a network exactly: every intact image counts once, for any batch size and any number of devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xception_jax.config import ExperimentConfig
from xception_jax.data.pipeline import Batch
from xception_jax.data.sources import Source
from xception_jax.metrics import Metric, metrics_of
from xception_jax.metrics.metric import State, masked_count
from xception_jax.metrics.predictions import MAX_CLASSES, Predictions
from xception_jax.metrics.single_label import two_class_logits
from xception_jax.parallel import DeviceBatch, gathered, whole

# Number of classes saved per image, enough for top-5.
SAVED_CLASSES = 5

# How many batches a process may dispatch before the devices have finished them. This also bounds how far it gets ahead
# of the other processes, and so how long all take to stop.
_AHEAD = 2

_COUNTS = "counts"  # key of the image counts, beside the states of the metrics

EvaluationStep = Callable[[dict, DeviceBatch], tuple[dict[str, State], DeviceBatch]]


def make_evaluation_step(model: nn.Module, config: ExperimentConfig, *, keep_logits: bool = False) -> EvaluationStep:
    """Returns a jitted `step(variables, batch) -> (metric states, best classes of each image)`.

    Args:
      model: a network from `create_model`.
      config: the config of the experiment. The loss, the number of classes and `evaluation.map_at` select the metrics.
      keep_logits: whether predictions include the logits of more than `MAX_CLASSES` classes: 200 MB for ImageNet's
        validation set.
    """
    metrics, multi_label = metrics_of(config), config.loss.multi_label

    @jax.jit
    def step(variables: dict, batch: DeviceBatch) -> tuple[dict[str, State], DeviceBatch]:
        logits, _ = model.apply(gathered(variables), batch["image"], train=False)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if not multi_label:
            logits = two_class_logits(logits)
        mask = batch["mask"] & ~batch["damaged"]
        states = {metric.name: metric.measure(logits, batch["label"], mask) for metric in metrics}
        probabilities = jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)
        saved = config.evaluation.map_at if multi_label else SAVED_CLASSES
        label = batch["label"].astype(bool) if multi_label else batch["label"]
        relevant = label if multi_label else jax.nn.one_hot(label, logits.shape[-1], dtype=bool)
        classes = _ranked(logits, relevant)[:, :saved]
        best = jnp.take_along_axis(probabilities, classes, axis=-1)
        predictions = {"classes": classes, "probabilities": best, "label": label}
        if logits.shape[-1] <= MAX_CLASSES:
            predictions["all_probabilities"] = probabilities.astype(jnp.float32)
        if keep_logits or logits.shape[-1] <= MAX_CLASSES:  # areas rank by them
            predictions["logits"] = logits.astype(jnp.float32)
        counts = {"count": masked_count(mask), "damaged": masked_count(batch["mask"] & batch["damaged"])}
        if multi_label:
            counts["unlabelled"] = masked_count(mask & ~label.any(axis=-1))
        return states | {_COUNTS: counts}, predictions

    return step


def _ranked(logits: jax.Array, relevant: jax.Array) -> jax.Array:
    """Returns all classes from the best to the worst, [n, c]. Labels come last among equals, as in the metrics.

    Ranks by logits, because several probabilities may be rounded to 1. NaN comes first, which is a mistake.
    """
    keys = jnp.where(jnp.isnan(logits), -jnp.inf, -logits)
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jax.lax.sort((keys, relevant, classes), dimension=1, num_keys=3)[2]


def evaluate(
    step: EvaluationStep,
    metrics: Sequence[Metric],
    variables: dict[str, dict],
    batches: Iterable[Batch],
    num_examples: int,
    *,
    to_devices: Callable[[Batch], DeviceBatch],
    poll: Callable[[Batch], None] = lambda batch: None,
) -> tuple[dict[str, float], Predictions]:
    """Evaluates several sets of variables in one pass over the images.

    Args:
      step: a step from `make_evaluation_step`.
      metrics: the metrics from `metrics_of` for the same config.
      variables: sets of variables by metric prefix: `''` for the current step, `'ema_'` for the Polyak average.
      batches: batches of this process, padded, with a mask.
      num_examples: number of images, to which the masks of all processes must sum.
      to_devices: builds a global batch from the local batches of all processes.
      poll: called with each batch before it is used. An exception that it raises ends the evaluation. Of several
        processes, none calls it more than `_AHEAD` batches earlier than another.

    Returns:
      The metrics, with prefixes, and the predictions of the last set of variables, both without the images that could
      not be decoded; `count` (the number of images that count), `damaged` (the number of those that could not be
      decoded) and, for multi-label data, `unlabelled` (how many images of `count` have no label).

    Raises:
      RuntimeError: the masks do not sum to `num_examples`, so an image was dropped or counted twice.
    """
    measured: dict[str, list[dict[str, State]]] = {prefix: [] for prefix in variables}
    parts: list[DeviceBatch] = []
    for batch in batches:
        poll(batch)
        index = {"index": batch["index"].astype(np.int32)}
        global_batch = to_devices({name: batch[name] for name in ("image", "label", "mask", "damaged")} | index)
        for prefix, chosen in variables.items():
            states, predictions = step(chosen, global_batch)
            measured[prefix].append(states)
        parts.append(predictions | {name: global_batch[name] for name in ("index", "mask", "damaged")})
        if len(parts) > _AHEAD:
            jax.block_until_ready([of_batches[-_AHEAD] for of_batches in measured.values()])  # sums over all processes

    values: dict[str, Any] = {}
    for prefix, batches_of_states in measured.items():
        fetched = _fetch(batches_of_states)
        counts = {name: sum(int(states[_COUNTS][name]) for states in fetched) for name in fetched[0][_COUNTS]}
        if (counted := counts["count"] + counts["damaged"]) != num_examples:
            raise RuntimeError(f"the evaluation counted {counted} images of {num_examples}")
        for metric in metrics:
            merged = metric.merge([states[metric.name] for states in fetched])
            values[f"{prefix}{metric.name}"] = metric.compute(merged)
        values |= counts
    return values, _predictions(_fetch(parts))


def _fetch(parts: list[Any]) -> list[Any]:
    """Gathers trees of global arrays from all processes as NumPy arrays."""
    return [jax.tree.map(whole, part) for part in parts]


def _predictions(parts: list[Batch]) -> Predictions:
    """Concatenates the predictions of all batches, without the padding and the damaged images."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    mask = columns.pop("mask") & ~columns.pop("damaged")
    return Predictions(**{name: column[mask] for name, column in columns.items()})


def name_examples(predictions: Predictions, source: Source) -> Predictions:
    """Returns predictions with the file name and the group of each example, as far as the dataset records them.

    Reads every record of the split, without decoding its image.

    Raises:
      BadDataError: a record is damaged.
    """
    found = {"file_name": source.column("file_name"), "group": source.column("group")}
    columns = {
        name: np.array(values, str)[predictions.index]
        for name, values in found.items()
        if values and np.ndim(values[0]) == 0  # a list is no name
    }
    return dataclasses.replace(predictions, **columns)
