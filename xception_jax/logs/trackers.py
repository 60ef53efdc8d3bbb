"""TensorBoard and Weights & Biases: optional copies of what metrics.jsonl holds, which never stop a run.

Both packages are imported only here and only when asked for. A package that is missing is an error of the config,
told before training starts; whatever fails later (a directory that is not writable, a disk, a network, a service)
is one warning, and the tracker is off from then on.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from xception_jax.errors import ConfigError

log = logging.getLogger(__name__)

# What a tracker needs: a function that takes (step, {"split/name": value}), and one that closes it.
Connection = tuple[Callable[[int, dict[str, Any]], None], Callable[[], None]]


class Tracker:
    """Sends entries to a service until the first failure.

    Args:
      name: of the service, for the warning.
      connect: opens the connection.
    """

    def __init__(self, name: str, connect: Callable[[], Connection]):
        self._name = name
        self._connection: Connection | None = None
        self._connection = self._attempt(connect)

    def _attempt(self, action: Callable[..., Any], *args: Any) -> Any:
        # Everything is caught: services raise what they like, and none of it is worth a training run.
        try:
            return action(*args)
        except Exception as error:
            self._connection = None
            log.warning("%s is off: %s: %s", self._name, type(error).__name__, str(error).partition("\n")[0])
            return None

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Sends one entry, its names as 'split/name'; strings are left out."""
        if self._connection is not None:
            numbers = {f"{split}/{name}": float(v) for name, v in values.items() if not isinstance(v, str)}
            self._attempt(self._connection[0], step, numbers)

    def close(self) -> None:
        """Sends what is left and closes the connection."""
        if self._connection is not None:
            self._attempt(self._connection[1])
            self._connection = None


def _missing(package: str, field: str) -> ConfigError:
    return ConfigError(
        f"{package} is not installed", field, f"pip install {package}, or leave the field at its default"
    )


def tensorboard(directory: str | os.PathLike[str]) -> Tracker:
    """Returns a tracker that writes TensorBoard event files into `directory`.

    Raises:
      ConfigError: tensorboardX is not installed.
    """
    try:
        import tensorboardX
    except ImportError:
        raise _missing("tensorboardX", "config.logs.tensorboard") from None

    def connect() -> Connection:
        writer = tensorboardX.SummaryWriter(os.fspath(directory))

        def send(step: int, numbers: dict[str, Any]) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        return send, writer.close

    return Tracker("TensorBoard", connect)


def wandb(directory: str | os.PathLike[str], project: str, name: str, config: Mapping[str, Any]) -> Tracker:
    """Returns a tracker that logs to Weights & Biases; a run that resumes in `directory` continues there too.

    Args:
      directory: the work directory; the run's id is kept in its `wandb_id`.
      project: the project at wandb.
      name: what the run is called there.
      config: the resolved config, as nested dicts.

    Raises:
      ConfigError: wandb is not installed.
    """
    try:
        import wandb as service
    except ImportError:
        raise _missing("wandb", "config.logs.wandb_project") from None
    return Tracker("Weights & Biases", lambda: _connect_wandb(service, Path(directory), project, name, config))


def _connect_wandb(
    service: ModuleType, directory: Path, project: str, name: str, config: Mapping[str, Any]
) -> Connection:
    id_file = directory / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    run = service.init(
        project=project, name=name, config=dict(config), dir=directory, id=id_file.read_text(), resume="allow"
    )
    return lambda step, numbers: run.log(numbers, step=step), run.finish
