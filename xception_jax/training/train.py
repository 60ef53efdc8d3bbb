"""Trains a network: `train(config, workdir)` starts or resumes a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
from ml_collections import ConfigDict

from xception_jax.config import ExperimentConfig, flatten, resolve
from xception_jax.errors import ConfigError
from xception_jax.logs.console import announce
from xception_jax.logs.trackers import open_trackers
from xception_jax.processes import check_processes, connected, together
from xception_jax.reports.live import marked_when_stopped
from xception_jax.signals import StopRequested
from xception_jax.storage import checkpoint_directory
from xception_jax.training.agreement import agree_on_config_and_code, agree_on_data, agree_on_weights, check_shared
from xception_jax.training.compilation import use_compilation_cache
from xception_jax.training.experiment import make_experiment
from xception_jax.training.features import check_features, with_features
from xception_jax.training.initial_weights import complete_config, first_state, starts_from_run
from xception_jax.training.journal import Journal, print_once
from xception_jax.training.loop import Loop
from xception_jax.training.preemption import Preemption
from xception_jax.training.run_directory import open_checkpoints, open_run_directory
from xception_jax.training.watchdog import Watchdog

if TYPE_CHECKING:
    from xception_jax.training.summary import Summary
    from xception_jax.weights import Network


def train(config: ConfigDict | Mapping[str, Any] | ExperimentConfig, workdir: str) -> Summary:
    """Trains the model described by `config` in `workdir`, resuming from its last checkpoint if there is one.

    Args:
      config: a config, such as `get_config()` in a file of configs/ returns.
      workdir: directory for config.json, metrics.jsonl, checkpoints/<step>/ and report.html, on a file system or in gs://.

    Returns:
      A summary of the finished run.

    Raises:
      UserError: one of its subclasses, each with its own exit code.
    """
    started = time.monotonic()
    requested = resolve(config)
    address = checkpoint_directory(workdir, "--workdir")
    try:
        return _train(requested, address, started)
    except StopRequested as stop:
        raise stop.as_error(address) from None


def _initial_network(requested: ExperimentConfig, address: str) -> tuple[ExperimentConfig, Network | None]:
    """Returns the completed config and the network to start from, the same on all processes; see `complete_config`."""
    of_run = together("initial weights", lambda: starts_from_run(requested, address))
    agree_on_weights("source", {"from a run": of_run})

    def complete() -> tuple[ExperimentConfig, Network | None]:
        return complete_config(requested, address)

    # All processes read a run together, which cannot be inside of `together`.
    config, initial = complete() if of_run else together("network", complete)
    model = {name: value for name, value in flatten(config).items() if name.startswith("model.")}
    agree_on_weights("content", {"SHA-256": initial.sha256 if initial else ""} | model)
    return config, initial


def _train(requested: ExperimentConfig, address: str, started: float) -> Summary:
    with contextlib.ExitStack() as stack:
        stack.enter_context(connected(requested.distributed, address))
        agree_on_config_and_code(requested)
        together("compilation cache", lambda: use_compilation_cache(requested.compilation_cache))
        config, initial = _initial_network(requested, address)
        directory = together(
            "work directory", lambda: stack.enter_context(open_run_directory(address, config, print_once))
        )
        if jax.process_index() == 0:
            stack.enter_context(marked_when_stopped(directory.files, print_once))
        check_shared(directory)
        preemption = stack.enter_context(Preemption(print_once, address))
        check_processes()
        with announce("reading the data and tracing the network", print_once):
            experiment = together("data", lambda: make_experiment(config))
        trackers = together("trackers", lambda: open_trackers(config, directory.files))
        if config.data.cache_features:
            check_features(config, experiment.abstract.params)
        agree_on_data(experiment.data.fingerprint)
        stack.enter_context(jax.set_mesh(experiment.mesh))
        checkpoints = stack.enter_context(open_checkpoints(experiment, directory, print_once))
        with announce("restoring the newest checkpoint", print_once):
            restored = checkpoints.restore_latest(experiment.abstract)
        with announce("initializing the network", print_once):
            step, state = restored if restored else (0, first_state(experiment, print_once, initial))
        if step > experiment.total_steps:
            raise ConfigError(
                f"the run is at step {step:,}, after the {experiment.total_steps:,} steps of config.duration",
                address,
                "set a config.duration of at least as many steps, or choose another work directory",
            )
        together("config.json", lambda: directory.write_config(config))
        journal = stack.enter_context(Journal(experiment, directory.files, step, started, trackers))
        journal.header(address, step)
        for evaluated, metrics in journal.evaluations("dev").items():  # a killed save has no record of its metrics
            checkpoints.score(evaluated, metrics)
        stack.enter_context(Watchdog(config.watchdog, journal.stopwatch, journal.throughput, directory))
        if config.data.cache_features:

            def stop_if_requested() -> None:
                if preemption.requested:
                    raise preemption.error(step, address)

            experiment = with_features(experiment, state, journal.message, stop_if_requested)
        loop = stack.enter_context(contextlib.closing(Loop(experiment, directory, checkpoints, journal, preemption)))
        return loop.run(step, state)
