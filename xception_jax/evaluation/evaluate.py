"""Exact evaluation: every image of a split counts once, whatever the batch size and the number of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from xception_jax.config import ExperimentConfig
from xception_jax.evaluation.metrics import Predictions, Sums, multi_label_sums, single_label_sums, summarise
from xception_jax.parallel import gathered

Batch = dict[str, Any]

# Classes of each image that are saved with a prediction: enough for top-5.
SAVED_CLASSES = 5


def make_evaluation_step(
    model: nn.Module, config: ExperimentConfig, *, keep_logits: bool = False
) -> Callable[[dict, Batch], tuple[Sums, Batch]]:
    """Returns a jitted `step(variables, batch)`: sums over the batch's mask, and the best classes of each image.

    Args:
      model: from `create_model`.
      config: loss.name and evaluation.map_at are read.
      keep_logits: predictions have the logits of all classes too, 200 MB for ImageNet's validation set.
    """
    multi_label = config.loss.multi_label

    @jax.jit
    def step(variables, batch):
        logits, _ = model.apply(gathered(variables), batch["image"], train=False)
        if multi_label:
            sums = multi_label_sums(logits, batch["label"], batch["mask"], config.evaluation.map_at)
            probabilities, saved = jax.nn.sigmoid(logits), config.evaluation.map_at
        else:
            sums = single_label_sums(logits, batch["label"], batch["mask"])
            probabilities, saved = jax.nn.softmax(logits), SAVED_CLASSES
        probabilities, classes = jax.lax.top_k(probabilities, min(saved, logits.shape[-1]))
        predictions = {"classes": classes, "probabilities": probabilities}
        return sums, predictions | ({"logits": logits.astype(jnp.float32)} if keep_logits else {})

    return step


def evaluate(
    step: Callable[[dict, Batch], tuple[Sums, Batch]],
    variables: dict[str, dict],
    batches: Iterable[Batch],
    num_examples: int,
    *,
    to_devices: Callable[[Batch], Batch],
    poll: Callable[[Batch], None] = lambda batch: None,
) -> tuple[dict[str, float], Predictions]:
    """Evaluates several sets of variables in one pass over the images.

    Args:
      step: from `make_evaluation_step`.
      variables: by the prefix of their metrics: {'': of this step, 'ema_': Polyak-averaged}.
      batches: of this process; padded, with a mask.
      num_examples: what the masks of all processes must sum to.
      to_devices: makes a global batch of the parts that the processes hold.
      poll: called with each batch before it is used; what it raises ends the evaluation.

    Returns:
      The metrics, prefixed, with one `count`; and the predictions of the last set of variables.

    Raises:
      RuntimeError: the masks do not sum to `num_examples`: an image was dropped or counted twice.
    """
    totals: dict[str, Sums] = {}
    parts: list[Batch] = []
    for batch in batches:
        poll(batch)
        index = {"index": batch["index"].astype(np.int32)}
        global_batch = to_devices({name: batch[name] for name in ("image", "label", "mask")} | index)
        for prefix, values in variables.items():
            sums, predictions = step(values, global_batch)
            totals[prefix] = jax.tree.map(jnp.add, totals[prefix], sums) if prefix in totals else sums
        parts.append(predictions | {name: global_batch[name] for name in ("index", "label", "mask")})

    metrics: dict[str, float] = {}
    for prefix, sums in totals.items():
        means = summarise(jax.device_get(sums))
        if means["count"] != num_examples:
            raise RuntimeError(f"the evaluation counted {means['count']:.0f} images of {num_examples}")
        metrics |= {f"{prefix}{name}": value for name, value in means.items() if name not in ("count", "unlabelled")}
        metrics |= {name: int(means[name]) for name in ("count", "unlabelled") if name in means}
    return metrics, _gather(parts)


def _gather(parts: list[Batch]) -> Predictions:
    """Brings the predictions of all processes together, without the padding."""
    fetched = [multihost_utils.process_allgather(part, tiled=True) for part in parts]
    columns = {name: np.concatenate([part[name] for part in fetched]) for name in fetched[0]}
    mask = columns.pop("mask")
    if columns["label"].ndim == 2:
        columns["label"] = columns["label"].astype(bool)
    return Predictions(**{name: column[mask] for name, column in columns.items()})
