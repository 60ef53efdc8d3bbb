"""What a run tells while it goes on: metrics.jsonl, the trackers, and the line on the screen."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
from jax.experimental import multihost_utils

from xception_jax.config import to_dict
from xception_jax.logs import trackers
from xception_jax.logs.console import Progress, ProgressLine, Throughput, format_count, format_header
from xception_jax.logs.metrics_log import MetricsLog, read_metrics
from xception_jax.training.experiment import Experiment


class Journal:
    """Keeps the records of a run. All processes may call it; only process 0 writes and prints.

    Args:
      experiment: what is run.
      workdir: the work directory.
      step: the step that the run starts or resumes from; later entries of an earlier attempt are dropped.
      started: `time.monotonic()` at the start of the program.
    """

    def __init__(self, experiment: Experiment, workdir: Path, step: int, started: float):
        config = experiment.config
        self._experiment, self._path, self._started = experiment, workdir / "metrics.jsonl", started
        self._log_every = max(1, experiment.steps(config.log_every))
        self._interval: list[dict[str, float]] = []
        self.throughput = Throughput(config.batch_size)
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._log = MetricsLog(self._path, step)
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in self.entries()), default=0.0)
        self._line = ProgressLine(sys.stderr)
        self._trackers = []
        if config.logs.tensorboard:
            self._trackers.append(trackers.tensorboard(workdir / "tensorboard"))
        if config.logs.wandb_project:
            name = config.name or workdir.name
            self._trackers.append(trackers.wandb(workdir, config.logs.wandb_project, name, to_dict(config)))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._line.close()
            self._log.close()
            for tracker in self._trackers:
                tracker.close()

    def entries(self) -> list[dict[str, Any]]:
        """Returns all entries of metrics.jsonl so far."""
        return read_metrics(self._path)

    def has(self, step: int, split: str) -> bool:
        """Whether there is an entry for this step and split; every process gets the answer of process 0."""
        found = self._writes and self._log.has(step, split)
        if jax.process_count() > 1:
            return bool(multihost_utils.broadcast_one_to_all(found))
        return found

    def restart(self, step: int) -> None:
        """Drops the entries after `step`, as the run goes back to it."""
        self._interval.clear()
        if self._writes:
            self._log.close()
            self._log = MetricsLog(self._path, step)

    @property
    def seconds(self) -> float:
        """Wall time of this run, with its earlier starts."""
        return self._seconds_before + self.seconds_since_start if self._writes else 0.0

    @property
    def seconds_since_start(self) -> float:
        """Wall time since the program was started."""
        return time.monotonic() - self._started

    def message(self, text: str) -> None:
        """Prints a line."""
        if self._writes:
            self._line.message(text)

    def header(self, workdir: Path, step: int) -> None:
        """Prints what a run consists of, where a mistake would show."""
        experiment = self._experiment
        config, cost, data = experiment.config, experiment.cost, experiment.data
        sizes = ", ".join(f"{source.info.split} {len(source):,}" for source in experiment.sources.values())
        start = f", resumed at {step:,}" if step else ""
        rows = [
            ("devices", f"{experiment.mesh.size} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)"),
            ("mesh", "  ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items())),
            (
                "network",
                f"{config.model.name}, {cost.parameters:,} parameters, "
                f"{format_count(cost.multiply_adds)} multiply-adds an image at {config.data.image_size}",
            ),
            ("dataset", f"{data.name}, {data.num_classes} classes: {sizes}"),
            ("batch", f"{config.batch_size:,} images" + self._microbatches()),
            ("steps", f"{experiment.total_steps:,} ({config.duration}){start}"),
            ("cost", f"{format_count(self._training_flops())}FLOP: 3 forward passes of 2 x multiply-adds an image"),
            ("workdir", str(workdir)),
        ]
        self.message(format_header(config.name or "xception_jax", rows))

    def _microbatches(self) -> str:
        n = self._experiment.config.accumulation_steps
        return f" in {n} microbatches" if n > 1 else ""

    def _training_flops(self) -> float:
        return (
            6.0
            * self._experiment.cost.multiply_adds
            * self._experiment.config.batch_size
            * self._experiment.total_steps
        )

    def train(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of a step that has finished; writes their mean over the interval at a log point."""
        self.throughput.mark(step)
        self._interval.append(metrics)
        log_point = step % self._log_every == 0 or step == self._experiment.total_steps
        speed = {
            "images_per_second": self.throughput.images_per_second,
            "input_share": self.throughput.input_share,
        }
        if log_point:
            means = {name: fmean(entry[name] for entry in self._interval) for name in ("loss", "top1", "grad_norm")}
            if self._experiment.config.loss.multi_label:
                del means["top1"]
            latest = {name: metrics[name] for name in ("learning_rate", "skipped_steps")}
            self._interval.clear()
            self._write(step, "train", means | latest | speed)
        if self._writes:
            total, data = self._experiment.total_steps, self._experiment.data
            progress = Progress(
                step=step,
                total_steps=total,
                epoch=step * self._experiment.config.batch_size / data.num_examples,
                loss=metrics["loss"],
                learning_rate=metrics["learning_rate"],
                seconds_left=self.throughput.seconds_left(total - step),
                **speed,
            )
            self._line.show(progress, log_point=log_point)

    def evaluation(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Writes and prints the metrics of an evaluation."""
        self._write(step, split, metrics)
        shares = "  ".join(
            f"{name} {value:.4f}" for name, value in metrics.items() if "top" in name or "map" in name or "loss" in name
        )
        self.message(f"step {step:,}  {split}: {shares}")

    def _write(self, step: int, split: str, values: dict[str, Any]) -> None:
        if self._writes:
            values = {name: value for name, value in values.items() if value is not None} | {"seconds": self.seconds}
            self._log.write(step, split, values)
            for tracker in self._trackers:
                tracker.write(step, split, values)

    def sync(self) -> None:
        """Makes what is written survive a power failure; called before a checkpoint refers to it."""
        if self._writes:
            self._log.sync()

    def pause(self) -> contextlib.AbstractContextManager:
        """Returns a context whose time does not count as training."""
        return self.throughput.paused()
