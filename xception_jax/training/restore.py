"""Reads the checkpoint of a run as a network."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xception_jax.config import ExperimentConfig, MeshConfig, load_config
from xception_jax.data.datasets import find_class_names
from xception_jax.errors import InputMissingError
from xception_jax.logs.console import say
from xception_jax.models import create_model
from xception_jax.parallel import make_mesh
from xception_jax.storage import join, names_object_store
from xception_jax.training import manifest
from xception_jax.training.checkpoint import Checkpoints
from xception_jax.training.optimizers import make_optimizer, make_schedule
from xception_jax.training.run_directory import open_run_store, read_config
from xception_jax.training.state import TrainState, abstract_state, make_state_init
from xception_jax.training.step_files import exists, step_path
from xception_jax.training.workdir import CHECKPOINTS, CONFIG
from xception_jax.weights import Network, Preprocessing, hub
from xception_jax.weights.released import WEIGHTS


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint of a run. Does not require the dataset.

    Attributes:
      config: the resolved config of the run.
      step: the step of the checkpoint.
      variables: variables by metric prefix: '' for those of the step, 'ema_' for the Polyak average if there is one.
      sha256: SHA-256 of the manifest of the checkpoint, or '' if the run was killed before it was written.
      classes: names of the classes that it was trained on, or None if they are not known.
    """

    config: ExperimentConfig
    step: int
    variables: dict[str, dict[str, Any]]
    sha256: str
    classes: tuple[str, ...] | None

    @property
    def eval_prefix(self) -> str:
        """The metric prefix of the variables that are evaluated and exported: of the Polyak average if there is one."""
        return "ema_" if "ema_" in self.variables else ""


def is_run(source: str) -> bool:
    """Returns whether a source is the work directory of a run: a directory, or an address in an object store.

    Anything else is considered a weight file.
    """
    return names_object_store(source) or os.path.isdir(source)  # False for a name that is too long


def run_network(source: str, run: Run) -> Network:
    """Returns the network of a run, with the Polyak average if there is one."""
    data = run.config.data
    return Network(
        model=run.config.model,
        variables=run.variables[run.eval_prefix],
        preprocessing=Preprocessing.of(data),
        classes=run.classes,
        source=source,
        sha256=run.sha256,
        multi_label=run.config.loss.multi_label,
    )


def open_run(workdir: str, step: int | None = None) -> Run:
    """Reads a checkpoint of a run, which may have been trained on other devices.

    Raises:
      InputMissingError: there is no run, or no such checkpoint.
      BadDataError: the checkpoint `step`, or every checkpoint, is damaged.
    """
    root, config = run_config(workdir)
    return _restored(root, config, step)


def run_config(workdir: str) -> tuple[str, ExperimentConfig]:
    """Returns (root, config) of a run.

    Raises:
      InputMissingError: there is no run.
      ConfigError: its config is damaged.
    """
    if names_object_store(workdir):
        store = open_run_store(workdir)
        root, config = store.root, read_config(store)
    else:
        path, root = Path(workdir), workdir
        if hub.read(path / CONFIG) is not None:
            fix = f"use the weight file in it: {path / WEIGHTS}"
            raise InputMissingError("this is not a run, but a folder of the Hugging Face Hub", workdir, fix)
        config = load_config(path / CONFIG) if os.path.lexists(path / CONFIG) else None
    if config is None:
        fix = f"use a weight file, or the work directory of a run, which contains {CONFIG}"
        raise InputMissingError("there is no run", workdir, fix)
    return root, config


def _restored(workdir: str, config: ExperimentConfig, step: int | None) -> Run:
    """Reads a checkpoint of a run with this config."""
    abstract = _abstract_state(config)
    directory = join(workdir, CHECKPOINTS)
    checkpoints = Checkpoints(directory, read_only=True, report=say)
    with checkpoints:
        if step is None:
            restored = checkpoints.restore_latest(abstract)
            if restored is None:
                raise InputMissingError("there is no checkpoint yet", workdir, "train first")
            step, state = restored
        else:
            state = checkpoints.restore(step, abstract)
    seal = step_path(join(directory, str(step), manifest.NAME))
    is_sealed = exists(seal)
    identity = manifest.read_content(seal)["record"].get("identity", {}) if is_sealed else {}
    return Run(
        config=config,
        step=step,
        variables={prefix: jax.tree.map(np.asarray, tree) for prefix, tree in state.all_variables().items()},
        sha256=manifest.measure(seal)["sha256"] if is_sealed else "",
        classes=_class_names(config, identity.get("classes")),
    )


def _class_names(config: ExperimentConfig, recorded: str | None) -> tuple[str, ...] | None:
    """Returns the class names that a checkpoint recorded. Earlier versions did not: then those of the dataset."""
    if recorded is not None:
        return tuple(map(str, json.loads(recorded)))
    names, outputs = find_class_names(config.data), config.model.num_classes
    num_classes = 2 if outputs == 1 and not config.loss.multi_label else outputs
    return names if names is not None and len(names) == num_classes else None  # it may be another dataset by now


def _abstract_state(config: ExperimentConfig) -> TrainState:
    """Returns the shapes of the state of a run, on one device of this process."""
    # The shapes do not depend on the number of examples.
    optimizer = make_optimizer(config.optimizer, make_schedule(config, num_examples=1))
    init = make_state_init(
        create_model(config.model),
        optimizer,
        image_size=config.data.image_size,
        ema=config.ema.decay > 0,
    )
    return abstract_state(init, make_mesh(MeshConfig(), jax.local_devices()[:1]))
