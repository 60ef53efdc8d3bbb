"""Loads the next batch and transfers it to the devices while a step runs."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator
from typing import TypeVar

from xception_jax.data.pipeline import Batch, BatchIterator
from xception_jax.parallel import DeviceBatch

_POLL_SECONDS = 0.5
T = TypeVar("T")


class Feed:
    """Fetches one batch ahead in a background thread.

    Args:
      batches: batches of this process, closed together with the feed.
      to_devices: builds a global batch from the local batches of all processes.
    """

    def __init__(self, batches: BatchIterator, to_devices: Callable[[Batch], DeviceBatch]):
        self._batches, self._to_devices = batches, to_devices
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="fetch")
        self._next = self._thread.submit(self._fetch)

    def _fetch(self) -> tuple[Batch, DeviceBatch]:
        batch = next(self._batches)
        return batch, self._to_devices({name: batch[name] for name in ("image", "label")})

    def next(self, poll: Callable[[], None]) -> tuple[Batch, DeviceBatch]:
        """Waits for the next batch.

        Args:
          poll: called about twice a second while waiting. An exception that it raises ends the wait.

        Returns:
          The batch of this process, and the global batch (images and labels) on the devices.
        """
        batch, on_devices = _result(self._next, poll)
        self._next = self._thread.submit(self._fetch)
        return batch, on_devices

    def close(self) -> None:
        """Stops the threads that load batches, or leaves them behind if they are stuck."""
        self._batches.close()
        self._thread.shutdown(wait=False, cancel_futures=True)


def polled(batches: Iterator[Batch], count: int, poll: Callable[[], None]) -> Iterator[Batch]:
    """Yields the batches of an evaluation.

    Args:
      batches: batches of this process.
      count: how many there are. After the last one it does not poll: one process would stop at this point while others
        have left it.
      poll: see `Feed.next`.
    """
    thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="fetch")
    try:
        for _ in range(count):
            yield _result(thread.submit(next, batches), poll)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)


def _result(future: concurrent.futures.Future[T], poll: Callable[[], None]) -> T:
    while not concurrent.futures.wait([future], _POLL_SECONDS).done:
        poll()
    return future.result()
