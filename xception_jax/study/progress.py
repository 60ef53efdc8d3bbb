"""What a person sees of a study while it runs: a table of arms and seeds, and the time that is left."""

from __future__ import annotations

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
from xception_jax.study.cells import Cell, read_outcome
from xception_jax.study.controls import ArmCost
from xception_jax.study.design import Study
from xception_jax.study.runner import Runner

_SECONDS_BETWEEN_UPDATES = 1.0


class StudyProgress:
    """Shows the progress of a study: a table kept up to date on a terminal, a line for each end elsewhere.

    Accuracies are those on the development split: what comes out on the test split is for the report.

    Args:
      study: whose cells run.
      costs: by arm.
      cells: all of this phase, also those that were done before.
      total_steps: of each cell, by its directory.
      jobs: processes at a time.
      later: cells of a phase that comes after this one.
      stream: usually standard error.
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
    ):
        self._study, self._costs, self._cells, self._total_steps = study, costs, cells, total_steps
        self._jobs, self._later, self._stream = jobs, later, stream
        self._terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._known: dict[Path, tuple[str, float]] = {}  # what a cell that ended is shown as, and its seconds
        self._reported, self._lines, self._updated = 0, 0, -math.inf

    def show(self, runner: Runner) -> None:
        """Takes note of the runner's state and shows it."""
        if not self._terminal:
            for cell, code in runner.finished[self._reported :]:
                end = "done" if code == 0 else f"failed with {code}: {cell.record().get('message', '')}"
                self._write(f"{cell.name}: {end}\n{self.headline(runner)}\n")
            self._reported = len(runner.finished)
            return
        now = time.monotonic()
        if now - self._updated >= _SECONDS_BETWEEN_UPDATES:
            self._updated = now
            lines = self.table(runner, shutil.get_terminal_size().lines - 1, shutil.get_terminal_size().columns - 1)
            self._write((f"\x1b[{self._lines}F\x1b[J" if self._lines else "") + "\n".join(lines) + "\n")
            self._lines = len(lines)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # a closed terminal does not end the study
            self._terminal, self._stream = False, io.StringIO()

    def headline(self, runner: Runner) -> str:
        """Returns the one line that says how far the study is."""
        ends = [self._end(cell) for cell in self._cells]
        done = sum(end[0] != "" and not end[0].startswith("x") for end in ends)
        failed = sum(end[0].startswith("x") for end in ends)
        parts = [f"{self._study.name}: {done} of {len(self._cells)} cells done"]
        parts += [f"{failed} failed"] * bool(failed) + [f"{len(runner.running)} running"]
        left = self.seconds_left(runner)
        parts += [f"about {format_duration(left)} left" if math.isfinite(left) else "time left not known yet"]
        return ", ".join(parts)

    def seconds_left(self, runner: Runner) -> float:
        """Estimates the time until all cells have ended, from those that have, and from the steps of those that run."""
        took: dict[str, list[float]] = {}
        for cell in self._cells:
            text, seconds = self._end(cell)
            if text and seconds:
                took.setdefault(cell.arm, []).append(seconds)
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
        total = self._total_steps.get(cell.directory, 0)
        return min(read_outcome(cell, self._study.metric)["steps"] / total, 1.0) if total else 0.0

    def _end(self, cell: Cell) -> tuple[str, float]:
        """Returns how a cell that has ended is shown and its seconds; ('', 0) for one that has not."""
        if cell.directory not in self._known:
            record = cell.record()
            code = record.get("exit_code")
            if code is None or code in (75, 130):
                return "", 0.0
            accuracy = read_outcome(cell, self._study.metric)["dev_accuracy"]
            text = f"x {code}" if code else "done" if accuracy is None else f"{100 * accuracy:.1f}"
            self._known[cell.directory] = text, record.get("seconds", 0.0)
        return self._known[cell.directory]

    def table(self, runner: Runner, height: int, width: int) -> list[str]:
        """Returns the lines of the table: a row for each arm, a column for each seed (or trial)."""
        running = {r.cell.directory: f"{self._share(r.cell):.0%}" for r in runner.running}
        columns = list(dict.fromkeys(self._column(cell) for cell in self._cells))
        texts = {
            (cell.arm, self._column(cell)): running.get(cell.directory) or self._end(cell)[0] or "."
            for cell in self._cells
        }
        arms = list(dict.fromkeys(cell.arm for cell in self._cells))
        name_width = max(map(len, arms))
        head = f"{'':{name_width}} {'parameters':>11} {'mult-adds':>9} " + "".join(f"{c!s:>7}" for c in columns)
        rows = []
        for arm in arms:
            cost = self._costs[arm]
            cells = "".join(f"{texts.get((arm, column), ''):>7}" for column in columns)
            row = f"{arm:{name_width}} {cost.parameters:>11,} {format_count(cost.multiply_adds):>9} {cells}"
            # Where there is no room for all arms, those are shown in which something happens.
            rows.append((any(r.cell.arm == arm for r in runner.running), row))
        if len(rows) > height - 3:
            rows = [entry for entry in rows if entry[0]][: max(height - 3, 1)]
        note = "development accuracy in %; x: exit code of a failure; .: waiting"
        return [line[:width] for line in (self.headline(runner), head, *(row for _, row in rows), note)]

    def _column(self, cell: Cell) -> str:
        return f"seed {cell.seed}"[-6:] if cell.trial is None else f"try {cell.trial}"
