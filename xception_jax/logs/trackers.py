"""Copies the entries of metrics.jsonl, images and histograms to TensorBoard or Weights & Biases.

Both packages are optional, and are imported only if they are used. A missing package is a ConfigError before training
starts. Any later failure (an unwritable directory, the network, the service) disables the tracker with one warning, and
never stops the run.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from xception_jax.config import ExperimentConfig, to_dict
from xception_jax.errors import ConfigError
from xception_jax.files import write_atomically
from xception_jax.names import printable

log = logging.getLogger(__name__)

Histogram = tuple[np.ndarray, np.ndarray]  # counts [n] and edges [n + 1]


class Connection(NamedTuple):
    """Sends each kind of value to a service. Names are 'split/name' or names of parameters."""

    numbers: Callable[[int, dict[str, float]], None]
    images: Callable[[int, str, UInt8[np.ndarray, "n h w 3"]], None]
    histograms: Callable[[int, dict[str, Histogram]], None]
    close: Callable[[], None]


class Tracker:
    """Sends values to a service until the first failure.

    Args:
      name: name of the service, for the warning.
      connect: opens the connection. It is called with the first values.
    """

    def __init__(self, name: str, connect: Callable[[], Connection]):
        self._name = name
        self._connect: Callable[[], Connection] | None = connect
        self._connection: Connection | None = None

    def _attempt(self, action: Callable[..., Any], *args: Any) -> Any:
        # Services may raise any exception, and none of them should stop a training run.
        try:
            return action(*args)
        except Exception as error:
            self._connection = None
            log.warning("%s is off: %s: %s", self._name, type(error).__name__, str(error).partition("\n")[0])
            return None

    def _send(self, kind: str, *args: Any) -> None:
        if self._connect is not None:
            connect, self._connect = self._connect, None
            self._connection = self._attempt(connect)
        if self._connection is not None:
            self._attempt(getattr(self._connection, kind), *args)

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Sends the numbers of one entry, named 'split/name'."""
        self._send("numbers", step, {f"{split}/{name}": float(value) for name, value in values.items()})

    def images(self, step: int, name: str, pixels: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Sends RGB images under one name."""
        self._send("images", step, name, pixels)

    def histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        """Sends the distributions of arrays by name."""
        self._send("histograms", step, histograms)

    def close(self) -> None:
        """Flushes and closes the connection."""
        self._connect = None
        if self._connection is not None:
            self._attempt(self._connection.close)
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
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
    except ImportError:
        raise _missing("tensorboardX", "config.logs.tensorboard") from None

    def connect() -> Connection:
        # tensorboardX.SummaryWriter writes in a thread, which a full disk ends; it would then wait for it forever.
        directory = workdir / "tensorboard"
        directory.mkdir(exist_ok=True)
        writer = EventsWriter(os.fspath(directory / "events"), f".{secrets.token_hex(4)}")

        def send(step: int, parts: list[Any]) -> None:
            for part in parts:
                writer.write_event(Event(step=step, wall_time=time.time(), summary=part))
            writer.flush()

        def numbers(step: int, values: dict[str, float]) -> None:
            send(step, [summary.scalar(name, value) for name, value in values.items()])

        def images(step: int, name: str, pixels: np.ndarray) -> None:
            send(step, [summary.image(name, pixels, dataformats="NHWC")])

        def histograms(step: int, values: dict[str, Histogram]) -> None:
            parts = []
            for name, (counts, edges) in values.items():
                centers = (edges[1:] + edges[:-1]) / 2
                moments = counts.sum(), counts @ centers, counts @ centers**2
                parts.append(
                    summary.histogram_raw(name, edges[0], edges[-1], *moments, edges[1:].tolist(), counts.tolist())
                )
            send(step, parts)

        return Connection(numbers, images, histograms, writer.close)

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
        if not id_file.exists() or not id_file.read_text():
            write_atomically(id_file, secrets.token_hex(8))
        run = service.init(
            project=config.logs.wandb_project,
            name=printable(config.name or workdir.name),
            config=to_dict(config),
            dir=workdir,
            id=id_file.read_text(),
            resume="allow",
        )

        def images(step: int, name: str, pixels: np.ndarray) -> None:
            run.log({name: [service.Image(image) for image in pixels]}, step=step)

        def histograms(step: int, values: dict[str, Histogram]) -> None:
            run.log({name: service.Histogram(np_histogram=each) for name, each in values.items()}, step=step)

        return Connection(lambda step, numbers: run.log(numbers, step=step), images, histograms, run.finish)

    return Tracker("Weights & Biases", connect)


# By the field of `config.logs` that turns the tracker on.
TRACKERS: dict[str, Callable[[ExperimentConfig, Path], Tracker]] = {
    "tensorboard": tensorboard,
    "wandb_project": wandb,
}


def open_trackers(config: ExperimentConfig, workdir: Path) -> list[Tracker]:
    """Returns the trackers that `config.logs` asks for, and none in other processes than process 0.

    They connect when they get their first values.

    Raises:
      ConfigError: the package of one is not installed.
    """
    if jax.process_index() > 0:
        return []
    return [tracker(config, workdir) for field, tracker in TRACKERS.items() if getattr(config.logs, field)]
