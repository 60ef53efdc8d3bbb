"""The training loop: `train(config, workdir)` starts a run or resumes it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from xception_jax.config import ExperimentConfig, resolve, to_json
from xception_jax.data.pipeline import BatchIterator, DamagedImages, EvaluationBatches, train_batches
from xception_jax.errors import DivergedError
from xception_jax.evaluation.evaluate import evaluate, make_evaluation_step
from xception_jax.evaluation.metrics import Predictions, save_predictions
from xception_jax.logs.profile import StepTrace
from xception_jax.parallel import batch_sharding, start_distributed, to_devices
from xception_jax.training.checkpoint import Checkpoints
from xception_jax.training.experiment import Experiment, make_experiment, out_of_memory
from xception_jax.training.fingerprint import state_fingerprint
from xception_jax.training.initial_weights import first_state
from xception_jax.training.journal import Journal
from xception_jax.training.preemption import Preemption
from xception_jax.training.workdir import open_workdir

if TYPE_CHECKING:
    from xception_jax.training.summary import Summary

_POLL_SECONDS = 0.5


def train(config: ExperimentConfig, workdir: str) -> Summary:
    """Trains what the config describes in `workdir`, from its last checkpoint if it has one.

    Args:
      config: as `get_config()` in a file of configs/ returns it.
      workdir: gets config.json, metrics.jsonl, checkpoints/<step>/ and report.html.

    Returns:
      What the run ended with.

    Raises:
      UserError: one of its subclasses; each says what to do and has an exit code of its own.
    """
    started = time.monotonic()
    config = resolve(config)
    start_distributed(config.distributed)
    path = Path(workdir).absolute()
    with contextlib.ExitStack() as stack:
        stack.enter_context(open_workdir(path, config))
        preemption = stack.enter_context(Preemption())
        experiment = make_experiment(config)
        stack.enter_context(jax.set_mesh(experiment.mesh))
        checkpoints = stack.enter_context(open_checkpoints(experiment, path))
        restored = checkpoints.restore_latest(experiment.abstract)
        step, state = restored if restored else (0, first_state(experiment, print_once))
        journal = stack.enter_context(Journal(experiment, path, step, started))
        journal.header(path, step)
        loop = stack.enter_context(contextlib.closing(Loop(experiment, path, checkpoints, journal, preemption)))
        try:
            return loop.run(step, state)
        except jax.errors.JaxRuntimeError as error:
            raise out_of_memory(error, config) from error


def open_checkpoints(experiment: Experiment, workdir: Path, *, read_only: bool = False) -> Checkpoints:
    """Opens the checkpoints of a run, ranked by the accuracy on the development split."""
    config = experiment.config
    quality = "map_at_k" if config.loss.multi_label else "top1"
    return Checkpoints(
        workdir / "checkpoints",
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best if "dev" in experiment.sources else 0,
        best_metric=f"ema_{quality}" if config.ema.decay > 0 else quality,
        identity={
            "config": hashlib.sha256(to_json(config).encode()).hexdigest(),
            "dataset": experiment.data.fingerprint,
        },
        allow_dataset_change=config.checkpoint.allow_dataset_change,
        read_only=read_only,
        report=print_once,
    )


def print_once(line: str) -> None:
    """Prints a line, by process 0."""
    if jax.process_index() == 0:
        print(line)


@dataclasses.dataclass
class _Dispatched:
    """A step that the devices may still be computing: its number (from 1) and its metrics."""

    step: int
    metrics: dict[str, jax.Array]


class Loop:
    """Takes steps, and between them evaluates, saves and stops when it is due.

    What is due at a step is decided from the step and the journal alone, so that a run that resumes at a step does
    there what the interrupted one would have done.
    """

    def __init__(
        self, experiment: Experiment, workdir: Path, checkpoints: Checkpoints, journal: Journal, preemption: Preemption
    ):
        self.experiment, self.workdir = experiment, workdir
        self.checkpoints, self.journal, self.preemption = checkpoints, journal, preemption
        self.config = experiment.config
        self.evaluation_step = make_evaluation_step(experiment.model, self.config)
        self.damaged = {
            name: DamagedImages(source.info, self.config.data.max_bad_fraction)
            for name, source in experiment.sources.items()
        }
        self.evaluation_batches = {
            name: EvaluationBatches(
                self.config.data,
                source,
                batch_size=self.config.evaluation.batch_size // jax.process_count(),
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            for name, source in experiment.sources.items()
            if name != "train"
        }
        self.dev_metrics: dict[str, float] = {}
        self.dispatched: _Dispatched | None = None
        self.went_back = False
        self.seconds_to_first_step: float | None = None
        self.batches: BatchIterator | None = None
        self.fetcher = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="fetch")

    def run(self, step: int, state: Any) -> Summary:
        """Trains from `step` to the end of the config's duration, evaluates on the test split and reports."""
        self.step, self.state = step, state
        total = self.experiment.total_steps
        if step < total:
            self._open_batches()  # they load while the step compiles
            train_step = self.experiment.compile_step()
            trace = StepTrace(self.workdir / "profile", self.config.profile, train_step.as_text, self.journal.message)
        while True:
            if self.step and self._due(self.config.evaluation.every):
                self._evaluate_dev()
            if self.step >= total:
                break
            if self.step and self._due(self.config.checkpoint.every):
                self._save()
            if self.preemption.should_stop(self.step):
                self._stop()
            batch = self._next_batch()
            before, self.dispatched = self.dispatched, None
            trace.before_step(self.state)
            self.state, metrics = train_step(self.state, batch)
            self.step += 1
            self.dispatched = _Dispatched(self.step, metrics)
            # Read only now: the devices compute this step while the host waits for the metrics of the last one.
            self._read(before)
            self.checkpoints.poll()
        if step < total:
            trace.end(self.state)
        self._save()
        self.checkpoints.wait()
        predictions = self._evaluate_test() if "test" in self.experiment.sources else None
        from xception_jax.training.summary import summarise_run  # matplotlib, which the first step need not wait for

        return summarise_run(
            self.experiment,
            self.workdir,
            self.journal,
            predictions,
            fingerprint=state_fingerprint(self.state),
            seconds_to_first_step=self.seconds_to_first_step,
        )

    def close(self) -> None:
        """Stops the threads that load batches."""
        if self.batches is not None:
            self.batches.close()
        self.fetcher.shutdown(wait=False, cancel_futures=True)

    # --- the steps ---------------------------------------------------------------------------------------------------

    def _open_batches(self) -> None:
        if self.batches is not None:
            self.batches.close()
        self.batches = train_batches(
            self.config.data,
            self.experiment.sources["train"],
            batch_size=self.config.batch_size // jax.process_count(),
            seed=self.config.seed,
            start_step=self.step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.next_batch = self.fetcher.submit(self._fetch, self.batches)

    def _fetch(self, batches) -> tuple[dict, dict]:
        batch = next(batches)
        return batch, self._to_devices({name: batch[name] for name in ("image", "label")})

    def _to_devices(self, batch: dict) -> dict:
        return to_devices(batch, batch_sharding(self.experiment.mesh))

    def _next_batch(self) -> dict:
        """Waits for the next batch, but not longer than until a signal comes."""
        with self.journal.throughput.waiting():
            while True:
                try:
                    batch, on_devices = self.next_batch.result(timeout=_POLL_SECONDS)
                    break
                except concurrent.futures.TimeoutError:
                    if self.preemption.requested:
                        self._stop()
        self.next_batch = self.fetcher.submit(self._fetch, self.batches)
        self._note_damaged("train", batch)
        return on_devices

    def _note_damaged(self, split: str, batch: dict) -> None:
        damaged = self.damaged[split]
        for index in damaged.add(batch):
            if len(damaged.indices) <= damaged.NAMED:
                self.journal.message(f"image {index} of {split} is damaged: the next one stands in for it")

    def _read(self, dispatched: _Dispatched | None) -> None:
        """Takes note of a step's metrics; a run of bad ones sends the run back to its last checkpoint."""
        if dispatched is None:
            return
        metrics = {name: float(value) for name, value in jax.device_get(dispatched.metrics).items()}
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = self.journal.seconds_since_start
        if metrics["bad_steps"]:
            self.journal.message(f"step {dispatched.step}: loss or gradient is not finite; the state stays as it was")
        self.journal.train(dispatched.step, metrics)
        if metrics["bad_steps"] >= self.config.max_bad_steps:
            self._go_back(dispatched.step)

    def _flush(self) -> None:
        """Reads what is still out; before anything that refers to the present step."""
        dispatched, self.dispatched = self.dispatched, None
        self._read(dispatched)

    def _go_back(self, bad_step: int) -> None:
        restored = None if self.went_back else self.checkpoints.restore_latest(self.experiment.abstract)
        if restored is None:
            raise DivergedError(
                f"the loss was not finite for {self.config.max_bad_steps} steps in a row"
                + (
                    ", also after going back to a checkpoint"
                    if self.went_back
                    else ", with no checkpoint to go back to"
                ),
                f"step {bad_step}; the last checkpoint is kept in {self.workdir / 'checkpoints'}",
                "lower config.schedule.learning_rate, or add a config.schedule.warmup",
            )
        self.went_back, self.dispatched = True, None
        self.step, self.state = restored
        self.journal.message(f"going back to the checkpoint of step {self.step}, once")
        self.journal.restart(self.step)
        self._open_batches()

    # --- between the steps -------------------------------------------------------------------------------------------

    def _due(self, duration: str) -> bool:
        every = max(1, self.experiment.steps(duration))
        if self.step % every and self.step != self.experiment.total_steps:
            return False
        self._flush()
        return True

    def _save(self) -> None:
        self._flush()
        self.journal.sync()
        with self.journal.pause():
            self.checkpoints.save(self.step, self.state, self.dev_metrics)
        self.dev_metrics = {}

    def _stop(self) -> None:
        """Saves and ends the run, to be resumed."""
        self._save()
        self.checkpoints.wait()
        raise self.preemption.error(self.step, self.workdir)

    def _evaluate(self, split: str) -> tuple[dict[str, float], Predictions]:
        source = self.experiment.sources[split]

        def poll(batch):
            self._note_damaged(split, batch)
            if self.preemption.requested:
                self._stop()

        variables = self.state.all_variables()
        start = time.monotonic()
        with self.journal.pause(), contextlib.closing(iter(self.evaluation_batches[split])) as iterator:
            metrics, predictions = evaluate(
                self.evaluation_step,
                variables,
                iterator,
                len(source),
                to_devices=self._to_devices,
                poll=poll,
            )
        metrics["images_per_second"] = len(source) * len(variables) / (time.monotonic() - start)
        if self.damaged[split].indices:
            metrics["damaged"] = len(self.damaged[split].indices)
        return metrics, predictions

    def _evaluate_dev(self) -> None:
        if "dev" in self.experiment.sources and not self.journal.has(self.step, "dev"):
            self.dev_metrics, _ = self._evaluate("dev")
            self.journal.evaluation(self.step, "dev", self.dev_metrics)

    def _evaluate_test(self) -> Predictions:
        """Evaluates on the test split, once a run: what is in the journal is not measured again."""
        metrics, predictions = self._evaluate("test")
        if not self.journal.has(self.step, "test"):
            self.journal.evaluation(self.step, "test", metrics)
        if jax.process_index() == 0:
            save_predictions(self.workdir / "predictions_test.npz", predictions)
        return predictions
