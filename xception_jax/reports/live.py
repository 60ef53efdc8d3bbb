"""Marks the live report of a run when the run stops and when it resumes."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from xception_jax.files import write_atomically

STOPPED = "This run has stopped: run the same command to resume. This report shows its last evaluation."
# The notice of a live report, and the refresh in its head, as in run.html. A stopped report keeps both in a <template>,
# where they have no effect.
_LIVE = re.compile(rb"<!-- live -->(.*?)<!-- end of live -->", re.DOTALL)
_STOPPED = re.compile(rb"<!-- stopped -->.*?<template>(.*?)</template><!-- end of stopped -->", re.DOTALL)
_WRITTEN = re.compile(rb'(<p [^>]*id="live") data-written="[^"]*"(?: data-resumed="1")?')


@contextlib.contextmanager
def marked_when_stopped(workdir: str | os.PathLike[str], message: Callable[[str], None]) -> Iterator[None]:
    """Marks the live report as resumed at the start of the block, and as stopped if the block raises.

    Args:
      workdir: the work directory. A missing report, or that of a finished run, is left as it is.
      message: prints a line if the report could not be marked; nothing is raised.
    """
    _mark(mark_resumed, workdir, message)
    try:
        yield
    except BaseException:
        _mark(mark_stopped, workdir, message)
        raise


def _mark(
    mark: Callable[[str | os.PathLike[str]], None], workdir: str | os.PathLike[str], message: Callable[[str], None]
) -> None:
    try:
        mark(workdir)
    except OSError as error:
        message(f"the notice in the report was not updated: {type(error).__name__}: {error}")


def mark_stopped(workdir: str | os.PathLike[str]) -> None:
    """Replaces the notice of a live report: the run has stopped, and the page does not reload itself again.

    The report of a finished run, or a missing one, is left as it is.

    Args:
      workdir: the work directory.

    Raises:
      OSError: the report could not be read or written.
    """
    notice = f'<p class="notice" id="stopped">{STOPPED}</p>'.encode()

    def stop(block: re.Match[bytes]) -> bytes:
        shown = notice if b'id="live"' in block[1] else b""
        return b"<!-- stopped -->%s<template>%s</template><!-- end of stopped -->" % (shown, block[1])

    _rewrite(Path(workdir) / "report.html", lambda page: _LIVE.sub(stop, page))


def mark_resumed(workdir: str | os.PathLike[str]) -> None:
    """Restores the notice of a live report whose run has stopped or was killed: the run goes on.

    The report of a finished run, or a missing one, is left as it is.

    Args:
      workdir: the work directory.

    Raises:
      OSError: the report could not be read or written.
    """

    def resume(page: bytes) -> bytes:
        live = _STOPPED.sub(rb"<!-- live -->\1<!-- end of live -->", page)
        return _WRITTEN.sub(rb'\1 data-written="%.0f" data-resumed="1"' % time.time(), live, count=1)

    _rewrite(Path(workdir) / "report.html", resume)


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    if not path.exists():
        return
    page = path.read_bytes()
    changed = change(page)
    if changed != page:
        write_atomically(path, changed)
