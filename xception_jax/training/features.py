"""Trains only the classifier, on features that are computed once for each image and kept on disk.

If all other layers are frozen, they run as in inference, and without augmentation they compute the same features of an
image in every epoch. The rest of the run does not change: the state has all layers, and its checkpoints are those of
the whole network. `with_features` replaces the network by its head and the images by their features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from xception_jax.config import DataConfig, ExperimentConfig, ModelConfig, to_dict
from xception_jax.data.features import Features, FeatureSource
from xception_jax.data.pipeline import EvaluationBatches
from xception_jax.data.sources import Source, resolve_data_dir
from xception_jax.errors import ConfigError
from xception_jax.files import write_atomically
from xception_jax.logs.console import format_duration
from xception_jax.models.layers import Head
from xception_jax.parallel import batch_sharding, to_devices
from xception_jax.training.experiment import Experiment
from xception_jax.training.finetuning import frozen_names
from xception_jax.training.fingerprint import state_fingerprint
from xception_jax.training.state import TrainState

FOLDER = "features"  # in the directory of all datasets

_VERSION = 1
_HEAD = "head/"
_OF_HEAD = ("num_classes", "fc_layers", "fc_width", "dropout_rate")
_TIMED_BATCHES = 3  # the first one, which includes compilation, is not counted
_ARRAYS = ("image", "label", "damaged")


class HeadOnly(nn.Module):
    """The classifier of a network, with the same names and dropout, as a function of features [b, c]."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, features: Float[Array, "b c"], train: bool = False
    ) -> tuple[Float[Array, "b n"], dict[str, Array]]:
        """Returns (logits, endpoints) as the whole network does."""
        logits, pre_logits = Head(self.config, name="head")(features[:, None, None, :], train)
        return logits, {"pre_logits": pre_logits}


def features_of(model: nn.Module, variables: dict, images: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
    """Returns the input of the classifier, averaged over its positions."""
    found = []

    def keep(next_method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Head):
            found.append(args[0].mean((1, 2), dtype="float32"))
        return next_method(*args, **kwargs)

    with nn.intercept_methods(keep):
        model.apply(variables, images, train=False)
    return found[0]


def with_features(
    experiment: Experiment, state: TrainState, report: Callable[[str], None], poll: Callable[[], None]
) -> Experiment:
    """Returns the experiment with the features of its images, which are computed or read from disk.

    Args:
      experiment: its config has `data.cache_features` and passes `check_features`.
      state: the state to start from. Its frozen layers compute the features.
      report: called with one line before features are computed, and with an estimate of the time.
      poll: called after each batch. An exception that it raises ends the computation.
    """
    config = experiment.config
    frozen = {"params": _without_head(state.params), "batch_stats": state.batch_stats}
    weights = state_fingerprint(frozen)
    directory = resolve_data_dir(config.data.data_dir) / FOLDER
    sources: dict[str, FeatureSource] = {}
    step = jax.jit(functools.partial(features_of, experiment.model))
    for split, source in experiment.sources.items():
        path = directory / f"{_digest(config, source, weights)}.npz"
        features = _read(path)
        if features is None:
            features = _compute(experiment, step, state, source, report, poll)
            _write(path, features, report)
        else:
            report(f"features of {source.info.split}: read from {path}")
        sources[split] = FeatureSource(source, features)
    return dataclasses.replace(
        experiment,
        sources=dict(sources),
        model=HeadOnly(config.model),
        input_shape=sources["train"].features.image.shape[1:],
    )


def _without_head(params: dict) -> dict:
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({name: leaf for name, leaf in flat.items() if not name.startswith(_HEAD)}, sep="/")


def check_features(config: ExperimentConfig, params: dict) -> None:
    """Checks that features can be computed once for the whole run.

    Args:
      config: the config of the experiment.
      params: the parameters or their shapes.

    Raises:
      ConfigError: features would change during the run, or there are several processes.
    """
    frozen = frozen_names(params, config.optimizer.frozen)
    trained = [name for name in flatten_dict(params, sep="/") if name not in frozen and not name.startswith(_HEAD)]
    reasons = {
        f"config.optimizer.frozen does not match {', '.join(trained[:3])}": bool(trained),
        f"config.data.augmentation is {config.data.augmentation!r}": config.data.augmentation != "none",
        "the auxiliary classifier needs activations": getattr(config.model, "aux_head", False),
        f"there are {jax.process_count()} processes": jax.process_count() > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(
                f"features cannot be kept: {reason}",
                "config.data.cache_features",
                "set optimizer.frozen='^(?!head/)' and data.augmentation='none' in one process, or turn it off",
            )


def _digest(config: ExperimentConfig, source: Source, weights: str) -> str:
    """Returns a digest of everything that the features depend on."""
    directory = getattr(source, "directory", None)  # synthetic images have none
    files = [] if directory is None else sorted(path for path in directory.iterdir() if path.is_file())
    parts = {
        "version": _VERSION,
        "weights": weights,
        "dataset": source.info.fingerprint,
        "split": source.info.split,
        # The fingerprint does not cover the images.
        "files": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "model": {name: value for name, value in to_dict(config.model).items() if name not in _OF_HEAD},
        "image_size": config.data.image_size,
        "eval_crop": config.data.eval_crop,
    }
    others = ("max_pixels", "max_scans", "turn", "turn_angle", "turn_seed")
    parts |= {
        name: getattr(config.data, name) for name in others if getattr(config.data, name) != getattr(DataConfig, name)
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _compute(
    experiment: Experiment,
    step: Callable[[dict, Array], Array],
    state: TrainState,
    source: Source,
    report: Callable[[str], None],
    poll: Callable[[], None],
) -> Features:
    config, sharding = experiment.config, batch_sharding(experiment.mesh)
    report(f"computing the features of {len(source):,} images of {source.info.split}, once")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    batches = EvaluationBatches(config.data, source, batch_size=config.evaluation.batch_size)
    parts: list[dict[str, np.ndarray]] = []
    start = 0.0
    with contextlib.closing(iter(batches)) as iterator:
        for number, batch in enumerate(iterator, 1):
            images = to_devices({"image": batch["image"]}, sharding)["image"]
            image = np.asarray(step(variables, images))
            mask = batch["mask"]
            parts.append({"image": image[mask], "label": batch["label"][mask], "damaged": batch["damaged"][mask]})
            poll()
            if number == 1:
                start = time.monotonic()
            elif number == _TIMED_BATCHES:
                left = (time.monotonic() - start) / (number - 1) * (len(batches) - number)
                report(f"features of {source.info.split}: about {format_duration(left)} left")
    return Features(**{name: np.concatenate([part[name] for part in parts]) for name in _ARRAYS})


def _read(path: Path) -> Features | None:
    """Returns stored features, or None if there are none or the file is damaged (each array has a checksum)."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Features(**{name: arrays[name] for name in _ARRAYS})
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError):
        return None


def _write(path: Path, features: Features, report: Callable[[str], None]) -> None:
    """Stores features. If that fails, the run goes on without them on disk."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(features, name) for name in _ARRAYS})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        report(f"the features cannot be stored in {os.fspath(path.parent)} ({error.strerror}); only this run has them")
