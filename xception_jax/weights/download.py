"""Downloads files: once for many processes, resumed when cut, and named only after they have been verified.

pooch does not resume, and huggingface_hub downloads every file from its beginning into a file of its own per process.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import filelock
import requests
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from xception_jax.errors import BadDataError, ConfigError, InputMissingError, StorageError, UserError
from xception_jax.files import free_space, sync_directory
from xception_jax.names import one_line, printable

ATTEMPTS = 4  # for one file, if the server is busy or the connection is cut
MAX_WAIT = 60.0  # seconds that a busy server may make us wait at once
BACKOFF = 1.0  # seconds before the second attempt; doubled before each further one
MAX_BYTES = 4 << 30  # of an answer; the largest released file has 96 MB
_TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
_MAX_REDIRECTS = 5
_BUSY = (429, 500, 502, 503, 504)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PIECE = 64 << 10
_PROGRESS = 1 << 20  # bytes between two cuts that show that it is worth going on


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file on a server.

    Attributes:
      url: its address.
      hosts: hosts that the server may redirect to, with their subdomains, besides its own host.
      token: bearer token for the server; never sent to another host.
    """

    url: str
    hosts: tuple[str, ...] = ()
    token: str | None = dataclasses.field(default=None, repr=False)

    def may_lead_to(self, url: str) -> bool:
        """Returns whether a redirect to a URL is accepted. It must not leave HTTPS."""
        ours, target = urlsplit(self.url), urlsplit(url)
        if target.scheme != "https" and target.scheme != ours.scheme:
            return False
        host = target.hostname or ""
        return host == ours.hostname or any(host == allowed or host.endswith(f".{allowed}") for allowed in self.hosts)


def describe(remote: Remote) -> requests.structures.CaseInsensitiveDict[str]:
    """Returns the headers that a server gives for a file, without those of the hosts that it redirects to.

    Raises:
      UserError: see `fetch`.
    """
    headers: requests.structures.CaseInsensitiveDict[str] = requests.structures.CaseInsensitiveDict()
    response = _ask("HEAD", remote, {"Accept-Encoding": "identity"}, headers)
    response.close()
    if not response.ok:
        raise _refusal(response, remote)
    return headers


def fetch(remote: Remote, path: Path, lock: Path, verify: Callable[[Path], None]) -> None:
    """Downloads a file, unless it is there or another process downloads it meanwhile.

    Until it is complete and verified it is called `NAME.partial`, with the server's tag for its version in
    `NAME.partial.etag`. A later call continues it if the server still has that version.

    Args:
      remote: the file on the server.
      path: the file to write; its directory is created.
      lock: a file that processes lock while they download.
      verify: called with the complete file; raises BadDataError to reject it. A rejected file is removed.

    Raises:
      InputMissingError: the server has no such file, or refuses access.
      BadDataError: the file is rejected, or the server redirects to a host that is not allowed.
      StorageError: the server cannot be reached, is busy or cuts the answer again and again, or the file cannot be
        written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        for directory in (path.parent, lock.parent):
            directory.mkdir(parents=True, exist_ok=True)
        with _locked(lock, path):
            if path.exists():
                return
            _complete(remote, partial, verify)
            os.replace(partial, path)
            _tag(partial).unlink(missing_ok=True)
            sync_directory(path.parent)
    except OSError as error:
        raise _not_written(error, partial) from None


def _locked(lock: Path, path: Path) -> filelock.AcquireReturnProxy:
    file_lock = filelock.FileLock(lock)
    try:
        return file_lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process that downloads {printable(path.name)}", file=sys.stderr)
        return file_lock.acquire()


def _complete(remote: Remote, partial: Path, verify: Callable[[Path], None]) -> None:
    """Downloads the partial file to its end and verifies it."""
    while True:
        is_continued = partial.exists()
        try:
            _download(remote, partial)
            return verify(partial)
        except BadDataError:
            partial.unlink(missing_ok=True)
            _tag(partial).unlink(missing_ok=True)
            if not is_continued:  # otherwise, the part from an earlier call may be the wrong one
                raise


def _download(remote: Remote, partial: Path) -> None:
    cuts = 0
    while True:
        before = _size(partial)
        try:
            return _receive(remote, partial)
        except _CutError as cut:
            cuts = 1 if _size(partial) - before >= _PROGRESS else cuts + 1
            if cuts == ATTEMPTS:
                fix = f"run the same command again; it continues {partial} ({_size(partial):,} bytes)"
                raise StorageError(f"the download was cut {cuts} times: {cut}", remote.url, fix) from None
            start = _size(partial) if _tag(partial).exists() else 0
            print(f"the download was cut; continuing at byte {start:,}", file=sys.stderr)
            time.sleep(BACKOFF * 2 ** (cuts - 1))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receive(remote: Remote, partial: Path) -> None:
    """Receives one answer: the rest of the partial file if the server agrees, else the whole file."""
    tag, start = _tag(partial), 0
    headers = {"Accept-Encoding": "identity"}
    if tag.exists() and partial.exists():
        start = partial.stat().st_size
        known = tag.read_bytes().decode("ascii", "replace").replace("\ufffd", "?")  # a damaged one fits no version
        headers |= {"Range": f"bytes={start}-", "If-Range": known}
    with _ask("GET", remote, headers) as response:
        if response.status_code == 416:  # the partial file is complete, or wrong: its sum decides
            return
        if not response.ok:
            raise _refusal(response, remote)
        is_rest = response.status_code == 206
        if is_rest and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            tag.unlink()
            raise _CutError("the server answers with another part of the file")
        start = start if is_rest else 0
        stated = response.headers.get("Content-Length", "")
        length = int(stated) if stated.isdecimal() else 0
        _require_room(partial, length)
        if not is_rest:
            partial.write_bytes(b"")  # first, so that the tag never belongs to the bytes of another version
            tag.unlink(missing_ok=True)
            version = response.headers.get("ETag", "")
            if not version.startswith('"'):  # a weak tag does not promise the same bytes
                version = response.headers.get("Last-Modified", "")
            if version:
                tag.write_text(version)
        with (
            partial.open("ab") as file,
            tqdm(
                desc=f"downloading {printable(partial.stem)}",
                initial=start,
                total=start + length or None,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            for piece in _pieces(response):
                file.write(piece)
                bar.update(len(piece))
                if file.tell() > MAX_BYTES:
                    raise BadDataError(f"the answer has more than {MAX_BYTES:,} bytes", remote.url, "use another file")
            file.flush()
            os.fsync(file.fileno())


class _CutError(Exception):
    """The connection broke within an answer."""


def _pieces(response: requests.Response) -> Iterator[bytes]:
    try:
        yield from response.iter_content(_PIECE)
    except requests.RequestException as error:
        raise _CutError(_innermost(error)) from None


def _ask(
    method: str,
    remote: Remote,
    headers: dict[str, str],
    collected: requests.structures.CaseInsensitiveDict[str] | None = None,
) -> requests.Response:
    """Returns the answer of a server that is not busy. `collected` receives the headers of the server itself."""
    for attempt in range(ATTEMPTS):
        response = _follow(method, remote, headers, collected)
        if response.status_code not in _BUSY:
            return response
        response.close()
        delay = _retry_after(response)
        wait = BACKOFF * 2**attempt if delay is None else delay
        if wait > MAX_WAIT or attempt == ATTEMPTS - 1:
            what = f"the server is busy (HTTP {response.status_code})"
            later = f"in {wait:,.0f} seconds" if delay is not None else "later"
            raise StorageError(what, remote.url, f"run the same command again {later}")
        print(f"the server is busy; trying again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _follow(
    method: str,
    remote: Remote,
    headers: dict[str, str],
    collected: requests.structures.CaseInsensitiveDict[str] | None,
) -> requests.Response:
    """Follows redirects to hosts that are allowed. With `collected`, only those within the server itself."""
    for response in _hops(method, remote, headers):
        if collected is not None:
            collected.update(response.headers)
            if response.is_redirect and _host(urljoin(response.url, response.headers["Location"])) != _host(remote.url):
                return response
        if not response.is_redirect:
            return response
        response.close()
    raise BadDataError("the server redirects again and again", remote.url, "try again later")


def _hops(method: str, remote: Remote, headers: dict[str, str]) -> Iterator[requests.Response]:
    url = remote.url
    for _ in range(_MAX_REDIRECTS):
        try:
            token = remote.token if _host(url) == _host(remote.url) else None
            response = requests.request(
                method, url, headers=headers, auth=_Bearer(token), stream=True, allow_redirects=False, timeout=_TIMEOUT
            )
        except requests.RequestException as error:
            raise _unreachable(remote, error) from None
        except (OSError, ValueError) as error:  # of the certificates, the address or the token
            fix = "check REQUESTS_CA_BUNDLE, HF_TOKEN, HF_ENDPOINT and XCEPTION_JAX_WEIGHTS_URL"
            raise ConfigError(f"the server cannot be asked: {one_line(error)[:200]}", remote.url, fix) from None
        if response.is_redirect:
            try:
                url = urljoin(url, response.headers["Location"])
            except ValueError:
                response.close()
                what = "the server redirects to an address that is not valid"
                raise BadDataError(what, remote.url, "try again later") from None
            if not remote.may_lead_to(url):
                response.close()
                fix = "if you trust that host, download the file there and use its path"
                raise BadDataError(f"the server redirects to another host: {_host(url)}", remote.url, fix)
        yield response


class _Bearer(requests.auth.AuthBase):
    """Sends a token, if there is one, and nothing from a .netrc file, which `requests` would read."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""


def _tag(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.etag")


def _retry_after(response: requests.Response) -> float | None:
    """Returns the seconds that the server asks to wait, or None if it does not say."""
    try:
        return Retry().parse_retry_after(response.headers.get("Retry-After", ""))
    except InvalidHeader:
        return None


def _require_room(partial: Path, length: int) -> None:
    """Raises OSError if the disk has no room for the answer, before the first byte is written."""
    if length > MAX_BYTES:
        raise BadDataError(f"the answer has {length:,} bytes", str(partial), "use another file")
    status = os.statvfs(partial.parent)
    if length > status.f_bavail * status.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _refusal(response: requests.Response, remote: Remote) -> UserError:
    """Returns the error for an answer that is neither a file nor a redirect."""
    status = response.status_code
    reason = response.headers.get("X-Error-Message") or response.reason  # the first is sent by the hub
    if status in (401, 403):
        fix = "check the name; for a private or gated repository, run `hf auth login` or set HF_TOKEN"
        return InputMissingError(f"the server refuses access: {reason} (HTTP {status})", remote.url, fix)
    if status in (404, 410):
        what = f"the server has no such file: {reason} (HTTP {status})"
        return InputMissingError(what, remote.url, "check the name, the revision and the file")
    return StorageError(f"the server cannot answer: {reason} (HTTP {status})", remote.url, "try again later")


def _unreachable(remote: Remote, error: requests.RequestException) -> StorageError:
    fix = "check the network and HTTPS_PROXY; or download the file elsewhere and use its path"
    return StorageError(f"the server cannot be reached: {_innermost(error)}", remote.url, fix)


def _innermost(error: BaseException) -> str:
    """Returns the reason behind an error of `requests`, whose text holds those of several layers, in one line."""
    while True:
        inner = getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, BaseException)), None)
        if not isinstance(inner, BaseException):
            return one_line(error)[:200] or type(error).__name__
        error = inner


def _not_written(error: OSError, partial: Path) -> StorageError:
    reason, place = error.strerror or str(error), str(error.filename or partial)
    fix = "set XCEPTION_JAX_CACHE to a directory that you can write to"
    if error.errno in _FULL:
        existing = next(folder for folder in partial.parents if folder.exists())
        fix = f"free some space ({free_space(existing)}) or set XCEPTION_JAX_CACHE to a directory that has room"
    return StorageError(f"the download cannot be written: {reason}", place, fix)


def digest(path: Path, algorithm: str) -> str:
    """Returns a sum of a file: 'sha256', 'md5', or 'git', the SHA-1 by which Git knows the content."""
    hasher = (
        hashlib.sha1(usedforsecurity=False) if algorithm == "git" else hashlib.new(algorithm, usedforsecurity=False)
    )
    if algorithm == "git":
        hasher.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
