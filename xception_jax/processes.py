"""Connects the processes of a run, and ends this process in a resumable way if another one is lost.

JAX ends a process with SIGABRT when the others do not all connect in time, when a process has sent no heartbeat for
`distributed.heartbeat` seconds, and when process 0 is gone. `connected` turns this signal into exit code 75 and three
lines that name the lost process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax

from xception_jax.config import DistributedConfig, is_address
from xception_jax.errors import BUG_EXIT_CODE, ConfigError, PreemptedError, UserError
from xception_jax.launchers import from_environment, gpus_of_task, several_processes
from xception_jax.process import as_user_error
from xception_jax.roll_call import RollCall, state_of_jax
from xception_jax.signals import StopRequested, handlers_kept

_runs = 0  # of this process; all processes of a run have the same number
_WAIT_MILLISECONDS = 30 * 60 * 1000  # JAX ends the process earlier if another one is lost
_KINDS = {kind.__name__: kind for kind in UserError.__subclasses__()} | {UserError.__name__: UserError}
_BUG = "bug"
_NAMED = 20  # processes in a message
_CLOSING_SECONDS = 5.0
_handlers = list[Any]()
T = TypeVar("T")

# A process that has not been heard of for this share of `distributed.heartbeat` counts as lost when JAX gives up.
_SILENT, _SIGNS_PER_HEARTBEAT = 0.6, 6

# signal(2), because the handlers of Python's signal module only run between two bytecodes of the main thread, and
# abort(3) ends the process before.
_set_handler = ctypes.CDLL(None).signal
_set_handler.argtypes, _set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p


def start_distributed(distributed: DistributedConfig) -> None:
    """Connects to the other processes of this run, if there are any.

    `distributed` takes precedence over the environment. JAX itself detects TPU pods, GKE, Slurm (with srun), Open MPI 4
    and Kubernetes jobs. This function adds `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, SkyPilot, and all GPUs of a node
    for a Slurm task that has the node to itself.

    Raises:
      ConfigError: a launcher started several processes, but they cannot find each other.
    """
    if distributed.start == "off" or jax.distributed.is_initialized():
        return
    evidence = several_processes(os.environ)
    if not distributed.coordinator and not is_address(address := os.environ.get("JAX_COORDINATOR_ADDRESS", "x:1")):
        what = f"JAX_COORDINATOR_ADDRESS={address!r} is not HOST:PORT with a port of 1 to 65535"
        raise ConfigError(what, "the environment", "set it to the address of process 0, or unset it")
    given = {
        "coordinator_address": distributed.coordinator,
        "num_processes": distributed.num_processes,
        "process_id": distributed.process_id,
    }
    try:
        # JAX starts a service that takes SIGTERM for itself. Orbax 0.11 cannot save with several processes without it.
        with handlers_kept():
            jax.distributed.initialize(
                **(given if distributed.coordinator else from_environment(os.environ)),
                local_device_ids=gpus_of_task(os.environ),
                initialization_timeout=distributed.timeout,
                heartbeat_timeout_seconds=distributed.heartbeat,
            )
    except Exception as error:  # each launcher has its own
        # JAX raises a ValueError if no launcher is detected. It raises a RuntimeError if it has computed something
        # before, as in a notebook, and if detection fails; on a TPU slice, it then still counts the other processes.
        # After any other error, there may be several processes, which must not train without each other.
        expected = isinstance(error, ValueError | RuntimeError)
        if expected and distributed.start == "auto" and not distributed.coordinator + evidence:
            if isinstance(error, RuntimeError):
                check_processes()
            return
        source = "config.distributed" if distributed.coordinator or distributed.start == "on" else "the environment"
        raise ConfigError(
            f"{evidence or source} says that there may be several processes, "
            f"but JAX cannot connect them: {error or type(error).__name__}",
            "config.distributed",
            "start them with the launcher (srun, mpirun), set config.distributed.coordinator=HOST:PORT, num_processes "
            "and process_id on every host, or set config.distributed.start=off to train in this process only",
        ) from error


def check_processes() -> None:
    """Raises ConfigError if this process is one of several that are not connected.

    On a TPU slice, JAX counts the processes of all hosts even if they are not connected.
    """
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"this is process {jax.process_index()} of {jax.process_count()}, but they are not connected",
            "config.distributed",
            "set config.distributed.coordinator=HOST:PORT, num_processes and process_id on every host",
        )


@contextlib.contextmanager
def connected(distributed: DistributedConfig, workdir: str) -> Iterator[None]:
    """Connects the processes of a run. If one of them is lost, this process ends with code 75.

    Nothing can be saved then, because a checkpoint takes all processes: the run resumes from the last checkpoint. If a
    process ends with an error that the others do not have, they end with its code.

    Args:
      distributed: `config.distributed`.
      workdir: the work directory, for the message.

    Raises:
      ConfigError: see `start_distributed`.
    """
    global _runs
    _runs += 1
    peers = _Peers(distributed, workdir)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(peers.lost)
    previous = _set_handler(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        with peers.roll_call:
            start_distributed(distributed)
        peers.watch()
    finally:
        if peers.alone:  # from now on, an abort is a crash of this process
            _set_handler(signal.SIGABRT, previous)
        else:
            _handlers.append(handler)  # needed until the process has ended: at its exit, JAX waits for the others
    try:
        yield
        peers.leave(0)
    except StopRequested:
        peers.leave(PreemptedError.exit_code)
        raise
    except Exception as error:
        known = as_user_error(error)
        if known is None:
            peers.wait_for_a_verdict()  # a collective fails before JAX knows that a process is lost
        peers.leave(known.exit_code if known else BUG_EXIT_CODE)
        raise


def _prefix() -> str:
    """Returns how our keys in the coordinator's store begin: those of an earlier run of this process stay there."""
    return f"xception_jax/{_runs}/"


def gather(name: str, value: str) -> list[str]:
    """Returns the values of all processes, in the order of their numbers. Needs no computation on devices.

    Args:
      name: name of the exchange. Every process must call this once for each name.
      value: value of this process.
    """
    if not jax.distributed.is_initialized():
        return [value]
    client, prefix = _store(), f"{_prefix()}gather/{name.replace('/', '-')}/"
    client.key_value_set(f"{prefix}{_number()}", value)
    client.wait_at_barrier(f"{prefix}barrier", _WAIT_MILLISECONDS)
    values = {int(key.rsplit("/", 1)[1]): text for key, text in client.key_value_dir_get(prefix)}
    return [values[number] for number in sorted(values)]


def together(name: str, prepare: Callable[[], T]) -> T:
    """Returns `prepare()`, or raises the same error on all processes if it fails on any of them.

    Failures of a disk or of memory are raised as a UserError. Only the process that failed, or the first of several,
    prints the error. After a bug it prints a traceback, and the others end with code 1.

    Args:
      name: name of the exchange, see `gather`.
      prepare: does something that can fail on some hosts, for example because data are missing there. It must not wait
        for other processes.

    Raises:
      UserError: the error of the first process that failed.
    """
    if not jax.distributed.is_initialized():
        return prepare()
    try:
        result, told = prepare(), ""
    except Exception as error:
        known = as_user_error(error)
        if known is None:
            gather(name, _BUG)
            raise
        told = json.dumps([type(known).__name__, known.what, known.where, known.fix, known.details])
    outcomes = gather(name, told)
    number = next((number for number, text in enumerate(outcomes) if text), None)
    if number is None:
        return result
    if outcomes[number] == _BUG:
        sys.exit(BUG_EXIT_CODE)  # that process prints a traceback
    kind, what, where, fix, details = json.loads(outcomes[number])
    what = f"{what} (process {number} of {len(outcomes)})"
    raise _KINDS[kind](what, where, fix, details).printed_by(number == _number())


def agree(name: str, what: str, values: Mapping[str, Any], error: type[UserError], fix: str) -> None:
    """Raises an error on all processes unless all of them have the same values.

    Args:
      name: name of the exchange, see `gather`.
      what: the subject, for the message.
      values: by name; JSON values.
      error: the class of the error.
      fix: what the user can do.

    Raises:
      UserError: of the class `error`, naming up to three entries that differ and both values.
    """
    text = json.dumps(values, sort_keys=True)
    digests = gather(f"{name}/digest", hashlib.sha256(text.encode()).hexdigest())
    other = next((number for number, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    texts = gather(f"{name}/text", text if _number() in (0, other) else "")
    first, second = json.loads(texts[0]), json.loads(texts[other])
    shown = [{key: repr(value) for key, value in values.items()} for values in (first, second)]
    different = [key for key in {**first, **second} if shown[0].get(key) != shown[1].get(key)]
    listed = ", ".join(f"{key} is {' and '.join(each.get(key, 'missing') for each in shown)}" for key in different[:3])
    message = f"processes 0 and {other} have different {what}: {listed}"
    raise error(message, different[0], fix).printed_by(_number() == 0)


def publish(name: str, value: str) -> None:
    """Lets the other processes read a value of this one with `published`, in place of an earlier value."""
    _store().key_value_set(f"{_prefix()}{name}/{_number()}", value, allow_overwrite=True)


def published(name: str) -> dict[int, str]:
    """Returns the latest value of each process that has published one, by process. Does not wait for the others."""
    return {int(key.rsplit("/", 1)[1]): value for key, value in _store().key_value_dir_get(f"{_prefix()}{name}/")}


def _store() -> Any:
    """Returns the client of the coordinator's key-value store."""
    return state_of_jax().client


def _number() -> int:
    """Returns the number of this process. `jax.process_index()` would initialize the devices, together with others."""
    return int(state_of_jax().process_id)


def _coordinator_listens() -> bool:
    """Returns whether process 0 is still there, without a request to its store, which could fail or wait."""
    host, port = state_of_jax().coordinator_address.rsplit(":", 1)
    with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), _CLOSING_SECONDS):
        return True
    return False


def _named(numbers: Sequence[int]) -> str:
    """Returns 'process 3' or 'processes 1, 2, 3', with at most `_NAMED` numbers."""
    shown = ", ".join(map(str, sorted(numbers)[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"process{'es' if len(numbers) > 1 else ''} {shown}{more}"


class _Peers:
    """Tracks the last sign of life of each other process, in the key-value store of the coordinator."""

    def __init__(self, distributed: DistributedConfig, workdir: str):
        self._distributed, self._workdir = distributed, workdir
        self._interval = distributed.heartbeat / _SIGNS_PER_HEARTBEAT
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._heard: dict[int, float] = {}
        self.roll_call = RollCall()
        self._answered = 0.0  # when the coordinator last did; 0 if it refused since
        self._exit_code: int | None = None  # of this process, once it is known
        self._failed: tuple[int, int] | None = None  # another process that has ended with an error, and its code

    @property
    def alone(self) -> bool:
        """Whether there are no other processes."""
        return not self._heard

    def watch(self) -> None:
        """Starts to write and read signs of life."""
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            self._heard = dict.fromkeys(range(jax.process_count()), time.monotonic())
            self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
            self._thread.start()

    def wait_for_a_verdict(self) -> None:
        """Returns as soon as all processes are known to be alive; `lost` ends this process if one is not."""
        failed = time.monotonic()
        while self._heard and time.monotonic() < failed + 1.5 * self._distributed.heartbeat:
            if min(self._heard.values()) > failed + 2 * self._interval:  # not a sign from before, read late
                return
            time.sleep(0.1)

    def leave(self, exit_code: int) -> None:
        """Tells the other processes how this one ends, and ends the thread."""
        self._exit_code = exit_code
        self._stop.set()
        if exit_code and not self.alone:
            # If the coordinator is gone, the others know that anyway.
            with contextlib.suppress(Exception):
                _store().key_value_set(f"{_prefix()}ended/{_number()}", str(exit_code))
        if self._thread is not None:
            # A thread that returns from the library while Python ends would crash the process.
            self._thread.join(_CLOSING_SECONDS)

    def _follow(self, ended: Mapping[str, str]) -> None:
        """Ends this process with the code of one that failed, unless it ends by itself, as after a common error."""
        if ended:
            self._failed = min((int(key.rsplit("/", 1)[1]), int(code)) for key, code in ended.items())
            if not self._stop.wait(2 * self._interval):
                self._end_as_failed(*self._failed)

    def _end_as_failed(self, number: int, code: int) -> NoReturn:
        with contextlib.suppress(OSError):
            os.write(2, f"process {number} has ended with code {code}; see its messages\n".encode())
        os._exit(code)

    def _run(self) -> None:
        client, me, base = _store(), _number(), _prefix()
        prefix = f"{base}alive/"
        last: dict[str, str] = {}
        for count in range(1 << 62):
            try:
                client.key_value_set(f"{prefix}{me}", str(count), allow_overwrite=True)
                signs = dict(client.key_value_dir_get(prefix))
                ended = dict(client.key_value_dir_get(f"{base}ended/"))
                self._answered = time.monotonic()
            except Exception:  # of a type that depends on the version of JAX; `lost` tells the user
                signs, ended, self._answered = {}, {}, 0.0
            for key, sign in signs.items():
                if last.get(key) != sign:
                    self._heard[int(key.rsplit("/", 1)[1])] = time.monotonic()
            last = last | signs
            self._follow(ended)
            if self._stop.wait(self._interval):
                return

    def lost(self, signum: int) -> None:
        """Prints what was lost and ends the process. Called by abort(3), in any thread."""
        if self._exit_code is not None:
            os._exit(self._exit_code)  # this process has done all it could
        if self._failed is not None:  # process 0 may follow it first
            self._end_as_failed(*self._failed)
        try:
            message = str(self._error())
        except BaseException as error:  # this handler must never return
            message = f"error: the connection to the other processes is lost: {error!r}"
        with contextlib.suppress(OSError):  # the disk is full, or nobody reads
            os.write(2, f"{message}\n".encode())
        self.roll_call.leave()
        os._exit(PreemptedError.exit_code)

    def _error(self) -> PreemptedError:
        fix = "start the same command on all hosts; it resumes from the last checkpoint"
        if not self._heard:
            missing = self.roll_call.missing()
            who = f"{_named(missing)} did not connect" if missing else "not all processes of this run connected"
            what = f"{who} within {self._distributed.timeout} s"
            return PreemptedError(what, self._distributed.coordinator or "the launcher of the processes", fix)
        now, me = time.monotonic(), _number()
        ages = {number: now - heard for number, heard in self._heard.items() if number != me}
        silent = [number for number, age in ages.items() if age > _SILENT * self._distributed.heartbeat]
        if me != 0 and (now - self._answered > 2 * self._interval or not (silent or _coordinator_listens())):
            silent = [0]  # without the coordinator, nothing is known of the others
        if silent:
            what = f"lost {_named(silent)} of {len(self._heard)}; this is process {me}"
        else:
            what = "the connection to the other processes failed, or this process aborted (see above)"
            what += f"; this is process {me} of {len(self._heard)}"
        return PreemptedError(what, self._workdir, fix)
