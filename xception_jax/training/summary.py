"""Writes the report of a run, while it goes on and at its end, and summarizes its results."""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xception_jax.data import images
from xception_jax.data.sources import Source
from xception_jax.environment import command, installed_versions, peak_memory
from xception_jax.evaluation.evaluate import name_examples
from xception_jax.explain.tiles import heat_maps
from xception_jax.metrics import Metric, main_metric
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.judgement import Threshold, choose_thresholds, judge
from xception_jax.metrics.predictions import Predictions
from xception_jax.metrics.resampling import DRAWS
from xception_jax.metrics.single_label import TopK
from xception_jax.names import printable_path
from xception_jax.reports.mistakes import THUMBNAIL, choose_cells, choose_examples
from xception_jax.reports.run import Judged, Live, RunInfo, write_report
from xception_jax.training.experiment import Experiment
from xception_jax.training.journal import Journal
from xception_jax.training.run_directory import RunDirectory
from xception_jax.training.workdir import CHECKPOINTS
from xception_jax.user_files import writing
from xception_jax.weights import Network, Preprocessing

_LIVE_IMAGES_SECONDS = 0.1
_LIVE_NAMED = 2_000  # images of a split whose file names and groups are read for a live report
_PACKAGES = ("xception_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of a finished run.

    Attributes:
      step: the last step.
      groups: number of groups of the images of these metrics, or None if they are independent.
      metrics: metrics of the test split if there is one, otherwise of the last evaluation on the development split.
      main_metric: the metric that `str` shows.
      state_sha256: fingerprint of the final state.
      report: path of report.html, which may be in a bucket.
      checkpoint: path of the last checkpoint, which may be in a bucket.
      time_spent: seconds of each of `goodput.ACTIVITIES` since the first start of the run, on process 0.
    """

    step: int
    groups: int | None
    metrics: dict[str, Any]
    main_metric: Metric
    state_sha256: str
    report: Path
    checkpoint: Path
    time_spent: dict[str, float]

    def __str__(self) -> str:
        """Returns the lines that are printed at the end of a run."""
        lines, main = [], self.main_metric
        for prefix, label in (("ema_", " (Polyak average)"), ("", "")):
            value = self.metrics.get(prefix + main.name)
            if value is not None:
                images = self.metrics.get("count", 0)
                low, high = wilson_interval(value, images)
                interval = f", 95% interval {low:.4f} to {high:.4f}" if isinstance(main, TopK) else ""
                # The interval of images that are not independent takes a bootstrap: it is in the report.
                details = interval if self.groups is None else f" of {self.groups:,} groups"
                count = f"{images:,} images{details}"
                lines.append(f"{self.metrics['split']} {main.title}{label}: {main.format(value)} ({count})")
        lines += [f"state sha256: {self.state_sha256}", f"checkpoint: {printable_path(self.checkpoint)}"]
        lines.append(f"report: {printable_path(self.report)}")
        return "\n".join(lines)


def summarize_run(
    experiment: Experiment,
    directory: RunDirectory,
    journal: Journal,
    development: Predictions | None,
    test: Predictions | None,
    variables: dict[str, Any],
    *,
    fingerprint: str,
    seconds_to_first_step: float | None,
) -> Summary:
    """Writes report.html and returns the summary of a finished run.

    Args:
      experiment: the experiment.
      directory: the work directory.
      journal: the journal of the run.
      development: predictions of the final state on the development split, on which thresholds are chosen.
      test: predictions on the test split.
      variables: those that made the predictions: of the Polyak average, if there is one.
      fingerprint: fingerprint of the final state.
      seconds_to_first_step: time to the first step of this start of the run.

    Raises:
      StorageError: the report cannot be written. The run is complete otherwise.
    """
    splits = [split for split in ("dev", "test") if split in experiment.sources]
    evaluations = [entry for split in splits for entry in journal.evaluations(split).values()]
    final = evaluations[-1] if evaluations else {}
    report = directory.path("report.html")
    if jax.process_index() == 0:
        info = _run_info(experiment, journal, seconds_to_first_step)
        if "images_per_second" in final:
            info["eval_images_per_second"] = final["images_per_second"]
        judged = None
        if test is not None:
            thresholds = choose_thresholds(development) if development is not None else []
            judged = _judge(experiment, "test", test, thresholds, variables)
        elif development is not None:
            judged = _judge(experiment, "dev", development, variables=variables)
        with writing("report", report, "free some space and run the same command again: it only writes the report"):
            _write(experiment, directory.files, journal.entries(), info, judged)
    step = experiment.total_steps
    return Summary(
        step,
        final.get("groups"),
        final,
        main_metric(experiment.config),
        fingerprint,
        report,
        directory.path(CHECKPOINTS, str(step)),
        journal.stopwatch.seconds(),
    )


def write_live_report(
    experiment: Experiment,
    workdir: Path,
    journal: Journal,
    predictions: Predictions,
    *,
    seconds_to_first_step: float | None,
) -> None:
    """Writes report.html after an evaluation on the development split, on process 0.

    A failure is reported in one line and does not stop the run: everything in the report is also written elsewhere.
    There are no bootstrap intervals, file names and groups only of up to `_LIVE_NAMED` images, and as many images as
    can be decoded in `_LIVE_IMAGES_SECONDS`.
    """
    if jax.process_index() != 0:
        return
    try:
        entries = journal.entries()
        times = [entry["seconds"] for entry in entries if entry["split"] == "dev" and "seconds" in entry]
        live = Live(written=time.time(), seconds=times[-1] - times[-2] if len(times) > 1 else None)
        judged = _judge(experiment, "dev", predictions, live=True)
        _write(experiment, workdir, entries, _run_info(experiment, journal, seconds_to_first_step), judged, live)
    except Exception as error:
        journal.message(f"the report was not written, training goes on: {type(error).__name__}: {error}")


def _run_info(experiment: Experiment, journal: Journal, seconds_to_first_step: float | None) -> RunInfo:
    info: RunInfo = {
        "devices": f"{experiment.mesh.size} x {_device_name()}",
        "parameters": experiment.cost.parameters,
        "live_parameters": experiment.cost.live_parameters,
        "multiply_adds": experiment.cost.multiply_adds,
        "live_multiply_adds": experiment.cost.live_multiply_adds,
        "total_steps": experiment.total_steps,
        "steps_per_epoch": len(experiment.sources["train"]) / experiment.config.batch_size,
        "wall_seconds": journal.seconds,
        "time_spent": journal.stopwatch.seconds(),
        "peak_memory_bytes": peak_memory_bytes(),
        "command": command(),
        **({"commit": commit} if (commit := _commit()) else {}),
        "versions": {"python": platform.python_version()} | installed_versions(_PACKAGES),
    }
    if seconds_to_first_step is not None:
        info["seconds_to_first_step"] = seconds_to_first_step
    return info


def _write(
    experiment: Experiment,
    workdir: Path,
    entries: list[dict[str, Any]],
    info: RunInfo,
    judged: Judged | None,
    live: Live | None = None,
) -> None:
    names, config = experiment.data.class_names, experiment.config
    write_report(workdir, config=config, metrics=entries, info=info, judged=judged, class_names=names, live=live)


def _judge(
    experiment: Experiment,
    split: str,
    predictions: Predictions,
    thresholds: Sequence[Threshold] = (),
    variables: dict[str, Any] | None = None,
    *,
    live: bool = False,
) -> Judged:
    source = experiment.sources[split]
    if not live or len(source) <= _LIVE_NAMED:
        predictions = name_examples(predictions, source)
    chosen = {index: None for group in choose_examples(predictions)[::-1] for index in group}
    if not live:
        cells = choose_cells(predictions, experiment.config.num_classes)
        chosen |= {index: None for cell in cells.values() for index in cell}
    judgement = judge(predictions, experiment.config.num_classes, thresholds, draws=0 if live else DRAWS)
    limits = images.Limits.of(experiment.config.data)
    shown = _decode(source, chosen, _LIVE_IMAGES_SECONDS if live else math.inf, limits)
    maps = {} if variables is None else _heat_maps(experiment, source, variables, list(shown))
    return Judged(source.info.split, predictions, judgement, shown, maps)


def peak_memory_bytes() -> int:
    """Returns the peak memory of a device in bytes, or of the process on CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return peak_memory()


def _decode(source: Source, indices: Iterable[int], seconds: float, limits: images.Limits) -> dict[int, np.ndarray]:
    """Decodes images of a split, as many as fit into the time."""
    decoded, start = {}, time.monotonic()
    for index in indices:
        if time.monotonic() - start > seconds:
            break
        try:
            decoded[index] = images.thumbnail(images.decode(source[index]["image"], limits), THUMBNAIL)
        except images.DamagedImageError:
            continue  # the evaluation used the next image instead; the report shows no image
    return decoded


def _heat_maps(
    experiment: Experiment, source: Source, variables: dict[str, Any], indices: Sequence[int]
) -> dict[int, np.ndarray]:
    """Explains the predictions for the first of some images. Only in a single process, which has the whole network."""
    config = experiment.config
    shown = indices[: config.evaluation.heat_maps]
    if not shown or jax.process_count() > 1:
        return {}
    view = Preprocessing.of(config.data)
    network = Network(config.model, jax.device_get(variables), view, experiment.data.class_names, "", "")
    limits = images.Limits.of(config.data)
    pixels = [images.decode(source[index]["image"], limits) for index in shown]
    return dict(zip(shown, heat_maps(network, pixels), strict=True))


@functools.cache
def _device_name() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


@functools.cache
def _commit() -> str:
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return ""  # of another repository, in which the package is installed
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return ""
