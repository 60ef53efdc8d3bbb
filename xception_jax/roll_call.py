"""Knows which processes of a run have started, while they wait for each other to connect.

JAX only says that not all of them connected in time. Its key-value store cannot be used before they have: a write by a
process that is not registered yet can end it. So process 0 listens on the port after that of the coordinator, and the
others report their numbers there. If that port is closed, nothing else changes: the missing processes are not named.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

_POLL, _RETRY = 0.25, 1.0  # seconds
_LINE = 1 << 16  # bytes
_LEAVES = b"leaves\n"


class RollCall:
    """Context manager that runs a roll call in the background until the processes are connected."""

    def __init__(self) -> None:
        self._present: set[int] = set()
        self._count = self._number = 0
        self._address = ""
        self._answers = False  # whether something listens at the address of the coordinator
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._peers: dict[int, socket.socket] = {}  # in process 0, by number
        self._server: socket.socket | None = None  # in the other processes, the connection to process 0

    def __enter__(self) -> RollCall:
        threading.Thread(target=self._run, name="roll call", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def missing(self) -> list[int]:
        """Returns the numbers of the processes that have not started, as far as this process knows."""
        with self._lock:
            if self._count and (self._number == 0 or self._present):
                return sorted(set(range(self._count)) - self._present)
            return [0] if self._count and not self._answers else []

    def leave(self) -> None:
        """Tells process 0 that this process had started, although it ends now."""
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._server.sendall(_LEAVES)

    def _run(self) -> None:
        state = state_of_jax()
        while state.client is None:  # set when the addresses and numbers are known, just before it connects
            if self._stop.wait(_POLL):
                return
        self._address, self._count, self._number = state.coordinator_address, state.num_processes, state.process_id
        host, port = self._address.rsplit(":", 1)
        # The port is closed, or that of another program: nobody is named.
        with contextlib.suppress(OSError, OverflowError, ValueError, TypeError):
            (self._listen if self._number == 0 else self._report)(host.strip("[]"), int(port))

    # --- process 0 ---------------------------------------------------------------------------------------------------

    def _listen(self, host: str, port: int) -> None:
        self._present = {0}
        with contextlib.ExitStack() as stack:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            server = stack.enter_context(
                socket.create_server(("", port + 1), family=family, dualstack_ipv6=family == socket.AF_INET6)
            )
            server.settimeout(_POLL)
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    peer, _ = server.accept()
                    threading.Thread(target=self._follow, args=(peer,), name="roll call", daemon=True).start()
            with self._lock:  # both sides have been waiting for the other one
                for peer in self._peers.values():
                    with contextlib.suppress(OSError):
                        peer.shutdown(socket.SHUT_RDWR)

    def _follow(self, peer: socket.socket) -> None:
        """Counts a process as present until its connection ends, or forever if it says that it leaves."""
        with peer, contextlib.suppress(OSError, ValueError), peer.makefile("rb") as lines:
            number = int(lines.readline(_LINE))
            if not 0 < number < self._count:
                return
            self._change(number, peer)
            left = lines.readline(_LINE) == _LEAVES
            self._change(number, None, present=left)

    def _change(self, number: int, peer: socket.socket | None, *, present: bool = True) -> None:
        with self._lock:
            if peer is None:
                self._peers.pop(number, None)
            else:
                self._peers[number] = peer
            (self._present.add if present else self._present.discard)(number)
            line = json.dumps(sorted(self._present)).encode() + b"\n"
            for other in self._peers.values():
                with contextlib.suppress(OSError):
                    other.sendall(line)

    # --- the other processes -----------------------------------------------------------------------------------------

    def _report(self, host: str, port: int) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection((host, port + 1), timeout=_RETRY) as server:
                server.settimeout(None)
                server.sendall(f"{self._number}\n".encode())
                self._server, self._answers = server, True
                for line in server.makefile("rb"):
                    present = {int(number) for number in json.loads(line)}
                    with self._lock:
                        self._present = present
            self._server = None
            with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_RETRY):
                self._answers = True
            self._stop.wait(_RETRY)


def state_of_jax() -> Any:
    """Returns what JAX knows of the processes, also while it connects them. There is no public name for it."""
    from jax._src.distributed import global_state

    return global_state
