"""Shows a study while it runs: a table of arms and seeds, and the remaining time."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from xception_jax.logs.console import format_count, format_duration
from xception_jax.names import LINE_LENGTH, printable
from xception_jax.study.cells import Cell, State, read_outcome, state_of
from xception_jax.study.controls import ArmCost
from xception_jax.study.design import Study
from xception_jax.study.runner import Runner

_SECONDS_BETWEEN_UPDATES = 1.0
_LEGEND = "development accuracy in %; x: failed with this exit code; -: stopped, will be resumed; .: waiting"


@dataclasses.dataclass(frozen=True)
class _End:
    """How a cell ended, if it did: its state, the text in the table, and the seconds that it took."""

    state: State
    text: str
    seconds: float


class ProgressTable:
    """Shows the progress of a study: a table that is redrawn on a terminal, one line for each ended cell elsewhere.

    It shows accuracies on the development split only, and of a study that states claims only those of the search. The
    test split is for the report.

    Args:
      study: the study.
      costs: by arm.
      cells: all cells of this phase, including those that ended in an earlier run.
      total_steps: number of steps of each cell, by its directory.
      jobs: number of processes that run at a time.
      later: number of cells in the phases after this one.
      stream: usually standard error.
      before: the cells of the phases before this one.
    """

    def __init__(
        self,
        study: Study,
        costs: Mapping[str, ArmCost],
        cells: Sequence[Cell],
        total_steps: Mapping[Path, int],
        jobs: int,
        later: int,
        stream: TextIO,
        before: Sequence[Cell] = (),
    ):
        self._before, self._done_before = len(before), sum(cell.state() == "done" for cell in before)
        self._study, self._costs, self._cells, self._total_steps = study, costs, cells, total_steps
        self._jobs, self._later, self._stream = jobs, later, stream
        self._terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._known: dict[Path, _End] = {}  # of cells that will not run again
        self._reported, self._lines, self._updated = 0, 0, -math.inf

    def show(self, runner: Runner) -> None:
        """Shows the current state of the runner."""
        if not self._terminal:
            for cell, code in runner.finished[self._reported :]:
                for line in (f"{cell.name}: {self._end_line(cell, code)}", self.headline(runner)):
                    self._write(f"{printable(line, LINE_LENGTH)}\n")
            self._reported = len(runner.finished)
            return
        now = time.monotonic()
        if now - self._updated >= _SECONDS_BETWEEN_UPDATES:
            self._updated = now
            lines = self.table(runner, shutil.get_terminal_size().lines - 1, shutil.get_terminal_size().columns - 1)
            self._write((f"\x1b[{self._lines}F\x1b[J" if self._lines else "") + "\n".join(lines) + "\n")
            self._lines = len(lines)

    def _end_line(self, cell: Cell, code: int) -> str:
        state = state_of(code)
        if state == "done":
            return "done"
        message = cell.record().get("message", "")
        return f"{state} with {code}{', will be resumed' if state == 'stopped' else ''}: {message}"

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a closed terminal does not end the study
            self._terminal, self._stream = False, io.StringIO()

    def headline(self, runner: Runner) -> str:
        """Returns one line with the number of cells in each state, over all phases, and the remaining time."""
        states = [self._end(cell).state for cell in self._cells]
        done, total = states.count("done"), len(self._cells)
        parts = [f"{self._study.name}: {self._done_before + done} of {self._before + total + self._later} cells done"]
        if self._before or self._later:
            parts[0] += f" ({'search' if self._later else 'after the search'}: {done} of {total})"
        parts += [f"{states.count('failed')} failed"] * ("failed" in states) + [f"{len(runner.running)} running"]
        left = self.seconds_left(runner)
        parts += [f"about {format_duration(left)} left" if math.isfinite(left) else "remaining time unknown"]
        return ", ".join(parts)

    def seconds_left(self, runner: Runner) -> float:
        """Estimates the time until all cells have ended, from those that have and from the steps of running ones."""
        took: dict[str, list[float]] = {}
        for cell in self._cells:
            end = self._end(cell)
            if end.state in ("done", "failed") and end.seconds:
                took.setdefault(cell.arm, []).append(end.seconds)
        expected = {arm: statistics.fmean(seconds) for arm, seconds in took.items()}
        progress = {running.cell.directory: self._share(running.cell) for running in runner.running}
        for running in runner.running:
            share, elapsed = progress[running.cell.directory], time.monotonic() - running.started
            if share > 0.02 and running.cell.arm not in expected:
                expected[running.cell.arm] = elapsed / share
        if not expected:
            return math.nan
        typical = statistics.fmean(expected.values())
        left = sum(expected.get(cell.arm, typical) for cell in runner.waiting) + self._later * typical
        for running in runner.running:
            left += expected.get(running.cell.arm, typical) * (1 - progress[running.cell.directory])
        return left / self._jobs

    def _share(self, cell: Cell) -> float:
        """Returns the share of its steps that a cell has done."""
        total = self._total_steps.get(cell.directory, 0)
        return min(read_outcome(cell, self._study.metric)["steps"] / total, 1.0) if total else 0.0

    def _end(self, cell: Cell) -> _End:
        if cell.directory not in self._known:
            record, state = cell.record(), cell.state()
            if state in ("waiting", "stopped"):  # it may still run
                return _End(state, "-" if state == "stopped" else ".", 0.0)
            if state == "failed":
                text = f"x {record['exit_code']}"
            elif self._study.claims and cell.trial is None:
                text = "done"
            else:
                accuracy = read_outcome(cell, self._study.metric)["dev_accuracy"]
                text = "done" if accuracy is None else f"{100 * accuracy:.1f}"
            self._known[cell.directory] = _End(state, text, record.get("seconds", 0.0))
        return self._known[cell.directory]

    def table(self, runner: Runner, height: int, width: int) -> list[str]:
        """Returns the lines of the table: a row for each arm, a column for each seed or trial.

        Args:
          runner: the runner.
          height: the largest number of lines. If the arms do not fit, only those with a running cell are shown.
          width: the largest number of characters in a line.
        """
        running = {r.cell.directory: f"{self._share(r.cell):.0%}" for r in runner.running}
        columns = list(dict.fromkeys(self._column(cell) for cell in self._cells))
        texts = {
            (cell.arm, self._column(cell)): running.get(cell.directory) or self._end(cell).text for cell in self._cells
        }
        arms = list(dict.fromkeys(cell.arm for cell in self._cells))
        name_width = max(map(len, arms))
        each = 1 + max(6, *map(len, columns))
        head = f"{'':{name_width}} {'parameters':>11} {'mult-adds':>9} " + "".join(f"{c:>{each}}" for c in columns)
        rows = []
        for arm in arms:
            cost = self._costs[arm]
            cells = "".join(f"{texts.get((arm, column), ''):>{each}}" for column in columns)
            row = f"{arm:{name_width}} {cost.parameters:>11,} {format_count(cost.multiply_adds):>9} {cells}"
            rows.append((any(r.cell.arm == arm for r in runner.running), row))
        if len(rows) > height - 3:
            rows = [entry for entry in rows if entry[0]][: max(height - 3, 1)]
        return [
            printable(line, LINE_LENGTH)[:width]
            for line in (self.headline(runner), head, *(row for _, row in rows), _LEGEND)
        ]

    def _column(self, cell: Cell) -> str:
        return f"seed {cell.seed}" if cell.trial is None else f"try {cell.trial}"
