"""Opening a network for use: from a weight file, or from the work directory of a run."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xception_jax.config import ExperimentConfig, MeshConfig, from_json
from xception_jax.data.prepare.datasets import find_class_names
from xception_jax.errors import BadDataError, InputMissingError, UsageError
from xception_jax.files import sha256
from xception_jax.models import create_model
from xception_jax.parallel import make_mesh
from xception_jax.training import manifest
from xception_jax.training.checkpoint import Checkpoints
from xception_jax.training.optimizers import make_optimizer, make_schedule
from xception_jax.training.state import TrainState, abstract_state, make_state_init
from xception_jax.training.workdir import CHECKPOINTS, CONFIG
from xception_jax.weights import Network, Preprocessing, hub, load_network


@dataclasses.dataclass(frozen=True)
class Run:
    """A checkpoint of a run, read without its images.

    Attributes:
      config: resolved, as the run had it.
      step: of the checkpoint.
      variables: by the prefix of their metrics: '' of the step, 'ema_' the Polyak average if there is one.
      sha256: of the manifest of the checkpoint; '' if the run was killed before it was written.
    """

    config: ExperimentConfig
    step: int
    variables: dict[str, dict[str, Any]]
    sha256: str


def is_run(source: str) -> bool:
    """Says whether a source is the work directory of a run; what is no directory is taken for a weight file."""
    return Path(source).is_dir()


def open_network(source: str, step: int | None = None) -> Network:
    """Opens a network with its weights, its preprocessing and the names of its classes.

    Args:
      source: a weight file, or the work directory of a run: then the Polyak average is taken if there is one, the
        preprocessing from `config.data`, and the class names from the dataset, None if that is not on this machine.
      step: of the checkpoint; by default the newest that is intact. Only for a run.

    Raises:
      InputMissingError: there is no such file, run or checkpoint.
      BadDataError: it is damaged or does not fit.
      UsageError: a step of a weight file.
    """
    if is_run(source):
        return run_network(source, open_run(source, step))
    if step is not None:
        raise UsageError(f"{source} is a weight file, it has no steps", "--step", "leave --step out")
    return load_network(source)


def require_classifier(network: Network) -> None:
    """Raises BadDataError if the weights end before the classifier, as those for transfer learning do."""
    if "head" not in network.variables["params"]:
        fix = "take a file with the classifier, or train one on a dataset of yours"
        raise BadDataError("the weights have no classifier", network.source, fix)


def run_network(source: str, run: Run) -> Network:
    """Returns the network of a run, with the last of its variables: the Polyak average if there is one."""
    data = run.config.data
    return Network(
        model=run.config.model,
        variables=list(run.variables.values())[-1],
        preprocessing=Preprocessing(size=data.image_size, crop=data.eval_crop),
        classes=find_class_names(data),
        source=source,
        sha256=run.sha256,
        multi_label=run.config.loss.multi_label,
    )


def open_run(workdir: str, step: int | None = None) -> Run:
    """Reads a checkpoint of a run, whatever devices it was trained on.

    Raises:
      InputMissingError: there is no run, or no such checkpoint.
      BadDataError: the checkpoint is damaged, or every one is.
    """
    path = Path(workdir)
    if hub.read(path / CONFIG) is not None:
        fix = f"give the file in it: {path / hub.WEIGHTS}"
        raise InputMissingError("it is no run, but a folder of the Hugging Face hub", workdir, fix)
    try:
        config = from_json((path / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        fix = f"give the work directory of a run, it holds {CONFIG}; or a weight file"
        raise InputMissingError("there is no run", workdir, fix) from None
    abstract = _abstract_state(config)
    checkpoints = Checkpoints(path / CHECKPOINTS, read_only=True, report=lambda line: print(line, file=sys.stderr))
    with checkpoints:
        if step is None:
            restored = checkpoints.restore_latest(abstract)
            if restored is None:
                raise InputMissingError("there is no checkpoint yet", workdir, "train first")
            step, state = restored
        else:
            state = checkpoints.restore(step, abstract)
    seal = path / CHECKPOINTS / str(step) / manifest.NAME
    return Run(
        config=config,
        step=step,
        variables={prefix: jax.tree.map(np.asarray, tree) for prefix, tree in state.all_variables().items()},
        sha256=sha256(seal) if seal.exists() else "",
    )


def _abstract_state(config: ExperimentConfig) -> TrainState:
    """Returns the shapes of a run's state, on one device of this process."""
    # The shapes do not depend on how many examples an epoch has.
    optimizer = make_optimizer(config.optimizer, make_schedule(config, num_examples=1))
    init = make_state_init(
        create_model(config.model),
        optimizer,
        image_size=config.data.image_size,
        ema=config.ema.decay > 0,
    )
    return abstract_state(init, make_mesh(MeshConfig(), jax.local_devices()[:1]))
