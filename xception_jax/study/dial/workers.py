"""Runs functions one after another in this process, or several at a time in processes with a share of the cores."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from typing import Any

from xception_jax.environment import usable_cores, use_cores
from xception_jax.errors import PreemptedError
from xception_jax.study.runner import Slot, make_slots, visible_gpus

Job = tuple[Any, Callable[[], Any]]
"""A name for a result, and the function that computes it."""
Run = Callable[[Iterable[Job]], Iterator[tuple[Any, Any]]]
"""Calls the functions of all jobs, and yields (name, result) as soon as each result is known."""


@contextlib.contextmanager
def open_workers(jobs: int) -> Iterator[Run]:
    """Starts `jobs` processes that divide cores and GPUs, or none for a single job. They end with this process.

    Raises:
      PreemptedError: one of the processes was killed.
    """
    if jobs == 1:
        yield _one_after_another
        return
    context = multiprocessing.get_context("spawn")
    shares = context.SimpleQueue()
    for slot in make_slots(jobs, usable_cores(), visible_gpus(os.environ)):
        shares.put(slot)
    with ProcessPoolExecutor(jobs, context, _start, (shares,)) as executor:
        try:
            yield functools.partial(_together, executor, jobs)
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                fix = "run the same command to resume, with fewer --jobs if memory was short"
                raise PreemptedError("a process that trained a cell was killed", "--jobs", fix) from None
            raise


def _one_after_another(jobs: Iterable[Job]) -> Iterator[tuple[Any, Any]]:
    for name, function in jobs:
        yield name, function()


def _together(executor: ProcessPoolExecutor, count: int, jobs: Iterable[Job]) -> Iterator[tuple[Any, Any]]:
    left, running = iter(jobs), dict[Future, Any]()
    while True:
        for name, function in itertools.islice(left, count - len(running)):
            running[executor.submit(function)] = name
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


def _start(shares: SimpleQueue[Slot]) -> None:
    """Prepares a worker, before JAX looks for devices."""
    slot = shares.get()
    os.environ.update(slot.environment)
    use_cores(slot.cores)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
