"""Shows the progress of long work: a bar in a terminal, otherwise a line twice a minute."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

from xception_jax.logs.console import format_duration

_SECONDS = 30.0  # between two lines


class Progress:
    """Context manager that counts images, in any thread, on standard error.

    Args:
      what: the work, such as 'imagenet2012 train, reading'.
      total: number of images of the whole work, if it is known.
      show: whether to show anything.
    """

    def __init__(self, what: str, total: int | None, *, show: bool):
        self._what, self._total, self._show = what, total, show
        self._lock = threading.Lock()
        self._done, self._began = 0, time.monotonic()
        self._last = self._began
        self._bar = tqdm(desc=what, total=total, unit="img", disable=None if show else True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, count: int = 1) -> None:
        """Counts images that are done."""
        with self._lock:
            self._done += count
            self._bar.update(count)
            now = time.monotonic()
            if not self._show or not self._bar.disable or now - self._last < _SECONDS:
                return
            self._last = now
            line = f"{self._what}: {self._done:,} images"
            if self._total:
                left = (self._total - self._done) * (now - self._began) / self._done
                line = f"{self._what}: {self._done:,} of {self._total:,} images, about {format_duration(left)} left"
            print(line, file=sys.stderr, flush=True)
