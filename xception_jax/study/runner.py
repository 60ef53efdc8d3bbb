"""Runs the cells of a study, each in its own process and a few at a time, until none is left."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from xception_jax.errors import SUCCESS_EXIT_CODE, PreemptedError, StorageError, WorkdirError
from xception_jax.study.cells import LOG, Cell, state_of

ATTEMPTS = 3  # of a cell that is preempted or killed
_POLL_SECONDS = 0.25


@dataclasses.dataclass
class Slot:
    """The resources of one process at a time.

    Attributes:
      cores: CPU cores.
      environment: variables that give the process its share of the GPUs.
    """

    cores: tuple[int, ...]
    environment: dict[str, str]


def make_slots(jobs: int, cores: Sequence[int], gpus: Sequence[str]) -> list[Slot]:
    """Divides cores and GPUs among `jobs` processes. If there are more processes than GPUs, they share GPU memory."""
    slots = []
    for job in range(jobs):
        own_cores = tuple(cores[job::jobs]) if jobs <= len(cores) else (cores[job % len(cores)],)
        environment = {}
        if gpus:
            own_gpus = gpus[job::jobs] if jobs <= len(gpus) else [gpus[job % len(gpus)]]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own_gpus)
            if jobs > len(gpus):
                on_each = -(-jobs // len(gpus))
                environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / on_each:.2f}"
        slots.append(Slot(own_cores, environment))
    return slots


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the NVIDIA GPUs that a process may use, without initialising any of them."""
    if (given := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in given.split(",") if gpu]
    if environment.get("JAX_PLATFORMS", "").startswith("cpu") or shutil.which("nvidia-smi") is None:
        return []
    found = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return sorted(match[1] for match in found if match)


@dataclasses.dataclass
class Running:
    """A cell whose process is running.

    Attributes:
      cell: the cell.
      slot: the resources of its process.
      process: the process.
      started: when it was started, by `time.monotonic`.
    """

    cell: Cell
    slot: Slot
    process: subprocess.Popen
    started: float


class Runner:
    """Runs cells until none is left. Nothing is lost if it dies, because every result is in `Cell.record`.

    Args:
      cells: the cells to run, in this order.
      slots: each runs one process at a time.
      environment: environment of the cells' processes.
      show: called repeatedly with the runner, to show its progress.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        slots: Sequence[Slot],
        environment: Mapping[str, str],
        show: Callable[[Runner], None],
    ):
        self.waiting, self.running = list(cells), list[Running]()
        self.finished: list[tuple[Cell, int]] = []
        self._free, self._environment, self._show = list(slots), environment, show
        self._attempts: dict[Path, int] = {}
        self._stop: signal.Signals | None = None

    def run(self) -> None:
        """Runs until every cell has ended. The exit codes are in `finished` and in the cells' records.

        Raises:
          PreemptedError: on SIGTERM or SIGINT, after the cells have saved their state and stopped.
          StorageError: a record could not be written.
        """
        signals = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            while self.running or (self.waiting and self._stop is None):
                self._collect()
                while self._free and self._stop is None and self._start_next():
                    pass
                self._show(self)
                time.sleep(_POLL_SECONDS)
        except OSError as error:
            raise StorageError(
                f"cannot write the study directory: {error.strerror}",
                str(error.filename),
                "free some space, then run the same command again",
            ) from error
        finally:
            for running in self.running:  # only after an error of the runner itself
                running.process.terminate()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self._stop is not None:
            raise PreemptedError(
                f"stopped by {self._stop.name}; running cells were saved, {len(self.waiting)} cells are left",
                "the study",
                "run the same command again to continue",
            )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = signal.Signals(number)
        for running in self.running:
            running.process.terminate()  # cells end at once on their second signal, and so on the runner's second

    def _start_next(self) -> bool:
        """Starts the first waiting cell that no other process is training; returns whether there was one."""
        for position, cell in enumerate(self.waiting):
            if cell.is_held():
                continue
            del self.waiting[position]
            slot = self._free.pop(0)
            cell.prepare()
            command = [sys.executable, "-m", "xception_jax.study.train_cell", str(cell.directory)]
            command += ["--cores", ",".join(map(str, slot.cores)), "--end-with-stdin"]
            command += ["--activations"] if cell.activations else []
            with open(cell.directory / LOG, "ab") as log:
                process = subprocess.Popen(
                    command,
                    env={**self._environment, **slot.environment},
                    stdin=subprocess.PIPE,  # never written to; it closes when this process dies
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches only the runner, which then stops the cells
                )
            self.running.append(Running(cell, slot, process, time.monotonic()))
            if self._stop is not None:  # the signal came while it was started
                process.terminate()
            return True
        return False

    def _collect(self) -> None:
        for running in list(self.running):
            try:
                pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
            except ChildProcessError:  # `terminate` has waited for it
                code, cpu_seconds = running.process.wait(), 0.0
            else:
                if not pid:
                    continue
                code = running.process.returncode = os.waitstatus_to_exitcode(status)
                cpu_seconds = usage.ru_utime + usage.ru_stime
            self.running.remove(running)
            running.process.communicate()  # closes the pipe
            self._free.append(running.slot)
            self._note(running, code, cpu_seconds)

    def _note(self, running: Running, code: int, cpu_seconds: float) -> None:
        cell = running.cell
        if code == WorkdirError.exit_code and cell.is_held():  # by a process of an earlier runner that is still saving
            self.waiting.append(cell)
            return
        attempts = self._attempts[cell.directory] = self._attempts.get(cell.directory, 0) + 1
        record = cell.record()
        cell.write_record(
            exit_code=code,
            seconds=round(record.get("seconds", 0.0) + time.monotonic() - running.started, 1),
            cpu_seconds=round(record.get("cpu_seconds", 0.0) + cpu_seconds, 1),
            attempts=record.get("attempts", 0) + 1,
            config_hash=cell.config_hash,
            message="" if code == SUCCESS_EXIT_CODE else last_error(cell.directory / LOG),
        )
        if state_of(code) == "stopped" and (attempts < ATTEMPTS or self._stop is not None):
            self.waiting.insert(0, cell)
        else:
            self.finished.append((cell, code))


def last_error(log: Path) -> str:
    """Returns the last error in a cell's log (three lines), or the last line if there is none."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    starts = [number for number, line in enumerate(lines) if line.startswith(("error: ", "stopped by "))]
    return " ".join(lines[starts[-1] : starts[-1] + 3]) if starts else (lines[-1] if lines else "")
