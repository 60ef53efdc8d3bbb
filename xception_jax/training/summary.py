"""Writes the report of a finished run and summarizes its results."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from xception_jax.data import images
from xception_jax.data.sources import Source
from xception_jax.environment import command, installed_versions, peak_memory
from xception_jax.metrics import Metric, main_metric
from xception_jax.metrics.intervals import wilson_interval
from xception_jax.metrics.predictions import Predictions
from xception_jax.metrics.single_label import TopK
from xception_jax.reports.run import RunInfo, choose_examples, write_report
from xception_jax.training.experiment import Experiment
from xception_jax.training.journal import Journal

_PACKAGES = ("xception_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Summary:
    """The results of a finished run.

    Attributes:
      step: the last step.
      metrics: metrics of the test split if there is one, otherwise of the last evaluation on the development split.
      main_metric: the metric that `str` shows.
      state_sha256: fingerprint of the final state.
      report: path of report.html.
      checkpoint: path of the last checkpoint.
    """

    step: int
    metrics: dict[str, Any]
    main_metric: Metric
    state_sha256: str
    report: Path
    checkpoint: Path

    def __str__(self) -> str:
        """Returns the lines that are printed at the end of a run."""
        lines, main = [], self.main_metric
        for prefix, label in (("ema_", " (Polyak average)"), ("", "")):
            value = self.metrics.get(prefix + main.name)
            if value is not None:
                low, high = wilson_interval(value, self.metrics["count"])
                interval = f", 95% interval {low:.4f} to {high:.4f}" if isinstance(main, TopK) else ""
                count = f"{self.metrics['count']:,} images{interval}"
                lines.append(f"{self.metrics['split']} {main.title}{label}: {main.format(value)} ({count})")
        lines += [f"state sha256: {self.state_sha256}", f"checkpoint: {self.checkpoint}", f"report: {self.report}"]
        return "\n".join(lines)


def summarize_run(
    experiment: Experiment,
    workdir: Path,
    journal: Journal,
    predictions: Predictions | None,
    *,
    fingerprint: str,
    seconds_to_first_step: float | None,
) -> Summary:
    """Writes report.html and returns the summary of a finished run."""
    entries = journal.entries()
    evaluations = [entry for split in ("dev", "test") for entry in entries if entry["split"] == split]
    final = evaluations[-1] if evaluations else {}
    report = workdir / "report.html"
    if jax.process_index() == 0:
        info: RunInfo = {
            "devices": f"{experiment.mesh.size} x {_device_name()}",
            "parameters": experiment.cost.parameters,
            "multiply_adds": experiment.cost.multiply_adds,
            "total_steps": experiment.total_steps,
            "wall_seconds": journal.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "command": command(),
            "commit": _commit(),
            "versions": {"python": platform.python_version()} | installed_versions(_PACKAGES),
        }
        if seconds_to_first_step is not None:
            info["seconds_to_first_step"] = seconds_to_first_step
        if "images_per_second" in final:
            info["eval_images_per_second"] = final["images_per_second"]
        write_report(
            workdir,
            config=experiment.config,
            metrics=entries,
            info=info,
            predictions=predictions,
            class_names=experiment.data.class_names,
            images=_example_images(experiment.sources["test"], predictions) if predictions is not None else None,
        )
    step = experiment.total_steps
    return Summary(
        step, final, main_metric(experiment.config), fingerprint, report, workdir / "checkpoints" / str(step)
    )


def peak_memory_bytes() -> int:
    """Returns the peak memory of a device in bytes, or of the process on CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return peak_memory()


def _example_images(source: Source, predictions: Predictions) -> dict[int, Any]:
    decoded = {}
    for index in {index for group in choose_examples(predictions) for index in group}:
        try:
            decoded[index] = images.decode(source[index]["image"])
        except images.DamagedImageError:
            continue  # the evaluation used the next image instead; the report shows no image
    return decoded


def _device_name() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
