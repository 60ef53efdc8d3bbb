"""Process 0 knows who waits with it. Real sockets; the state of JAX stands in for processes that connect."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import types

import pytest

from tests.conftest import free_port
from xception_jax import roll_call
from xception_jax.roll_call import RollCall


@pytest.fixture
def join(monkeypatch):
    """Returns a function that lets a process of four join the roll call, as a thread of this one."""
    address = f"localhost:{free_port()}"
    states = []
    monkeypatch.setattr(roll_call, "state_of_jax", lambda: states.pop())
    with contextlib.ExitStack() as stack:

        def start(number: int) -> RollCall:
            fields = {"coordinator_address": address, "num_processes": 4, "process_id": number}
            states.append(types.SimpleNamespace(client="connecting", **fields))
            call = stack.enter_context(RollCall())
            wait_until(lambda: not states)
            return call

        yield start


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_everybody_knows_who_is_missing(join):
    first, third = join(2), join(0)
    wait_until(lambda: first.missing() == third.missing() == [1, 3])
    second = join(1)
    wait_until(lambda: [call.missing() for call in (first, second, third)] == [[3]] * 3)
    second.__exit__()
    second._server.shutdown(socket.SHUT_RDWR)  # as when it is killed
    wait_until(lambda: first.missing() == third.missing() == [1, 3])


def test_one_that_leaves_because_others_are_missing_is_not_missing(join):
    zero, one = join(0), join(1)
    wait_until(lambda: zero.missing() == one.missing() == [2, 3])
    server = one._server
    one.leave()
    one.__exit__()
    with contextlib.suppress(OSError):  # process 0 may have closed the connection already
        server.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: 1 not in zero._peers)
    assert zero.missing() == [2, 3]


def test_once_connected_nobody_waits_for_anybody(join):
    zero, one = join(0), join(1)
    wait_until(lambda: zero.missing() == one.missing() == [2, 3])
    zero.__exit__()
    one.__exit__()
    wait_until(lambda: not any(thread.name == "roll call" for thread in threading.enumerate()))


def test_without_an_answer_process_0_is_missing(join):
    one = join(1)
    wait_until(lambda: one.missing() == [0])


def test_a_stranger_changes_nothing(join):
    zero, one = join(0), join(1)
    wait_until(lambda: zero.missing() == one.missing() == [2, 3])
    host, port = one._address.rsplit(":", 1)
    for line in (b"7\n", b"-1\n", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 99 + b"\n"):
        with socket.create_connection((host, int(port) + 1)) as stranger:
            stranger.settimeout(20)
            stranger.sendall(line)
            assert stranger.recv(1) == b""
    assert zero.missing() == one.missing() == [2, 3]
