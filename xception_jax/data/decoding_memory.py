"""Bounds the memory of all images that are being decoded in this process."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator

SMALL = 1 << 20
"""Bytes up to which an amount is not counted: all threads together need little, and counting costs time."""


class DecodingMemory:
    """Counts the bytes that threads use. A thread waits until its amount is free, in the order of arrival.

    An amount above the limit is granted when nothing else is in use, so every image is decoded in the end. A thread
    that holds an amount must not ask for another one: it could wait for itself.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: collections.deque[object] = collections.deque()
        self.used = 0

    @contextlib.contextmanager
    def reserve(self, amount: int, limit: int) -> Iterator[None]:
        """Waits until `used` + amount is within the limit, or `used` is 0, and uses the amount inside the block."""
        if amount <= SMALL:
            yield
            return
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket and self._fits(amount, limit))
                self.used += amount
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()  # the next in the queue may fit as well
        try:
            yield
        finally:
            with self._changed:
                self.used -= amount
                self._changed.notify_all()

    def _fits(self, amount: int, limit: int) -> bool:
        return not self.used or self.used + amount <= limit


DECODING = DecodingMemory()
"""The memory of this process. Training, evaluation and previews share it, as they share the machine."""
