"""Builds the training step, a pure function of the state and a global batch.

`Experiment.compile_step` compiles it for the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from xception_jax.config import ExperimentConfig
from xception_jax.metrics.single_label import two_class_logits
from xception_jax.parallel import gathered
from xception_jax.training.finetuning import frozen_batch_norms, trained_part, with_part
from xception_jax.training.losses import LOSSES
from xception_jax.training.state import TrainState

_Loss = Callable[[dict, dict, dict, jax.Array, jax.Array, jax.Array], tuple[jax.Array, tuple[dict, dict]]]
TrainStep = Callable[[TrainState, dict[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ExperimentConfig,
    class_weights: Sequence[float] | None = None,
) -> TrainStep:
    """Returns `step(state, batch, key_bits) -> (state, metrics)`.

    `batch` has 'image' [b, h, w, 3] and 'label' ([b], or [b, c] for multi-label data). `key_bits` is
    `seed_bits(seed, DROPOUT)`, an argument so that all seeds share one compiled program. The metrics are scalars: loss,
    grad_norm, learning_rate, top1 (only for single-label data), weighted_loss (only with `class_weights`), and the
    counters bad_steps and skipped_steps.

    With `class_weights`, from `losses.class_weights`, the step minimizes the weighted loss, the mean of the losses of
    all images times the weights of their classes. `loss` is always the unweighted mean, without the auxiliary head.
    """
    loss = _make_loss(model, config, class_weights)

    def train_step(state: TrainState, batch: dict, key_bits: jax.Array) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(jax.random.wrap_key_data(key_bits), state.step)
        trained = trained_part(state.params, config.optimizer.frozen)
        grads, batch_stats, metrics = _accumulate(loss, config.accumulation_steps, trained, state, batch, key)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        params = with_part(state.params, optax.apply_updates(trained, updates))
        ema = _polyak_average(state, params, batch_stats, config.ema.decay)

        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        new = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema)
        # A bad step changes only the counters. It counts as a step, so training continues with the next batch.
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        new = new.replace(
            step=state.step + 1,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            skipped_steps=state.skipped_steps + ~finite,
        )
        counters = {"bad_steps": new.bad_steps, "skipped_steps": new.skipped_steps}
        return new, metrics | counters | {"grad_norm": grad_norm, "learning_rate": schedule(state.updates)}

    return train_step


def _make_loss(model: nn.Module, config: ExperimentConfig, class_weights: Sequence[float] | None) -> _Loss:
    """Returns `loss(trained, params, batch_stats, images, labels, key) -> (loss, (batch_stats, metrics))`.

    It is that of a microbatch. `trained` is the part of `params` for which there are gradients.
    """
    loss_function = LOSSES[config.loss.name]
    frozen, smoothing = config.optimizer.frozen, config.loss.label_smoothing

    def loss(
        trained: dict, params: dict, batch_stats: dict, images: jax.Array, labels: jax.Array, dropout_key: jax.Array
    ) -> tuple[jax.Array, tuple[dict, dict]]:
        params, batch_stats = gathered((with_part(params, trained), batch_stats))
        with frozen_batch_norms(params, frozen):
            (logits, endpoints), updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
        losses = loss_function(logits, labels, smoothing)
        metrics = {"loss": losses.mean()}
        if not config.loss.multi_label:
            metrics["top1"] = (two_class_logits(logits).argmax(-1) == labels).mean()
        if "aux_logits" in endpoints:
            losses += config.loss.aux_weight * loss_function(endpoints["aux_logits"], labels, smoothing)
        value = losses.mean()
        if class_weights is not None:
            value = metrics["weighted_loss"] = (jnp.asarray(class_weights, losses.dtype)[labels] * losses).mean()
        return value, (updates["batch_stats"], metrics)

    return loss


def _accumulate(
    loss: _Loss, count: int, trained: dict, state: TrainState, batch: dict, key: jax.Array
) -> tuple[dict, dict, dict[str, jax.Array]]:
    """Averages gradients and metrics over `count` microbatches. BatchNorm processes the microbatches one by one.

    Returns:
      (gradients, batch_stats, metrics)
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if count == 1:
        (_, (batch_stats, metrics)), grads = gradient(
            trained, state.params, state.batch_stats, batch["image"], batch["label"], key
        )
        return grads, batch_stats, metrics

    def add(carry: tuple, inputs: tuple) -> tuple[tuple, dict]:
        grads, batch_stats = carry
        images, labels, i = inputs
        (_, (batch_stats, metrics)), new_grads = gradient(
            trained, state.params, batch_stats, images, labels, jax.random.fold_in(key, i)
        )
        return (jax.tree.map(lambda total, g: total + g / count, grads, new_grads), batch_stats), metrics

    # A microbatch takes every `count`-th image, so that each device splits its own shard.
    images, labels = (x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1) for x in (batch["image"], batch["label"]))
    start = (jax.tree.map(jnp.zeros_like, trained), state.batch_stats)
    (grads, batch_stats), metrics = jax.lax.scan(add, start, (images, labels, jnp.arange(count)))
    return grads, batch_stats, jax.tree.map(lambda values: values.mean(0), metrics)


def _polyak_average(state: TrainState, params: dict, batch_stats: dict, decay: float) -> dict | None:
    """Averages weights and BN statistics.

    The decay starts low, so that the initial weights are soon forgotten: min(decay, (1 + n) / (10 + n)) after n
    updates, as in `tf.train.ExponentialMovingAverage(decay, num_updates)`. What is frozen is its own average.
    """
    if state.ema is None:
        return None

    def moved(average: jax.Array, before: jax.Array, new: jax.Array) -> jax.Array:
        return average if new is before else average + change.astype(new.dtype) * (new - average)

    change = 1 - jnp.minimum(decay, (1 + state.updates) / (10 + state.updates))
    before = {"params": state.params, "batch_stats": state.batch_stats}
    return jax.tree.map(moved, state.ema, before, {"params": params, "batch_stats": batch_stats})
