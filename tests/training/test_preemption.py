"""Real signals to real processes: what the run does with the first and with the second."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tests.conftest import free_port
from xception_jax.errors import INTERRUPTED_EXIT_CODE, PreemptedError
from xception_jax.signals import ONE_REQUEST_SECONDS, StopRequested
from xception_jax.training.preemption import Preemption

SIGNALS = [signal.SIGTERM, signal.SIGINT]

# A loop as the trainer's: one line for each step, 'stopped' and exit code 75 when it was told to.
LOOP = """
    import sys, time
    from xception_jax.errors import PreemptedError
    from xception_jax.training.preemption import Preemption
    try:
        with Preemption(lambda line: print(line, flush=True)) as preemption, preemption.deferred():
            for step in range(1, 1000):
                print("step", step, flush=True)
                time.sleep(0.02)
                if preemption.should_stop():
                    raise preemption.error(step, "some/directory")
    except PreemptedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""

# The main thread stays in C for seconds, without the interpreter lock, as in a compilation: no Python handler runs.
BUSY_IN_C = """
    import hashlib
    from xception_jax.training.preemption import Preemption
    with Preemption(lambda line: print(line, flush=True)) as preemption, preemption.deferred():
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def read_until(process: subprocess.Popen, word: str) -> None:
    deadline = threading.Timer(120, process.kill)
    deadline.start()
    try:
        for line in process.stdout:
            if word in line:
                return
        raise AssertionError(f"{word!r} never came: {process.stderr.read()}")
    finally:
        deadline.cancel()


@pytest.mark.parametrize("signum", SIGNALS)
def test_first_signal_finishes_the_step_and_exits_75(signum):
    process = start(LOOP)
    read_until(process, "step 3")
    process.send_signal(signum)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert f"{signum.name}: stopping after this step" in output
    assert errors.startswith(f"stopped by {signum.name} after step ")
    assert "Traceback" not in errors


def test_two_signals_at_once_are_one_request():
    """As `timeout` sends them: to its child and to the group of the child."""
    stop = "raise preemption.error("
    process = start(LOOP.replace(stop, f"time.sleep(2); {stop}"))  # the second one arrives within the request
    read_until(process, "step 3")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert (output + errors).count("stopping after this step") == 1


@pytest.mark.parametrize("signum", SIGNALS)
def test_second_signal_exits_130_while_the_main_thread_is_inside_c(signum):
    process = start(BUSY_IN_C)
    read_until(process, "busy")
    time.sleep(0.2)
    process.send_signal(signum)
    read_until(process, "stopping after this step")
    time.sleep(ONE_REQUEST_SECONDS + 0.1)
    start_time = time.monotonic()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert time.monotonic() - start_time < 10
    assert errors == f"{signum.name} after {signum.name}: exiting now, the last checkpoint is intact\n"


@pytest.mark.parametrize("signum", SIGNALS)
def test_handlers_and_wakeup_are_restored(signum):
    received = []
    before = signal.signal(signum, lambda *_: received.append(signum))
    try:
        lines = []
        with Preemption(lines.append) as preemption:
            deferred = preemption.deferred()
            deferred.__enter__()
            assert not preemption.requested
            os.kill(os.getpid(), signum)
            assert preemption.requested
            assert preemption.should_stop()
            error = preemption.error(7, "runs/a")
            with pytest.raises(StopRequested, match=signum.name):  # at its end, because nobody has stopped
                deferred.__exit__(None, None, None)
        assert isinstance(error, PreemptedError)
        assert str(error).splitlines()[1:] == ["  where: runs/a", "  next:  run the same command to resume"]
        assert received == []
        assert len(lines) == 1
        os.kill(os.getpid(), signum)  # would otherwise be the second, and end this process a second later
        assert received == [signum]
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_raises_at_once_where_nothing_can_be_lost(signum):
    lines = []
    with Preemption(lines.append) as preemption:
        with preemption.deferred():
            pass
        with pytest.raises(StopRequested, match=signum.name) as raised:
            os.kill(os.getpid(), signum)
        with pytest.raises(StopRequested), preemption.deferred():  # something on the way has swallowed the first
            raise AssertionError("nothing may be begun now")
    error = raised.value.as_error("runs/a")
    assert error.exit_code == 75
    assert str(error).startswith(f"stopped by {signum.name}; no trained step is lost\n")
    assert lines == [f"{signum.name}: stopping; send a second signal to exit now"]


def test_a_program_ends_at_once_where_nothing_can_be_lost_also_inside_c():
    code = """
        import hashlib
        from xception_jax.signals import StopSignals, handle_signals
        handle_signals()
        with StopSignals(print, "here"):
            print("busy", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000_000)
    """
    process = start(code)
    read_until(process, "busy")
    start_time = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert time.monotonic() - start_time < 5
    assert errors == (
        "stopped by SIGTERM; no trained step is lost\n  where: here\n  next:  run the same command to resume\n"
    )


def test_refused_outside_the_main_thread():
    failures = []

    def enter():
        try:
            Preemption().__enter__()
        except ValueError as error:
            failures.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failures == ["signal handlers can only be installed in the main thread"]


# Steps, and then a wait for input that never comes.
WAITING_LOOP = """
    import sys, time
    from xception_jax.errors import PreemptedError
    from xception_jax.training.preemption import Preemption
    try:
        with Preemption(lambda line: print(line, flush=True)) as preemption, preemption.deferred():
            for step in range(1, 9):
                assert not preemption.should_stop()
            print("waiting", flush=True)
            while not preemption.requested:
                time.sleep(0.02)
            raise preemption.error(step, "some/directory")
    except PreemptedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("signum", "loop", "ready"),
    [
        pytest.param(signal.SIGTERM, LOOP, "step 5", marks=pytest.mark.faults, id="SIGTERM in a step"),
        pytest.param(signal.SIGINT, LOOP, "step 5", id="SIGINT in a step"),
        pytest.param(signal.SIGTERM, WAITING_LOOP, "waiting", id="while both wait for input"),
    ],
)
def test_one_of_two_processes_is_told_and_both_stop_after_the_same_step(signum, loop, ready):
    address = f"localhost:{free_port()}"
    code = "import jax, sys\njax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))\n" + textwrap.dedent(loop)
    processes = [start(code, address, str(i)) for i in range(2)]
    try:
        read_until(processes[1], ready)
        processes[1].send_signal(signum)
        outcomes = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], outcomes
    messages = [next(line for line in errors.splitlines() if line.startswith("stopped by")) for _, errors in outcomes]
    assert "stopped by a signal to another process" in messages[0]
    assert f"stopped by {signum.name}" in messages[1]
    assert messages[0].split("after step")[1] == messages[1].split("after step")[1]


def test_signals_are_heard_while_the_coordinator_does_not_answer():
    """The request to the other processes waits for it; the user must not."""
    address = f"localhost:{free_port()}"
    connect = "import jax, sys\njax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))\n"
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(start(connect + textwrap.dedent(WAITING_LOOP), address, str(i))) for i in (0, 1)
        ]
        for process in processes:
            stack.callback(process.kill)
            read_until(process, "waiting")
        processes[0].send_signal(signal.SIGSTOP)
        processes[1].send_signal(signal.SIGTERM)
        read_until(processes[1], "SIGTERM: stopping after this step")
        time.sleep(ONE_REQUEST_SECONDS + 0.1)
        processes[1].send_signal(signal.SIGTERM)
        _, errors = processes[1].communicate(timeout=30)
        assert processes[1].returncode == INTERRUPTED_EXIT_CODE, errors
