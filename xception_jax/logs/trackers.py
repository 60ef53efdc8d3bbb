"""Copies the entries of metrics.jsonl to TensorBoard or Weights & Biases.

Both packages are optional, and are imported only if they are used. A missing package is a ConfigError before training
starts. Any later failure (an unwritable directory, the network, the service) disables the tracker with one warning, and
never stops the run.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xception_jax.config import ExperimentConfig, to_dict
from xception_jax.errors import ConfigError

log = logging.getLogger(__name__)

# A function that sends (step, {"split/name": value}), and a function that closes the connection.
Connection = tuple[Callable[[int, dict[str, Any]], None], Callable[[], None]]


class Tracker:
    """Sends entries to a service until the first failure.

    Args:
      name: name of the service, for the warning.
      connect: opens the connection.
    """

    def __init__(self, name: str, connect: Callable[[], Connection]):
        self._name = name
        self._connection: Connection | None = None
        self._connection = self._attempt(connect)

    def _attempt(self, action: Callable[..., Any], *args: Any) -> Any:
        # Services may raise any exception, and none of them should stop a training run.
        try:
            return action(*args)
        except Exception as error:
            self._connection = None
            log.warning("%s is off: %s: %s", self._name, type(error).__name__, str(error).partition("\n")[0])
            return None

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Sends the numbers of one entry, named 'split/name'. Strings are skipped."""
        if self._connection is not None:
            numbers = {f"{split}/{name}": float(v) for name, v in values.items() if not isinstance(v, str)}
            self._attempt(self._connection[0], step, numbers)

    def close(self) -> None:
        """Flushes and closes the connection."""
        if self._connection is not None:
            self._attempt(self._connection[1])
            self._connection = None


def _missing(package: str, field: str) -> ConfigError:
    return ConfigError(
        f"{package} is not installed", field, f"pip install {package}, or leave the field at its default"
    )


def tensorboard(config: ExperimentConfig, workdir: Path) -> Tracker:
    """Returns a tracker that writes TensorBoard event files into `workdir`/tensorboard.

    Raises:
      ConfigError: tensorboardX is not installed.
    """
    try:
        import tensorboardX
    except ImportError:
        raise _missing("tensorboardX", "config.logs.tensorboard") from None

    def connect() -> Connection:
        writer = tensorboardX.SummaryWriter(os.fspath(workdir / "tensorboard"))

        def send(step: int, numbers: dict[str, Any]) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        return send, writer.close

    return Tracker("TensorBoard", connect)


def wandb(config: ExperimentConfig, workdir: Path) -> Tracker:
    """Returns a tracker that logs to Weights & Biases. A resumed run continues the same run there.

    The file `wandb_id` in the work directory stores the id of the run.

    Raises:
      ConfigError: wandb is not installed.
    """
    try:
        import wandb as service
    except ImportError:
        raise _missing("wandb", "config.logs.wandb_project") from None

    def connect() -> Connection:
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        run = service.init(
            project=config.logs.wandb_project,
            name=config.name or workdir.name,
            config=to_dict(config),
            dir=workdir,
            id=id_file.read_text(),
            resume="allow",
        )
        return lambda step, numbers: run.log(numbers, step=step), run.finish

    return Tracker("Weights & Biases", connect)


# By the field of `config.logs` that turns the tracker on.
TRACKERS: dict[str, Callable[[ExperimentConfig, Path], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb_project": wandb,
}


def open_trackers(config: ExperimentConfig, workdir: Path) -> list[Tracker]:
    """Opens the trackers that `config.logs` asks for.

    Raises:
      ConfigError: the package of one is not installed.
    """
    return [tracker(config, workdir) for field, tracker in TRACKERS.items() if getattr(config.logs, field)]
