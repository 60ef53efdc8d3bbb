"""Ends a run after the current step when SIGTERM or SIGINT arrives, together with all other processes of the run."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from xception_jax.errors import PreemptedError
from xception_jax.signals import ONE_REQUEST_SECONDS, SIGNALS, StopSignals

__all__ = ["ONE_REQUEST_SECONDS", "SIGNALS", "Preemption"]


class Preemption(StopSignals):
    """Context manager that turns SIGTERM and SIGINT into a request to stop.

    Inside of `deferred()`, the loop calls `should_stop(step)` once after each step. If this is True, the loop saves and
    raises `error(step)`. Outside of it, all trained steps are saved, and the first signal ends the run at once.

    With several processes, a signal to one of them stops all of them after the same step: the distributed runtime of
    JAX has its own SIGTERM handler, which notifies the others. This context calls that handler, so
    `jax.distributed.initialize()` must run first. No process may then end before the others have agreed, so that the
    first signal never ends one at once.

    Args:
      report: called with one line that acknowledges the first signal, from another thread.
      where: the work directory, for the message.
    """

    def __init__(self, report: Callable[[str], None] = print, where: str = ""):
        super().__init__(report, where)
        self._agreed = False  # among all processes
        self._distributed = jax.distributed.is_initialized()

    @property
    def requested(self) -> bool:
        """Whether to stop now. Cheap enough to check at every batch of an evaluation, or while waiting for input.

        With several processes, it stays False until `should_stop` has agreed on the step at which all of them stop. If
        one process left the loop earlier, the others would wait for it in a collective.
        """
        return self._agreed if self._distributed else super().requested

    def should_stop(self, step: int) -> bool:
        """Returns whether the run must end after this step.

        Args:
          step: the step that was just dispatched. Every process must ask for every step, in order: JAX answers yes only
            for one step, the first that no process had reached when the signal arrived.
        """
        if self._distributed and not self._agreed:
            self._agreed = multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def error(self, step: int, workdir: str | os.PathLike) -> PreemptedError:
        """Returns the error to raise after the checkpoint of `step` has been written."""
        cause = self._signal.name if self._signal else "a signal to another process"
        return PreemptedError(
            f"stopped by {cause} after step {step}, which is saved", str(workdir), "run the same command to resume"
        )

    @property
    def _immediate(self) -> bool:
        return super()._immediate and not self._distributed

    def _on_signal(self, signum: int, frame: object) -> None:
        handler = self._foreign_handlers[signal.SIGTERM]
        if self._signal is None and self._distributed and handler is not None:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)(signal.SIGTERM)
        super()._on_signal(signum, frame)
