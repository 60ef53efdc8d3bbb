"""Reads weight files in a process of their own, under limits that hold inside libraries too.

On some damaged files libhdf5 hangs, crashes, or takes any amount of memory, out of reach of Ctrl-C. Therefore a child
process parses the file (`child`), with limits of memory and processor time that it sets on itself. This process limits
its wall time, ends it on any error or signal, and receives only names, numbers and texts. Tensors come through a shared
buffer that has no name: they are not copied, and nothing is left on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from xception_jax.errors import BadDataError, InputMissingError, StorageError, UserError
from xception_jax.files import open_regular
from xception_jax.user_files import reading
from xception_jax.weights.content import ERROR, MEMORY, READY, Content, decode
from xception_jax.weights.limits import RAISE, Limits

_START_SECONDS = 120  # for the imports of the child, from a slow disk
_LONGEST_WAIT = 1e6  # seconds; epoll takes no more than two million
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from xception_jax.weights.child import main; main()"
)
_ROOT = str(Path(__file__).parents[2])
_STDERR_BYTES = 4096
_ERRORS: dict[str, type[UserError]] = {each.__name__: each for each in (BadDataError, InputMissingError, StorageError)}


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[Reader]:
    """Opens a weight file and starts the process that will read it; it has ended when the context does.

    Raises:
      InputMissingError: there is no such file, it is not a regular one, or it may not be read.
      StorageError: opening it failed, or the process cannot be started.
      ConfigError: the environment variable for the limits is malformed.
    """
    with contextlib.ExitStack() as stack:
        with reading("weight file", path, "give the path of a .safetensors, .keras or .h5 file"):
            file = stack.enter_context(open_regular(path))
        buffer = stack.enter_context(_unnamed_file())
        child = _Child(file, buffer, str(path))
        try:
            yield Reader(file, buffer, str(path), child)
        finally:
            child.end()


class Reader:
    """A weight file that a child process is about to read."""

    def __init__(self, file: BinaryIO, buffer: BinaryIO, where: str, child: _Child) -> None:
        self._file, self._buffer, self._where, self._child = file, buffer, where, child
        self._state = _state(file)

    def hashes(self) -> tuple[str, str]:
        """Returns SHA-256 and MD5 of the file. MD5 only identifies published files; it does not protect from forgery.

        Raises:
          StorageError: the file cannot be read.
        """
        digests = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        try:
            self._file.seek(0)
            while block := self._file.read(1 << 20):
                for digest in digests:
                    digest.update(block)
        except OSError as error:
            fix = "check the disk, or copy the file again"
            raise StorageError(f"the weight file cannot be read: {error}", self._where, fix) from None
        return digests[0].hexdigest(), digests[1].hexdigest()

    def content(self) -> Content[np.ndarray]:
        """Lets the child read the file and returns what it contains.

        Raises:
          BadDataError: the file is damaged, refused or of an unknown kind, exceeds a limit, or makes its reader crash.
          StorageError: the file cannot be read, or it changed meanwhile; or the child does not start.
        """
        try:
            answer = self._child.answer()
        finally:
            if _state(self._file) != self._state:
                fix = "wait until it is complete, and try again"
                raise StorageError("the weight file changed while it was read", self._where, fix)
        try:
            fields = json.loads(answer)
            if MEMORY in fields:
                raise self._child.over_limit(f"more than {int(fields[MEMORY]):,} bytes of memory")
            if ERROR in fields:
                name, *message = fields[ERROR]
                raise _ERRORS.get(name, BadDataError)(*map(str, message))
            shared = mmap.mmap(self._buffer.fileno(), 0, access=mmap.ACCESS_COPY)
            return decode(fields, shared, self._child.limits)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, OSError) as error:
            raise self._child.failed(f"gave a malformed answer: {error}") from None


class _Child:
    """The process that parses a file."""

    def __init__(self, file: BinaryIO, buffer: BinaryIO, where: str) -> None:
        self.limits, self._where = Limits.of(os.fstat(file.fileno()).st_size), where
        task = {
            "file": file.fileno(),
            "buffer": buffer.fileno(),
            "where": where,
            "limits": dataclasses.asdict(self.limits),
            "parent": os.getpid(),
        }
        # Without `site` and without the directory that it is in: both take time, and the latter may hold anything.
        path = [_ROOT, *(each for each in sys.path if each and os.path.isabs(each))]
        command = [sys.executable, "-I", "-S", "-B", "-c", _CODE, json.dumps(path), json.dumps(task)]
        # Threads of OpenBLAS would reserve memory, and plugins of HDF5 are code.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                pass_fds=(file.fileno(), buffer.fileno()),
                start_new_session=True,  # Ctrl-C is for this process only, which ends the child
                bufsize=0,
            )
        except OSError as error:
            raise self._did_not_start(str(error)) from None
        self._stderr = b""

    def answer(self) -> bytes:
        """Lets the process read the file, and returns its answer."""
        try:
            ready = self._receive(READY, _START_SECONDS)
        except _TimeIsUp:
            raise self._did_not_start(f"it is not ready after {_START_SECONDS:,} seconds") from None
        if ready != READY:
            raise self._did_not_start(self._end())
        with contextlib.suppress(BrokenPipeError):  # the answer will be missing
            cast(BinaryIO, self._process.stdin).write(b"\n")
        deadline = time.monotonic() + self.limits.wall
        try:
            answer = self._receive(None, self.limits.wall)
            code = self._process.wait(max(1.0, deadline - time.monotonic()))
        except (_TimeIsUp, subprocess.TimeoutExpired):
            raise self.over_limit(f"more than {self.limits.wall:,} seconds") from None
        if code == -signal.SIGXCPU:
            raise self.over_limit(f"more than {self.limits.cpu:,} seconds of processor time")
        if code == -signal.SIGKILL:
            raise self.failed("was killed (SIGKILL), perhaps because the system has no memory left")
        if code < 0:
            raise self.failed(f"crashed ({signal.Signals(-code).name})")
        if code > 0:
            raise self.failed(f"ended with the code {code}: {self._last_line()}")
        return answer

    def over_limit(self, what: str) -> BadDataError:
        """Returns the error for a file that takes more than it may."""
        return BadDataError(f"the weight file is refused: reading it takes {what}", self._where, RAISE)

    def failed(self, what: str) -> BadDataError:
        """Returns the error for a file that ended its reader."""
        fix = "copy or download the file again; a good file does not do this"
        return BadDataError(f"the weight file is damaged: the process that reads it {what}", self._where, fix)

    def end(self) -> None:
        """Ends the process and waits for its end."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                cast(BinaryIO, stream).close()
        self._process.wait()

    def _receive(self, expected: bytes | None, seconds: float) -> bytes:
        """Returns standard output until it is `expected`, or until its end; keeps the end of standard error."""
        received, deadline = bytearray(), time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for stream in (self._process.stdout, self._process.stderr):
                selector.register(cast(BinaryIO, stream), selectors.EVENT_READ)
            while received != expected:
                ready = selector.select(min(max(0.0, deadline - time.monotonic()), _LONGEST_WAIT))
                if not ready:
                    raise _TimeIsUp
                for key, _ in ready:
                    block = os.read(key.fd, 1 << 20)
                    if key.fileobj is self._process.stderr:
                        self._stderr = (self._stderr + block)[-_STDERR_BYTES:]
                        if not block:
                            selector.unregister(key.fileobj)
                        continue
                    received += block
                    if not block:
                        return bytes(received)
                    if len(received) > 8 * self.limits.text:  # escapes take up to six bytes
                        raise self.failed("gives too long an answer")
        return bytes(received)

    def _end(self) -> str:
        """Says how a process that did not get ready has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its output, and lives on
            if (code := self._process.wait(1)) < 0:
                return f"it was ended by {signal.Signals(-code).name}"
        return self._last_line()

    def _last_line(self) -> str:
        return (self._stderr.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1][:500]

    def _did_not_start(self, reason: str) -> StorageError:
        fix = "free some memory, and check that this Python can import h5py and safetensors"
        return StorageError(f"the process that reads weight files does not start: {reason}", self._where, fix)


class _TimeIsUp(Exception):
    """The child has not answered in time."""


def _state(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _unnamed_file() -> BinaryIO:
    """Returns a file without a name: in memory where the system can do this, else in the temporary directory."""
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):
            return os.fdopen(os.memfd_create("weights"), "w+b")
    try:
        return cast(BinaryIO, tempfile.TemporaryFile())
    except OSError as error:
        fix = "free some space, or set TMPDIR to a directory that has room"
        raise StorageError(f"no temporary file can be made: {error}", tempfile.gettempdir(), fix) from None
