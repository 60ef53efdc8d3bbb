"""A server on loopback that serves files as Keras' server and the Hugging Face Hub do, and misbehaves on request."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from xception_jax.weights.released import RELEASES

NAME = "keras/xception"
CONTENT = np.random.default_rng(0).bytes(1_000_000)  # of the file behind that name
SERVED = f"/{RELEASES[NAME].file}"

Behaviour = Callable[["Handler"], None]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Answers with the next behaviour of the path, else with its file."""

    server: WeightServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        behaviours = self.server.behaviours.get(self.path, []) if self.command == "GET" else self.server.heads
        if behaviours:
            behaviours.pop(0)(self)
        else:
            self.answer()

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass

    def answer(self, *, cut: int | None = None, pause: float = 0) -> None:
        """Sends the file or the rest of it; with `cut`, closes the connection after that many bytes."""
        content = self.server.files.get(self.path.removeprefix("http://weights.invalid"))
        if content is None:
            return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
        tag, start = f'"{hashlib.md5(content).hexdigest()}"', 0
        if "Range" in self.headers and self.headers["If-Range"] in (tag, self.server.tag):
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            return self.refuse(416, {})
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        if self.server.tag == "ETag":
            self.send_header("ETag", tag)
        elif self.server.tag:
            self.send_header("ETag", f"W/{tag}")
            self.send_header("Last-Modified", self.server.tag)
        if "/resolve/" in self.path:
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            body = content[start:] if cut is None else content[start : start + cut]
            for piece in range(0, len(body), 1 << 16):
                self.wfile.write(body[piece : piece + (1 << 16)])
                time.sleep(pause)
        self.close_connection = cut is not None
        return None

    def refuse(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()


class WeightServer(ThreadingHTTPServer):
    """Has `files` by path, and the requests that it has `seen`.

    The next GET requests for a path are answered by its `behaviours`, the next HEAD requests by `heads`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.behaviours: dict[str, list[Behaviour]] = {}
        self.tag = "ETag"  # or the date of the last change, or ''
        self.heads: list[Behaviour] = []
        self.seen: list[tuple[str, str, dict[str, str]]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints nothing for a client that was killed, because another test may look at standard error by now."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, path: str) -> list[dict[str, str]]:
        """Returns the headers of the GET requests for a path."""
        return [headers for method, seen, headers in self.seen if (method, seen) == ("GET", path)]


@contextlib.contextmanager
def running() -> Iterator[WeightServer]:
    with WeightServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def cut(at: int) -> Behaviour:
    return lambda handler: handler.answer(cut=at)


def slow(pause: float) -> Behaviour:
    return lambda handler: handler.answer(pause=pause)


def status(code: int, **headers: str) -> Behaviour:
    return lambda handler: handler.refuse(code, {name.replace("_", "-"): value for name, value in headers.items()})
