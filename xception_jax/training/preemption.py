"""Ends a run after the current step when SIGTERM or SIGINT arrives, together with all other processes of the run."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import jax

from xception_jax.errors import PreemptedError
from xception_jax.processes import gather
from xception_jax.signals import StopRequested, StopSignals
from xception_jax.training.stop_point import StopPoint

_SECONDS_FOR_THE_OTHERS = 1.0  # process 0 ends last, because the others need its store


class Preemption(StopSignals):
    """Context manager that turns SIGTERM and SIGINT into a request to stop.

    Inside of `deferred()`, the loop calls `should_stop()` before each step and each batch of an evaluation. If this is
    True, the loop saves and raises `error(step)`. Outside of it, all trained steps are saved, and the first signal ends
    the run at once.

    With several processes, a signal to one of them stops all of them at the same point, see `StopPoint`. No process may
    end before the others have agreed, so the first signal never ends one at once.

    Args:
      report: called with one line that acknowledges the first signal, from another thread.
      where: the work directory, for the message.
    """

    def __init__(self, report: Callable[[str], None] = print, where: str = ""):
        super().__init__(self._acknowledge, where)
        self._report_line = report
        self._ending = False
        self._point = StopPoint(self._agreed) if jax.distributed.is_initialized() else None

    def __exit__(self, *error: object) -> None:
        """Restores the previous handlers."""
        if self._point is not None:
            self._point.close()
        super().__exit__(*error)

    @property
    def requested(self) -> bool:
        """Whether to stop now. Cheap enough to check while waiting for input.

        With several processes, it stays False until all of them have agreed to stop at the next point.
        """
        return super().requested if self._point is None else self._point.is_next

    def should_stop(self) -> bool:
        """Returns whether the run must end now. Every process must ask as often, and in the same order."""
        return super().requested if self._point is None else self._point.stops()

    def error(self, step: int, workdir: str | os.PathLike) -> PreemptedError:
        """Returns the error to raise after the checkpoint of `step` has been written."""
        return PreemptedError(
            f"stopped by {self._cause} after step {step}, which is saved",
            str(workdir),
            "run the same command to resume",
        )

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Context of what follows the last point, such as the report: the processes do not need each other in it.

        With several processes, a signal to one of them ends all of them at once. At its end, they wait for each other.

        Raises:
          StopRequested: a stop was requested.
        """
        if self._point is None:
            yield
            return
        stops = self._point.stops()
        self._ending = True  # before the question whether there is a request, see `_agreed`
        if stops or self._point.is_next:
            raise StopRequested(self._cause)
        yield
        if not self._point.is_next:
            gather("the end", "")
        if self._point.is_next:
            raise StopRequested(self._cause)

    @property
    def _cause(self) -> str:
        return self._signal.name if self._signal else self._acknowledged or "a signal to another process"

    @property
    def _immediate(self) -> bool:
        return super()._immediate and self._point is None

    def _acknowledge(self, line: str) -> None:
        self._report_line(line)
        if self._point is not None:
            self._point.request()

    def _agreed(self) -> None:
        """Ends this process if there is nothing to save, in this process and all others."""
        assert self._point is not None
        nothing_trained = self._point.is_before_all
        if self._owns_process and (nothing_trained or self._ending):
            with contextlib.suppress(OSError):
                os.write(2, f"{StopRequested(self._cause).as_error(self._where)}\n".encode())
            if jax.process_index() == 0:
                time.sleep(_SECONDS_FOR_THE_OTHERS)
            os._exit(PreemptedError.exit_code)
