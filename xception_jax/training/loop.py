"""The training loop: steps, evaluations and saves of a run, until it ends or is asked to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING

import jax
import numpy as np

from xception_jax.data.pipeline import Batch, DamagedImages, EvaluationBatches, train_batches
from xception_jax.errors import DivergedError
from xception_jax.evaluation.evaluate import evaluate, make_evaluation_step
from xception_jax.logs import goodput
from xception_jax.logs.console import announce
from xception_jax.logs.profile import StepTrace
from xception_jax.metrics import metrics_of
from xception_jax.metrics.predictions import Predictions, save_predictions
from xception_jax.parallel import DeviceBatch, batch_sharding, device_memory_errors, to_devices
from xception_jax.training.checkpoint import Checkpoints
from xception_jax.training.experiment import Experiment, step_memory_errors
from xception_jax.training.feed import Feed, polled
from xception_jax.training.fingerprint import state_fingerprint
from xception_jax.training.journal import Journal, print_once
from xception_jax.training.preemption import Preemption
from xception_jax.training.run_directory import RunDirectory
from xception_jax.training.state import DROPOUT, TrainState, seed_bits

if TYPE_CHECKING:
    from xception_jax.training.summary import Summary


# A live report is written after an evaluation, but not in the first seconds of a run, and not so often that it takes
# more than this share of the time.
FIRST_LIVE_REPORT, MAX_LIVE_SHARE = 20.0, 0.05


@dataclasses.dataclass
class _Dispatched:
    """A step that the devices may still be computing: its number, starting at 1, and its metrics."""

    step: int
    metrics: dict[str, jax.Array]


class Loop:
    """Runs training steps, evaluations and saves.

    What is due at a step depends only on the step and the journal, so a resumed run does the same as an uninterrupted
    one.
    """

    def __init__(
        self,
        experiment: Experiment,
        directory: RunDirectory,
        checkpoints: Checkpoints,
        journal: Journal,
        preemption: Preemption,
    ):
        self.experiment, self.directory, self.config = experiment, directory, experiment.config
        self.checkpoints, self.journal, self.preemption = checkpoints, journal, preemption
        self.metrics = metrics_of(self.config)
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
        self.step = 0
        self.state: TrainState = experiment.abstract
        self.feed: Feed | None = None
        self.trace: StepTrace | None = None
        self.dispatched: _Dispatched | None = None
        self.dev_metrics: dict[str, float] = {}  # of the current state; saved with the next checkpoint
        self.dev_predictions: Predictions | None = None  # of the final state: the report chooses thresholds on them
        self.seconds_to_first_step: float | None = None
        self.next_live_report = FIRST_LIVE_REPORT

    def run(self, step: int, state: TrainState) -> Summary:
        """Trains from `step` to the end of the run, evaluates on the test split and writes the report."""
        self.step, self.state = step, state
        every, total = self.experiment.every, self.experiment.total_steps
        evaluation, checkpoint = every(self.config.evaluation.every), every(self.config.checkpoint.every)
        trains = step < total
        if trains:
            self._open_feed()  # batches load while the step compiles
            with announce("compiling the training step, which can take a minute", print_once):
                train_step = self.experiment.compile_step()
            dropout = self.experiment.replicate(seed_bits(self.config.seed, DROPOUT))
            trace = self.trace = StepTrace(
                self.directory.files / "profile",
                self.config.profile,
                train_step.as_text,
                self.journal.message,
                self.journal.stopwatch,
            )
        doing = self.journal.stopwatch.during
        with self.preemption.deferred(), doing(goodput.STEPS):  # until the state is saved
            while True:
                if self._is_due(evaluation):
                    self._flush()
                    with doing(goodput.EVALUATION):
                        self._evaluate_dev()
                if self.step >= total:
                    break
                if self._is_due(checkpoint):
                    self._save()
                batch = self._next_batch()
                if self.preemption.should_stop():
                    self._stop()
                before, self.dispatched = self.dispatched, None
                trace.before_step(self.state)
                with step_memory_errors(self.config):
                    self.state, metrics = train_step(self.state, batch, dropout)
                self.step += 1
                self.dev_metrics = {}
                self.dispatched = _Dispatched(self.step, metrics)
                # Read the previous metrics only after dispatching this step, so that the devices always have work.
                self._read(before)
                self.checkpoints.poll()
            if trains:
                trace.end(self.state)
            self._save(wait=True)
        predictions = self._evaluate_test() if "test" in self.experiment.sources else None
        fingerprint = state_fingerprint(self.state)
        from xception_jax.training.summary import summarize_run  # imports matplotlib, see _evaluate_dev

        with announce("writing the report", print_once), doing(goodput.EVALUATION), self.preemption.ending():
            return summarize_run(
                self.experiment,
                self.directory,
                self.journal,
                self.dev_predictions,
                predictions,
                self.state.eval_variables,
                fingerprint=fingerprint,
                seconds_to_first_step=self.seconds_to_first_step,
            )

    def close(self) -> None:
        """Stops the threads that load batches, and a trace that was interrupted."""
        if self.feed is not None:
            self.feed.close()
        if self.trace is not None:
            self.trace.close()

    # --- the steps ---------------------------------------------------------------------------------------------------

    def _open_feed(self) -> None:
        if self.feed is not None:
            self.feed.close()
        batches = train_batches(
            self.config.data,
            self.experiment.sources["train"],
            batch_size=self.config.batch_size // jax.process_count(),
            seed=self.config.seed,
            start_step=self.step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.feed = Feed(batches, self._to_devices)

    def _to_devices(self, batch: Batch) -> DeviceBatch:
        return to_devices(batch, batch_sharding(self.experiment.mesh))

    def _next_batch(self) -> DeviceBatch:
        """Waits for the next batch, or until a signal arrives."""
        assert self.feed is not None
        with step_memory_errors(self.config), self.journal.waiting():
            batch, on_devices = self.feed.next(self._stop_if_requested)
        self._note_damaged("train", batch)
        if batch["image"].ndim == 4 and self.step % self.experiment.every(self.config.evaluation.every) == 0:
            self.journal.images(self.step, batch["image"])
        return on_devices

    def _note_damaged(self, split: str, batch: Batch) -> None:
        for line in self.damaged[split].add(batch):
            self.journal.message(line)

    def _read(self, dispatched: _Dispatched | None) -> None:
        """Records the metrics of a step. Goes back to a checkpoint after too many consecutive bad steps."""
        if dispatched is None:
            return
        with step_memory_errors(self.config):  # the devices may have come to it only now
            metrics = {name: float(value) for name, value in jax.device_get(dispatched.metrics).items()}
        if self.seconds_to_first_step is None:
            self.seconds_to_first_step = self.journal.seconds_since_start
        if metrics["bad_steps"]:
            self.journal.message(f"step {dispatched.step}: loss or gradient is not finite; the update is skipped")
        self.journal.train(dispatched.step, metrics)
        if metrics["bad_steps"] >= self.config.max_bad_steps:
            self._recover(dispatched.step, dispatched.step - int(metrics["bad_steps"]))

    def _flush(self) -> None:
        """Reads pending metrics, which may replace the state by a checkpoint. Call it before using the state."""
        dispatched, self.dispatched = self.dispatched, None
        self._read(dispatched)

    def _recover(self, bad_step: int, last_good: int) -> None:
        """Goes back to a regular checkpoint before `last_good` and skips the batches up to `bad_step`, once per run.

        The update of step `last_good` may be the one that no loss is finite after, and later steps have the same
        parameters. The same batches would lead to the same divergence. The steps in between count as skipped, so the
        position in the data still depends only on the step, and an interrupted run recovers in the same way.
        """
        has_recovered, restored = self.journal.has_recovered(), None
        if not has_recovered:
            with self.journal.stopwatch.during(goodput.START):
                restored = self.checkpoints.restore_latest(self.experiment.abstract, regular=True, below=last_good)
        if restored is None:
            what = f"and there is no checkpoint of config.checkpoint.every before step {last_good}"
            fix = "lower config.schedule.learning_rate, or add a config.schedule.warmup"
            # A run that resumes from the parameters that no loss is finite with ends in the same way.
            self.checkpoints.wait()
            if broken := [str(step) for step in self.checkpoints.steps() if step >= last_good]:
                fix += f"; delete the checkpoints {', '.join(broken)} first, which are of parameters that diverged"
            raise DivergedError(
                f"the loss was not finite for {self.config.max_bad_steps} steps in a row, "
                + ("also after a recovery" if has_recovered else what),
                f"step {bad_step}; the checkpoints are in {self.directory.checkpoints}",
                fix,
            )
        restored_step, state = restored
        skipped = int(jax.device_get(state.skipped_steps)) + bad_step - restored_step
        counters = {"step": bad_step, "skipped_steps": skipped, "bad_steps": 0}
        self.state = state.replace(**{name: self.experiment.replicate(np.int32(n)) for name, n in counters.items()})
        self.step, self.dispatched, self.dev_metrics = bad_step, None, {}
        self.journal.recovery(bad_step, restored_step)
        self._open_feed()

    # --- between the steps -------------------------------------------------------------------------------------------

    def _is_due(self, every: int) -> bool:
        """Returns whether an event that happens every `every` steps, and at the last step, is due now."""
        return self.step > 0 and (self.step % every == 0 or self.step == self.experiment.total_steps)

    def _save(self, *, wait: bool = False) -> None:
        self._flush()
        with self.journal.pause(goodput.SAVING):
            self.journal.sync()
            last_good = self.step - int(jax.device_get(self.state.bad_steps))
            self.checkpoints.save(self.step, self.state, self.dev_metrics, last_good=last_good)
            if wait:
                self.checkpoints.wait()
        self.dev_metrics = {}

    def _stop_if_requested(self) -> None:
        if self.preemption.requested:
            self._stop()

    def _stop(self) -> None:
        """Saves a checkpoint and ends the run with a PreemptedError."""
        self._save(wait=True)
        raise self.preemption.error(self.step, self.directory.shown)

    def _evaluate(self, split: str) -> tuple[dict[str, float], Predictions]:
        source = self.experiment.sources[split]

        def poll(batch: Batch) -> None:
            self._note_damaged(split, batch)
            if self.preemption.should_stop():
                self._stop()

        variables = self.state.all_variables()
        start = time.monotonic()
        announced = announce(f"evaluating on {split}: {len(source):,} images", print_once)
        batches = self.evaluation_batches[split]
        size = self.config.evaluation.batch_size
        fits = device_memory_errors("an evaluation batch", f"config.evaluation.batch_size={size}", "lower it")
        with announced, self.journal.pause(goodput.EVALUATION), contextlib.closing(iter(batches)) as iterator, fits:
            metrics, predictions = evaluate(
                self.evaluation_step,
                self.metrics,
                variables,
                polled(iterator, len(batches), self._stop_if_requested),
                len(source),
                to_devices=self._to_devices,
                poll=poll,
            )
        metrics["images_per_second"] = len(source) / (time.monotonic() - start)
        self.damaged[split].check(int(metrics["damaged"]))  # those of all hosts
        if not metrics["damaged"]:
            del metrics["damaged"]
        if (groups := source.column("group")) is not None:
            metrics["groups"] = len(set(groups))
        return metrics, predictions

    def _evaluate_dev(self) -> None:
        if "dev" not in self.experiment.sources:
            return
        is_new, is_last = not self.journal.has(self.step, "dev"), self.step == self.experiment.total_steps
        if not is_new and not is_last:
            return
        # A finished run that is started again evaluates again, for its report. The journal keeps the first result.
        metrics, predictions = self._evaluate("dev")
        if is_new:
            self.dev_metrics = metrics
            self.journal.evaluation(self.step, "dev", metrics)
            self.checkpoints.score(self.step, metrics)  # a stopped run may have saved this step without its metrics
            if self.config.logs.histograms:
                self.journal.histograms(self.step, self.state.params)
        if is_last:
            self.dev_predictions = predictions
            return
        if self.journal.seconds_since_start < self.next_live_report:
            return
        from xception_jax.training.summary import write_live_report  # imports matplotlib, which takes a second

        started = self.journal.seconds_since_start
        with self.journal.pause(goodput.EVALUATION):
            write_live_report(
                self.experiment,
                self.directory.files,
                self.journal,
                predictions,
                seconds_to_first_step=self.seconds_to_first_step,
            )
        now = self.journal.seconds_since_start
        self.next_live_report = now + (now - started) / MAX_LIVE_SHARE

    def _evaluate_test(self) -> Predictions:
        """Evaluates on the test split and saves the predictions. The journal keeps the first result."""
        metrics, predictions = self._evaluate("test")
        if not self.journal.has(self.step, "test"):
            self.journal.evaluation(self.step, "test", metrics)
        if jax.process_index() == 0:
            save_predictions(self.directory.files / "predictions_test.npz", predictions)
        return predictions
