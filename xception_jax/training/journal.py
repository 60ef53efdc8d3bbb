"""Records a run: metrics.jsonl, trackers, console progress."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float32

from xception_jax.logs import goodput
from xception_jax.logs.console import (
    Progress,
    ProgressLine,
    Throughput,
    format_count,
    format_duration,
    format_header,
    say,
)
from xception_jax.logs.metrics_log import INTERVAL, RECOVERY, START, MetricsLog, read_metrics
from xception_jax.logs.trackers import Tracker
from xception_jax.metrics import describe, metrics_of
from xception_jax.names import LINE_LENGTH, printable
from xception_jax.parallel import bytes_from_primary
from xception_jax.training.experiment import Experiment

_STEPS_TO_ESTIMATE = 5  # the speed of these steps gives the first estimate of the time that a run takes
_BINS = 64  # of the histogram of a parameter
_AVERAGED = ("loss", "weighted_loss", "top1", "grad_norm")


def print_once(line: str) -> None:
    """Prints a line on process 0 only."""
    if jax.process_index() == 0:
        say(line)


class Journal:
    """Writes the metrics of a run to all outputs. All processes call it; only process 0 writes and prints.

    Args:
      experiment: the experiment that is run.
      workdir: the work directory.
      step: the step that the run starts or resumes from. Later entries of an earlier attempt are dropped.
      started: `time.monotonic()` at the start of the program.
      trackers: get all entries as well; the journal closes them.
    """

    def __init__(self, experiment: Experiment, workdir: Path, step: int, started: float, trackers: Sequence[Tracker]):
        config = experiment.config
        self._experiment, self._path, self._started = experiment, workdir / "metrics.jsonl", started
        self._log_every = experiment.every(config.log_every)
        self.throughput = Throughput(config.batch_size)
        self.stopwatch = goodput.Stopwatch(started)
        self._interval: list[dict[str, float]] = []
        self._last_step = step
        self._estimate_at = step + _STEPS_TO_ESTIMATE
        self._trackers = trackers
        everywhere = NamedSharding(experiment.mesh, PartitionSpec())
        self._histogram = jax.jit(functools.partial(jnp.histogram, bins=_BINS), out_shardings=everywhere)
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        earlier = read_metrics(self._path)
        first = None
        if step < experiment.total_steps:
            since = time.time() - self.seconds_since_start
            self.stopwatch = goodput.Stopwatch(started, goodput.carried_over(earlier, step, since))
            first = START, goodput.to_entry(self.stopwatch.seconds())
        else:  # only the report is written again
            self.stopwatch = goodput.Stopwatch(started, goodput.at_step(earlier, step))
        self._log = MetricsLog(self._path, step, first)
        entries = self.entries()
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in earlier), default=0.0)
        self._interval = _unfinished_interval(entries, step)
        self._exit = contextlib.ExitStack()
        self._exit.callback(self._log.close)
        for tracker in trackers:
            self._exit.callback(tracker.close)
        self._line = self._exit.enter_context(ProgressLine(experiment.total_steps, step))

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._exit.close()
            if self.stopwatch.ended:
                self.message(goodput.describe(self.stopwatch.seconds()))

    def entries(self) -> list[dict[str, Any]]:
        """Returns all entries of metrics.jsonl, and those that could not be written to it yet."""
        return read_metrics(self._path) + (self._log.waiting() if self._writes else [])

    def has(self, step: int, split: str) -> bool:
        """Returns whether there is an entry for this step and split. All processes get the same answer."""
        return self._agree(self._writes and self._log.has(step, split))

    def evaluations(self, split: str) -> dict[int, dict[str, Any]]:
        """Returns the entries of a split, by step. All processes get the same."""
        found = {entry["step"]: entry for entry in self.entries() if entry["split"] == split} if self._writes else {}
        content = bytes_from_primary(json.dumps(found).encode())
        return {int(step): entry for step, entry in json.loads(content).items()}

    def has_recovered(self) -> bool:
        """Returns whether the run has gone back to a checkpoint before. A collective."""
        return self._agree(self._writes and any(entry["split"] == RECOVERY for entry in self.entries()))

    def _agree(self, found: bool) -> bool:
        return bool(multihost_utils.broadcast_one_to_all(found)) if jax.process_count() > 1 else found

    @property
    def seconds(self) -> float:
        """Wall time of the run in seconds, including earlier attempts."""
        return self._seconds_before + self.seconds_since_start if self._writes else 0.0

    @property
    def seconds_since_start(self) -> float:
        """Wall time since the start of the program, in seconds."""
        return time.monotonic() - self._started

    def message(self, text: str) -> None:
        """Prints a line on process 0 only."""
        if self._writes:
            say(text)

    def header(self, workdir: str, step: int) -> None:
        """Prints a summary of the run before it starts, so that mistakes in the config are visible."""
        experiment = self._experiment
        config, cost, data = experiment.config, experiment.cost, experiment.data
        sizes = ", ".join(f"{source.info.split} {len(source):,}" for source in experiment.sources.values())
        start = f", resumed at {step:,}" if step else ""
        n = config.accumulation_steps
        rows = [
            ("devices", f"{experiment.mesh.size} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)"),
            ("mesh", "  ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items())),
            (
                "network",
                f"{config.model.name}, {cost.parameters:,} parameters, "
                f"{format_count(cost.multiply_adds)} multiply-adds per image at {config.data.image_size}",
            ),
            ("live", f"{cost.live_parameters:,} parameters, {format_count(cost.live_multiply_adds)} multiply-adds"),
            ("dataset", f"{data.name}, {data.num_classes} classes: {sizes}"),
            ("batch", f"{config.batch_size:,} images" + (f" in {n} microbatches" if n > 1 else "")),
            ("steps", f"{experiment.total_steps:,} ({config.duration}){start}"),
            ("rate", self._rate()),
            ("cost", self._cost()),
            ("workdir", workdir),
        ]
        shown = [(name, printable(value, LINE_LENGTH)) for name, value in rows]
        for line in format_header(printable(config.name or "xception_jax"), shown).split("\n"):
            self.message(line)

    def _cost(self) -> str:
        """Describes the arithmetic of the run."""
        experiment = self._experiment
        config, per_image = experiment.config, 2.0 * experiment.cost.multiply_adds
        if config.data.cache_features:
            images = sum(len(source) for source in experiment.sources.values())
            return f"{format_count(per_image * images)}FLOP (1 forward pass per image, 2 FLOP per multiply-add)"
        flops = 3 * per_image * config.batch_size * experiment.total_steps
        most = "at most " if config.optimizer.frozen else ""
        return f"{most}{format_count(flops)}FLOP (3 forward passes per image and epoch, 2 FLOP per multiply-add)"

    def _rate(self) -> str:
        """Describes the learning rate, and says if it never reaches its peak."""
        schedule = self._experiment.config.schedule
        text = f"{schedule.name}, learning rate {schedule.learning_rate:g}"
        if warmup := self._experiment.steps(schedule.warmup):
            text += f" after a warm-up of {warmup:,} steps"
            text += ": the run ends before" if warmup >= self._experiment.total_steps else ""
        return text

    def train(self, step: int, metrics: dict[str, float]) -> None:
        """Records the metrics of a finished step. At a log point, writes their mean over the interval."""
        self.throughput.mark(step)
        self.stopwatch.step_ended(step)
        if not metrics["bad_steps"]:  # one loss that is not finite would hide those of the whole interval
            self._interval.append({name: metrics[name] for name in _AVERAGED if name in metrics})
        self._last_step = step
        log_point = step % self._log_every == 0 or step == self._experiment.total_steps
        speed = {
            "images_per_second": self.throughput.images_per_second,
            "input_share": self.throughput.input_share,
        }
        if log_point:
            means = {name: fmean(entry[name] for entry in self._interval) for name in self._common()}
            latest = {name: metrics[name] for name in ("learning_rate", "skipped_steps")}
            self._interval.clear()
            self._write(step, "train", means | latest | speed)
        if step == self._estimate_at:
            left = self.throughput.seconds_left(self._experiment.total_steps - step)
            if left is not None:
                self.message(f"about {format_duration(left)} left, not counting evaluations and checkpoints")
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

    def _common(self) -> list[str]:
        """Returns the metrics that all steps of the interval have. A resumed run may weight its classes, or not."""
        first = self._interval[0] if self._interval else {}  # empty if all steps of the interval were skipped
        return [name for name in first if all(name in entry for entry in self._interval)]

    def evaluation(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Writes and prints the metrics of an evaluation."""
        self._write(step, split, metrics)
        self.message(f"step {step:,}  {split}: {describe(metrics, metrics_of(self._experiment.config), ('', 'ema_'))}")

    def images(self, step: int, images: Float32[np.ndarray, "b h w 3"]) -> None:
        """Sends the first images of a batch, nominally in [-1, 1], to the trackers of process 0."""
        count = self._experiment.config.logs.images
        for tracker in self._trackers if count else ():
            pixels = np.round((images[:count] + 1) * 127.5)
            pixels = np.clip(pixels, 0, 255).astype(np.uint8)  # turned images leave [-1, 1]
            tracker.images(step, "train/images", pixels)

    def histograms(self, step: int, params: dict[str, Any]) -> None:
        """Sends the distribution of every parameter to the trackers of process 0. All processes must call it."""
        found = jax.device_get(jax.tree.map(self._histogram, params))
        for tracker in self._trackers:
            tracker.histograms(step, flatten_dict(found, sep="/"))

    def recovery(self, step: int, restored_step: int) -> None:
        """Records that training continues at `step` with the state of an earlier checkpoint."""
        if self._writes:
            self.stopwatch.lose(goodput.at_step(self.entries(), restored_step))
        self._write(step, RECOVERY, {"restored_step": restored_step})
        self.message(
            f"went back to the checkpoint of step {restored_step:,}; skipping all batches up to step {step:,}. "
            "A run does this only once."
        )

    def _write(self, step: int, split: str, values: dict[str, Any]) -> None:
        if self._writes:
            values = {name: value for name, value in values.items() if value is not None} | {"seconds": self.seconds}
            time_spent = self.stopwatch.seconds()
            self._log.write(step, split, values | goodput.to_entry(time_spent))
            for tracker in self._trackers:
                tracker.write(step, split, values | {"goodput": goodput.shares(time_spent)[goodput.STEPS]})

    def sync(self) -> None:
        """Flushes all entries to disk. Must be called before the checkpoint of the same step is saved."""
        if self._writes:
            if self._interval and not self._log.has(self._last_step, INTERVAL):
                columns = {name: [entry[name] for entry in self._interval] for name in self._common()}
                self._log.write(self._last_step, INTERVAL, columns | goodput.to_entry(self.stopwatch.seconds()))
            self._log.sync()

    @contextlib.contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Counts the time spent in this context as `activity`, and excludes it from the throughput."""
        with self.throughput.paused(), self.stopwatch.during(activity):
            yield

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent in this context as waiting for input."""
        with self.throughput.waiting(), self.stopwatch.during(goodput.INPUT):
            yield


def _unfinished_interval(entries: list[dict[str, Any]], step: int) -> list[dict[str, float]]:
    """Returns the metrics of the steps up to `step` that the next 'train' entry must include."""
    found = [entry for entry in entries if entry["split"] == INTERVAL and entry["step"] == step]
    if not found:
        return []
    columns = {name: values for name, values in found[-1].items() if name in _AVERAGED and isinstance(values, list)}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
