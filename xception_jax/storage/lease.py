"""Holds a directory in a bucket for one run: the lock of stores that have no locks.

The lease is an object that names its owner. The owner rewrites it every few seconds, each time on the condition that
nobody else has. Another run may take it over when it has stood still for a while. No clocks are compared: the other run
watches for that time itself.

A process that has ended on this machine cannot renew, so its lease is taken over at once.

This is weaker than a lock. An owner that was frozen still runs when it wakes up, and notices the loss only when it next
renews. It therefore has to renew before each commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import pathlib
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from xception_jax.errors import StorageError, UserError, WorkdirError
from xception_jax.storage.store import ABSENT, Entry, Store

log = logging.getLogger(__name__)

RENEW_EVERY = 5.0
"""Seconds between two renewals. Google Cloud Storage allows one write of an object per second."""
PROVES_FOR = 1.0
"""Seconds after a renewal in which `prove` does not renew again."""
TAKE_OVER_AFTER = 45.0
"""Seconds that a lease must stand still while it is watched, before another run takes it over."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """Names a process: no two have the same nonce, even if a host restarts.

    `machine` identifies the system in which the number of the process has a meaning, and `started` tells the process
    from a later one with the same number. Both are empty where Linux's /proc is missing.
    """

    host: str
    pid: int
    nonce: str
    since: str
    command: str
    machine: str
    started: str

    @classmethod
    def this_process(cls) -> Owner:
        """Returns a new name of this process."""
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        pid, command = os.getpid(), shlex.join(sys.orig_argv)
        return cls(socket.gethostname(), pid, secrets.token_hex(8), since, command, _machine(), _started(pid) or "")


class Lease:
    """A lease that this process owns. Use `hold` to get one.

    Args:
      store: where the lease is.
      name: the object.
      owner: this process.
      generation: that of the object.
    """

    def __init__(self, store: Store, name: str, owner: Owner, generation: bytes) -> None:
        self.owner = owner
        self._store, self._name, self._generation = store, name, generation
        self._renewals = 0
        self._proved_at = time.monotonic()
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    @property
    def lost(self) -> bool:
        """Whether another run is known to have taken over. Takes no time."""
        return self._lost is not None

    @property
    def ended(self) -> bool:
        """Whether the renewals have ended."""
        return self._ended.is_set()

    def renew(self) -> None:
        """Proves that this process still owns the lease. Must be called before each commit.

        Raises:
          WorkdirError: another run has taken over. Nothing may be written any more.
          StorageError: the store does not answer, so nobody knows.
        """
        with self._lock:
            self._write(released=False)

    def prove(self) -> None:
        """Does the same as `renew`, unless this process has just renewed: an object takes one write per second."""
        if self.lost or time.monotonic() - self._proved_at > PROVES_FOR:
            self.renew()

    def release(self) -> None:
        """Lets another run begin at once. Does nothing if the lease is lost.

        Raises:
          StorageError: the store does not answer. Another run has to wait until it may take over.
        """
        self.abandon()
        with self._lock, contextlib.suppress(WorkdirError):
            self._write(released=True)

    def abandon(self) -> None:
        """Ends the renewals without a release. Another run has to wait until it may take over."""
        self._ended.set()

    def renew_until_released(self, every: float) -> None:
        """Renews every few seconds. Failures are logged once, and tried again: only `renew` raises them."""
        warned = False
        while not self._ended.wait(every):
            try:
                with self._lock:
                    if self._ended.is_set():
                        return
                    self._write(released=False)
                warned = False
            except UserError as error:
                if self.lost:
                    return
                if not warned:
                    log.warning("the lease could not be renewed; this is tried again\n%s", error)
                warned = True

    def _write(self, *, released: bool) -> None:
        while self._lost is None:
            self._renewals += 1
            began = time.monotonic()
            content = _encode(self.owner, self._renewals, released)
            generation = _put_if(self._store, self._name, content, self._generation)
            if generation is not None:
                self._generation, self._proved_at = generation, began
                return
            entry = self._store.entry(self._name)
            if _decode(entry).get("nonce") == self.owner.nonce:
                # An earlier write, for which the answer took too long, arrived after all. Nobody else can have made it.
                self._generation = entry.generation
            else:
                self._lost = _describe(entry)
        raise WorkdirError(
            "another run has taken over the work directory, because this one did not renew its lease in time",
            f"{self._store.root}: {self._lost}",
            "let the other run go on, or stop it and start again; what this run last reported as saved is kept",
        )


@contextlib.contextmanager
def hold(
    store: Store,
    name: str,
    *,
    renew_every: float = RENEW_EVERY,
    take_over_after: float = TAKE_OVER_AFTER,
    report: Callable[[str], None] = print,
) -> Iterator[Lease]:
    """Acquires a lease, renews it in the background, and releases it at the end.

    It is not released if the exception says that the store does not answer, because that takes a while.

    Args:
      store: where the lease is kept.
      name: the object.
      renew_every: seconds between two renewals.
      take_over_after: seconds that the lease of another process must stand still before it is taken over. Longer than
        several renewals.
      report: called with one line before waiting, and with one when a lease is taken over.

    Yields:
      The lease. Call `renew` before each commit.

    Raises:
      WorkdirError: another run renews the lease, or was faster.
      StorageError: the store does not answer.
    """
    owner = Owner.this_process()
    content = _encode(owner, 0, released=False)
    generation = _acquire(store, name, content, renew_every, take_over_after, report)
    lease = Lease(store, name, owner, generation)
    thread = threading.Thread(target=lease.renew_until_released, args=(renew_every,), name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    except StorageError as error:
        if error.where.startswith(store.root):
            lease.abandon()
        raise
    finally:
        try:
            if not lease.ended:
                lease.release()
        except UserError as error:
            log.warning("the lease could not be released; the next run has to wait\n%s", error)


def _acquire(
    store: Store, name: str, content: bytes, poll_every: float, take_over_after: float, report: Callable[[str], None]
) -> bytes:
    """Returns the generation of the lease after this process has written it."""
    entry = store.entry(name)
    if _is_free(entry):
        pass
    elif _has_ended(entry):
        report(f"taking over from {_describe(entry)}, which has ended")
    else:
        report(
            f"the work directory is held by {_describe(entry)}; "
            f"this run takes over unless there is a sign of life within {take_over_after:g} seconds"
        )
        entry = _watch(store, name, entry, poll_every / 2, take_over_after)
        if not _is_free(entry):
            report(f"taking over from {_describe(entry)}")
    generation = _put_if(store, name, content, entry.generation)
    if generation is None:
        raise _held(store, store.entry(name))
    if store.put_if(name, content, ABSENT) is not None:
        raise WorkdirError(
            "the store ignores the conditions of conditional writes, so two runs could use the same directory",
            store.root,
            "use a store with conditional writes (If-Match and If-None-Match in s3://), or a local directory",
        )
    return generation


def _watch(store: Store, name: str, before: Entry, poll_every: float, take_over_after: float) -> Entry:
    """Waits until a lease is released, or has stood still for long enough.

    Raises:
      WorkdirError: its owner has renewed it, or another process has taken it over.
    """
    begin = time.monotonic()
    while True:
        time.sleep(poll_every)
        # Read the time before the object: it must stand still at the end of the time, not before.
        waited = time.monotonic() - begin
        entry = store.entry(name)
        if _is_free(entry):
            return entry
        if entry.generation != before.generation:
            raise _held(store, entry)
        if waited >= take_over_after:
            return entry


def _put_if(store: Store, name: str, content: bytes, generation: bytes) -> bytes | None:
    """Writes the lease conditionally, also if the answer to the write is lost: no other content is the same."""
    written = store.put_if(name, content, generation)
    if written is None:
        entry = store.entry(name)
        written = entry.generation if entry.content == content else None
    return written


def _held(store: Store, entry: Entry) -> WorkdirError:
    return WorkdirError(
        "another run holds the work directory",
        f"{store.root}: {_describe(entry)}",
        "wait for that run, stop it, or choose another work directory",
    )


def _encode(owner: Owner, renewals: int, released: bool) -> bytes:
    # The number makes each content unique: s3:// derives the generation from the content.
    return json.dumps(dataclasses.asdict(owner) | {"renewals": renewals, "released": released}).encode() + b"\n"


def _decode(entry: Entry) -> dict[str, object]:
    try:
        content = json.loads(entry.content or b"{}")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_free(entry: Entry) -> bool:
    return entry.generation == ABSENT or _decode(entry).get("released") is True


def _has_ended(entry: Entry) -> bool:
    """Returns whether the owner was a process of this machine that is known to have ended."""
    content = _decode(entry)
    machine, pid, started = (content.get(name) for name in ("machine", "pid", "started"))
    if not machine or machine != _machine() or type(pid) is not int or not started:
        return False
    return _started(pid) not in (started, None)


def _machine() -> str:
    """Identifies the running system and the namespace of its processes."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Returns when a process was started, in clock ticks since the start of the system.

    Returns:
      '' if there is no such process; None if /proc does not show it, as with the option hidepid.
    """
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return ""
        except PermissionError:
            pass
        return None
    return "" if fields[0] in "ZX" else fields[19]


def _describe(entry: Entry) -> str:
    """Names the owner of a lease, in one printable line."""
    content = _decode(entry)
    known = {name: str(content.get(name, "?"))[:300] for name in ("pid", "host", "since", "command")}
    line = "process {pid} on {host} since {since}: {command}".format(**known)
    return "".join(character if character.isprintable() else "?" for character in line)
