"""A server with the JSON API of Google Cloud Storage, as far as TensorStore, gcsfs and Orbax use it.

Unlike the emulators on PyPI it has what integrity depends on: generations, preconditions that are checked and applied
under one lock, resumable uploads, pages, and checksums. It records every change, so that the state after each of them
can be served again, and it injects faults.

It is not the service: it is as consistent as the service promises to be, but its performance, its limits and the ways
in which it fails are its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.storage.gcs_objects import Mutation, Objects, Refused, Stored
from tests.storage.gcs_requests import ACCOUNT, Fault, Request, Tokens, parse_request

Answer = tuple[int, dict[str, str], bytes]
Control = Callable[[Request], Fault | None]


class GcsServer:
    """Serves buckets on a free port of the loopback interface, until the context ends.

    Attributes:
      objects: the buckets.
      control: decides which fault a request meets, if any. May be replaced at any time.
      requests: method and path of every request.
      tokens: the access tokens that requests need, or None if they need none.
    """

    def __init__(self, objects: Objects | None = None, control: Control = lambda request: None) -> None:
        self.objects = objects or Objects()
        self.control = control
        self.requests: list[tuple[str, str]] = []
        self.tokens: Tokens | None = None
        self.uploads: dict[str, _Upload] = {}
        self.upload_ids = itertools.count(1)
        handler = type("Handler", (_Handler,), {"server_object": self})
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> GcsServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def mutations(self) -> list[Mutation]:
        """All changes, in order."""
        return self.objects.mutations

    def environment(self) -> dict[str, str]:
        """Returns the variables that point TensorStore, gcsfs and google-cloud-storage at this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            # Otherwise gcsfs asks for the type of the bucket over gRPC, which this server does not have.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    @contextlib.contextmanager
    def as_default(self) -> Iterator[None]:
        """Sets these variables in this process."""
        before = {name: os.environ.get(name) for name in self.environment()}
        os.environ.update(self.environment())
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def answer(self, request: Request) -> Answer:
        """Carries out a request."""
        if self.tokens is not None and request.path.startswith(ACCOUNT):
            return _json(self.tokens.metadata(request.path.removeprefix(ACCOUNT)))
        if self.tokens is not None and not self.tokens.accepts(request.headers.get("authorization", "")):
            return _error(401, "Invalid Credentials")
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, request.path, re.DOTALL)
            if match and request.method == method:
                try:
                    return action(self, request, *match.groups())
                except Refused as refused:
                    return _error(refused.status, refused.message)
        return _error(501, f"{request.method} {request.path} is not part of this server")


@dataclasses.dataclass
class _Upload:
    """A resumable upload: what it will write, and what has arrived."""

    bucket: str
    query: Mapping[str, str]
    attributes: dict[str, Any]
    content: bytearray = dataclasses.field(default_factory=bytearray)
    stored: Stored | None = None  # at the end. A client that lost the answer asks again


def _error(status: int, message: str) -> Answer:
    if status == 304:
        return status, {}, b""
    content = {"error": {"code": status, "message": message, "errors": [{"message": message, "reason": "test"}]}}
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _json(content: Any, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(content).encode()


def _upload(server: GcsServer, request: Request, bucket: str) -> Answer:
    if "upload_id" in request.query:  # gcsfs sends the bytes of a resumable upload with POST
        return _continue_upload(server, request, bucket)
    return _UPLOADS[request.query["uploadType"]](server, request, bucket)


def _upload_media(server: GcsServer, request: Request, bucket: str) -> Answer:
    attributes = {"contentType": request.headers.get("content-type", "application/octet-stream")}
    return _json(server.objects.put(bucket, request.query["name"], request.body, request.query, attributes).resource())


def _parts(request: Request) -> list[tuple[dict[str, str], bytes]]:
    """Returns headers and body of the parts of a body of several parts."""
    match = re.search(r'boundary="?([^";]+)', request.headers["content-type"])
    assert match, request.headers
    mark = b"--" + match[1].encode()
    parts = []
    for part in re.split(b"(?:^|\r\n|\n)" + re.escape(mark), request.body)[1:-1]:
        head, _, body = part.lstrip(b"\r\n").partition(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n")
        lines = [line.partition(":") for line in head.decode().splitlines() if line]
        parts.append(({name.lower(): value.strip() for name, _, value in lines}, body))
    return parts


def _upload_multipart(server: GcsServer, request: Request, bucket: str) -> Answer:
    (_, metadata), (headers, content) = _parts(request)
    attributes = {"contentType": headers.get("content-type", "")} | json.loads(metadata)
    name = attributes.get("name") or request.query["name"]
    stored = Stored(bucket, name, content, 0)
    if attributes.get("crc32c", stored.crc32c) != stored.crc32c or attributes.get("md5Hash", stored.md5) != stored.md5:
        raise Refused(400, "The checksum of the content does not match.")
    return _json(server.objects.put(bucket, name, content, request.query, attributes).resource())


def _upload_resumable(server: GcsServer, request: Request, bucket: str) -> Answer:
    attributes = json.loads(request.body or b"{}")
    upload = _Upload(bucket, request.query, {"name": request.query.get("name")} | attributes)
    identity = f"upload-{next(server.upload_ids)}"
    server.uploads[identity] = upload
    location = f"{server.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={identity}"
    return 200, {"Location": location, "X-GUploader-UploadID": identity}, b""


_UPLOADS = {"media": _upload_media, "multipart": _upload_multipart, "resumable": _upload_resumable}


def _continue_upload(server: GcsServer, request: Request, bucket: str) -> Answer:
    """Takes the next bytes of a resumable upload. The object appears when the last byte has arrived."""
    upload = server.uploads.get(request.query["upload_id"])
    if upload is None:
        raise Refused(404, "There is no such upload.")
    if upload.stored is not None:
        return _json(upload.stored.resource())
    total = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", request.headers.get("content-range", "bytes */*"))
    assert total, request.headers
    begin = int(total[1] or len(upload.content))
    if begin > len(upload.content):
        raise Refused(503, "Bytes before these are missing.")
    upload.content[begin:] = request.body if total[1] else b""
    if "content-range" not in request.headers:
        upload.content[:] = request.body
    elif total[3] == "*" or len(upload.content) < int(total[3]):
        return 308, {"Range": f"bytes=0-{len(upload.content) - 1}"} if upload.content else {}, b""
    name, content = upload.attributes["name"], bytes(upload.content)
    upload.stored = server.objects.put(upload.bucket, name, content, upload.query, upload.attributes)
    return _json(upload.stored.resource())


def _get(server: GcsServer, request: Request, bucket: str, name: str) -> Answer:
    stored = server.objects.get(bucket, name, request.query)
    if request.query.get("alt") != "media":
        return _json(stored.resource())
    headers = {
        "Content-Type": "application/octet-stream",
        "x-goog-generation": str(stored.generation),
        "x-goog-metageneration": str(stored.metageneration),
        "x-goog-stored-content-length": str(len(stored.content)),
        "x-goog-hash": f"crc32c={stored.crc32c},md5={stored.md5}",
        "ETag": stored.md5,
    }
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not wanted:
        return 200, headers, stored.content
    size = len(stored.content)
    begin = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
    end = min(size, int(wanted[2]) + 1) if wanted[1] and wanted[2] else size
    if begin >= size:
        return 416, {"Content-Range": f"bytes */{size}"}, b""
    return 206, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}, stored.content[begin:end]


def _delete(server: GcsServer, request: Request, bucket: str, name: str) -> Answer:
    server.objects.delete(bucket, name, request.query)
    return 204, {}, b""


def _patch(server: GcsServer, request: Request, bucket: str, name: str) -> Answer:
    return _json(server.objects.patch(bucket, name, request.query, json.loads(request.body)).resource())


def _copy(server: GcsServer, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> Answer:
    return _json(server.objects.copy((bucket, name), (to_bucket, to_name), request.query).resource())


def _rewrite(server: GcsServer, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> Answer:
    stored = server.objects.copy((bucket, name), (to_bucket, to_name), request.query)
    size = str(len(stored.content))
    done = {"kind": "storage#rewriteResponse", "done": True, "totalBytesRewritten": size, "objectSize": size}
    return _json(done | {"resource": stored.resource()})


def _list(server: GcsServer, request: Request, bucket: str) -> Answer:
    return _json(server.objects.list(bucket, request.query))


def _bucket(server: GcsServer, request: Request, bucket: str) -> Answer:
    server.objects.list(bucket, {"maxResults": "1"})
    return _json({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US", "storageClass": "STANDARD"})


def _layout(server: GcsServer, request: Request, bucket: str) -> Answer:
    server.objects.list(bucket, {"maxResults": "1"})
    return _json({"kind": "storage#storageLayout", "bucket": bucket, "location": "US", "locationType": "region"})


def _batch(server: GcsServer, request: Request) -> Answer:
    """Carries out several requests. The service gives no atomicity over them, and each is recorded by itself."""
    answers = []
    for headers, body in _parts(request):
        head, _, inner = body.partition(b"\r\n\r\n" if b"\r\n\r\n" in body else b"\n\n")
        method, target, _ = head.decode().splitlines()[0].split(" ")
        own = [line.partition(":") for line in head.decode().splitlines()[1:]]
        part = parse_request(method, target, {name.lower(): value.strip() for name, _, value in own}, inner)
        inherited = {"authorization": request.headers.get("authorization", "")} | dict(part.headers)
        status, _, content = server.answer(dataclasses.replace(part, headers=inherited))
        identity = headers.get("content-id", "<1>").replace("<", "<response-")
        answers.append(
            f"--batch\r\nContent-Type: application/http\r\nContent-ID: {identity}\r\n\r\n"
            f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content
        )
    return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, b"\r\n".join(answers) + b"\r\n--batch--\r\n"


_ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("POST", r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", _upload),
    ("PUT", r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", _continue_upload),
    ("GET", r"/storage/v1/b/([^/]+)/storageLayout", _layout),
    ("GET", r"/storage/v1/b/([^/]+)", _bucket),
    ("GET", r"/storage/v1/b/([^/]+)/o/?", _list),
    ("POST", r"/storage/v1/b/([^/]+)/o/(.+)/rewriteTo/b/([^/]+)/o/(.+)", _rewrite),
    ("POST", r"/storage/v1/b/([^/]+)/o/(.+)/copyTo/b/([^/]+)/o/(.+)", _copy),
    ("GET", r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)", _get),
    ("DELETE", r"/storage/v1/b/([^/]+)/o/(.+)", _delete),
    ("PATCH", r"/storage/v1/b/([^/]+)/o/(.+)", _patch),
    ("POST", r"/batch(?:/storage/v1)?", _batch),
)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Speaks HTTP/1.1 with one client."""

    server_object: GcsServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave in one packet

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = parse_request(self.command, self.path, headers, self._body())
        server = self.server_object
        server.requests.append((request.method, request.path))
        fault = server.control(request) or Fault()
        objects = server.objects
        time.sleep(fault.delay)
        if server.objects is not objects:  # of another test by now
            self._disconnect()
            return
        status, headers, content = _error(fault.status, "injected") if fault.status else server.answer(request)
        if fault.lost:
            self._disconnect()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault.cut else content)
        self.wfile.flush()
        if fault.cut:
            self._disconnect()

    def _disconnect(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _serve

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed or has given up
            super().handle()

    def log_message(self, *_: object) -> None:
        pass
