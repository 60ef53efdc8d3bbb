"""Downloads from a real server that cuts, lies, redirects, refuses and is busy."""

from __future__ import annotations

import dataclasses
import hashlib
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from weight_server import COMMIT, CONTENT, NAME, SERVED, cut, running, slow, status

from xception_jax.errors import BadDataError, ConfigError, InputMissingError, StorageError, UserError
from xception_jax.weights import download, sources
from xception_jax.weights.released import RELEASES


def left_in(cache: Path) -> set[str]:
    """Returns the names of the files in the cache, without the locks."""
    return {path.name for path in cache.rglob("*") if path.is_file() and path.parent.name != ".locks"}


def failure(kind: type[UserError], source: str = NAME) -> UserError:
    """Returns the error of a download, which has three lines."""
    with pytest.raises(kind) as raised:
        sources.find(source)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "where", "fix"]
    return raised.value


@pytest.mark.parametrize("record", ["{}  x", "SHA256 (x) = {}", "{}"])
def test_a_record_may_have_any_format_of_its_tool(record, tmp_path):
    digest = hashlib.sha256(b"x").hexdigest()
    for text in (digest, digest.upper()):
        (tmp_path / "x.sha256").write_text(record.format(text))
        assert sources._sums(tmp_path / "x.sha256") == [digest]
    (tmp_path / "x.sha256").write_text(record.format(digest[1:]))
    with pytest.raises(BadDataError, match="has no SHA-256"):
        sources._sums(tmp_path / "x.sha256")


def test_a_file_is_downloaded_once_and_its_sum_recorded(server, cache):
    found = sources.find(NAME)
    assert found.path.read_bytes() == CONTENT
    assert (found.name, found.release) == (NAME, RELEASES[NAME])
    assert left_in(cache) == {found.path.name, f"{found.path.name}.sha256"}
    subprocess.run(
        ["sha256sum", "--check", "--status", sources.recorded(found.path)], cwd=found.path.parent, check=True
    )
    assert sources.find(NAME) == found
    assert len(server.seen) == 1


def test_a_cut_download_continues_where_it_was(server, cache, capsys):
    server.behaviours[SERVED] = [cut(300_000), cut(200_000)]
    assert sources.find(NAME).path.read_bytes() == CONTENT
    first, *others = server.gets(SERVED)
    assert "Range" not in first
    tag = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    starts = [int(headers["Range"].removeprefix("bytes=").removesuffix("-")) for headers in others]
    assert [headers["If-Range"] for headers in others] == [tag, tag]
    assert 200_000 < starts[0] <= 300_000 < starts[1] <= 500_000
    assert "continuing at byte" in capsys.readouterr().err


def test_after_four_cuts_the_rest_is_left_for_the_next_call(server, cache):
    server.behaviours[SERVED] = [cut(200_000)] * download.ATTEMPTS
    error = failure(StorageError)
    name = sources.cached_path(NAME).name
    assert f"it continues {sources.cached_path(NAME)}.partial" in error.fix
    assert left_in(cache) == {f"{name}.partial", f"{name}.partial.etag"}
    assert sources.find(NAME).path.read_bytes() == CONTENT
    assert int(server.gets(SERVED)[-1]["Range"].removeprefix("bytes=").removesuffix("-")) > 500_000
    assert left_in(cache) == {name, f"{name}.sha256"}


@pytest.mark.parametrize(("tag", "continued"), [("Mon, 01 Jan 2024 00:00:00 GMT", True), ("", False)])
def test_servers_without_a_strong_tag(server, cache, tag, continued):
    server.tag = tag
    server.behaviours[SERVED] = [cut(300_000)]
    assert sources.find(NAME).path.read_bytes() == CONTENT
    assert ("Range" in server.gets(SERVED)[-1]) is continued


def another_part(handler) -> None:
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-9/1000000")
    handler.send_header("Content-Length", "10")
    handler.end_headers()
    handler.wfile.write(CONTENT[:10])


def test_an_answer_with_another_part_is_not_used(server, cache):
    server.behaviours[SERVED] = [cut(300_000), another_part]
    assert sources.find(NAME).path.read_bytes() == CONTENT
    assert "Range" not in server.gets(SERVED)[-1]


def without_length(handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(CONTENT)
    handler.close_connection = True


def test_an_answer_that_is_too_long(server, cache, monkeypatch):
    monkeypatch.setattr(download, "MAX_BYTES", 999_999)
    server.behaviours[SERVED] = [without_length]
    for what in ("more than 999,999 bytes", "the answer has 1,000,000 bytes"):
        assert what in failure(BadDataError).what
        assert left_in(cache) == set()


def test_a_large_file_may_be_cut_often(server, cache, monkeypatch):
    monkeypatch.setattr(download, "_PROGRESS", 100_000)
    server.behaviours[SERVED] = [cut(150_000)] * 5
    assert sources.find(NAME).path.read_bytes() == CONTENT


def test_another_version_is_downloaded_from_its_beginning(server, cache):
    server.files[SERVED] = bytes(1_000_000)
    server.behaviours[SERVED] = [cut(200_000)] * download.ATTEMPTS
    failure(StorageError)
    server.files[SERVED] = CONTENT
    assert sources.find(NAME).path.read_bytes() == CONTENT


def test_a_damaged_part_is_dropped(server, cache):
    server.behaviours[SERVED] = [cut(200_000)] * download.ATTEMPTS
    failure(StorageError)
    partial = sources.cached_path(NAME).with_suffix(".h5.partial")
    partial.write_bytes(bytes(partial.stat().st_size))
    assert sources.find(NAME).path.read_bytes() == CONTENT
    assert "Range" not in server.gets(SERVED)[-1]


def test_a_part_that_is_complete_is_not_downloaded_again(server, cache):
    """The process was killed before it renamed the file."""
    path = sources.cached_path(NAME)
    path.parent.mkdir(parents=True)
    path.with_suffix(".h5.partial").write_bytes(CONTENT)
    path.with_suffix(".h5.partial.etag").write_text(f'"{hashlib.md5(CONTENT).hexdigest()}"')
    assert sources.find(NAME).path.read_bytes() == CONTENT
    assert [headers["Range"] for headers in server.gets(SERVED)] == ["bytes=1000000-"]


def test_a_wrong_sum_leaves_nothing(server, cache):
    server.files[SERVED] = CONTENT[:-1] + b"x"
    assert "the file has the wrong md5" in failure(BadDataError).what
    assert left_in(cache) == set()


def test_a_file_without_a_pin_is_trusted_once(server, cache, monkeypatch):
    monkeypatch.setitem(RELEASES, NAME, dataclasses.replace(RELEASES[NAME], md5=None))
    path = sources.find(NAME).path
    path.unlink()
    server.files[SERVED] = bytes(1000)
    error = failure(BadDataError)
    assert "wrong sha256" in error.what
    assert f"(then remove {path}.sha256)" in error.fix
    assert left_in(cache) == {f"{path.name}.sha256"}


def test_a_changed_file_in_the_cache_is_refused(server, cache):
    path = sources.find(NAME).path
    with path.open("r+b") as file:
        file.write(b"x")
    error = failure(BadDataError)
    assert "wrong sha256" in error.what
    assert f"rm {path}" in error.fix
    sources.recorded(path).unlink()  # then the published sum decides
    assert "wrong md5" in failure(BadDataError).what


def test_a_redirect_stays_on_its_host(server, cache):
    server.behaviours[SERVED] = [status(302, Location="/elsewhere")]
    server.files["/elsewhere"] = CONTENT
    assert sources.find(NAME).path.read_bytes() == CONTENT


def test_a_redirect_to_another_host_is_refused(server, cache):
    with running() as other:
        other.files["/x"] = CONTENT
        server.behaviours[SERVED] = [status(302, Location=f"http://localhost:{other.server_port}/x")]
        assert "redirects to another host: localhost" in failure(BadDataError).what
        assert other.seen == []
    assert left_in(cache) == set()


def test_redirects_in_a_circle_end(server, cache):
    server.behaviours[SERVED] = [status(302, Location=SERVED)] * 10
    assert "again and again" in failure(BadDataError).what


@pytest.mark.parametrize(
    ("url", "accepted"),
    [
        ("https://huggingface.co/x", True),
        ("https://cas-bridge.xethub.hf.co/x", True),
        ("http://cas-bridge.xethub.hf.co/x", False),
        ("https://evil-hf.co/x", False),
        ("https://hf.co.evil.com/x", False),
        ("file:///etc/passwd", False),
    ],
)
def test_where_the_hub_may_redirect_to(url, accepted):
    assert download.Remote("https://huggingface.co/a", ("hf.co",)).may_lead_to(url) is accepted


def test_a_token_is_not_sent_to_another_host(server, cache, tmp_path):
    with running() as other:
        other.files["/x"] = CONTENT
        server.behaviours[SERVED] = [status(302, Location=f"http://localhost:{other.server_port}/x")]
        remote = download.Remote(f"{server.url}{SERVED}", ("localhost",), token="secret")
        download.fetch(remote, tmp_path / "x", tmp_path / "lock", lambda path: None)
        assert "Authorization" not in other.gets("/x")[0]
    assert server.gets(SERVED)[0]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(remote)


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"), [(404, InputMissingError, 66), (403, InputMissingError, 66), (418, StorageError, 74)]
)
def test_a_refusal(server, cache, code, kind, exit_code):
    server.behaviours[SERVED] = [status(code)]
    error = failure(kind)
    assert f"HTTP {code}" in error.what
    assert error.exit_code == exit_code
    assert left_in(cache) == set()
    assert len(server.seen) == 1


def test_a_busy_server_is_asked_again(server, cache, capsys):
    server.behaviours[SERVED] = [status(429, Retry_After="0"), status(503)]
    assert sources.find(NAME).path.read_bytes() == CONTENT
    assert capsys.readouterr().err.count("the server is busy; trying again") == 2


def test_a_server_that_is_busy_for_long_is_not_waited_for(server, cache):
    server.behaviours[SERVED] = [status(429, Retry_After="3600")]
    assert "again in 3,600 seconds" in failure(StorageError).fix
    server.behaviours[SERVED] = [status(503)] * download.ATTEMPTS
    assert "busy (HTTP 503)" in failure(StorageError).what
    assert left_in(cache) == set()


def test_a_full_disk(server, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        error = failure(StorageError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "free some space" in error.fix
    name = sources.cached_path(NAME).name
    assert left_in(cache) == {f"{name}.partial", f"{name}.partial.etag"}
    assert sources.find(NAME).path.read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written(server, cache):
    cache.write_text("a file")
    assert "set XCEPTION_JAX_CACHE" in failure(StorageError).fix


def test_no_network(server, cache, monkeypatch):
    monkeypatch.setenv("XCEPTION_JAX_WEIGHTS_URL", "http://127.0.0.1:9")
    error = failure(StorageError)
    assert "cannot be reached" in error.what
    assert "HTTPS_PROXY" in error.fix
    assert left_in(cache) == set()


@pytest.mark.parametrize(
    ("variable", "value", "name"),
    [
        ("HF_TOKEN", "\u201csecret\u201d", "hf://someone/flowers"),
        ("XCEPTION_JAX_WEIGHTS_URL", "http://[bad", NAME),
        ("XCEPTION_JAX_WEIGHTS_URL", "https://127.0.0.1:9", NAME),
    ],
)
def test_settings_of_the_network_that_cannot_be_used(server, cache, monkeypatch, variable, value, name):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere")
    monkeypatch.setenv(variable, value)
    error = failure(ConfigError, name)
    assert "REQUESTS_CA_BUNDLE, HF_TOKEN" in error.fix
    assert len(str(error).splitlines()) == 3


@pytest.mark.parametrize("variable", ["XCEPTION_JAX_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(server, cache, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert f"{variable} turns downloads off" in failure(InputMissingError).what
    assert "turns downloads off" in failure(InputMissingError, "hf://someone/flowers").what
    assert server.seen == []
    monkeypatch.delenv(variable)
    path = sources.find(NAME).path
    monkeypatch.setenv(variable, "1")
    assert sources.find(NAME).path == path


def test_the_proxy_is_used(server, cache, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("XCEPTION_JAX_WEIGHTS_URL", "http://weights.invalid")
    assert sources.find(NAME).path.read_bytes() == CONTENT
    assert server.seen[0][1] == f"http://weights.invalid{SERVED}"


FIND = "import sys; from xception_jax.weights import sources; print(sources.find(sys.argv[1]).path)"


def start(source: str) -> subprocess.Popen:
    """Starts a process that finds a source; it must not need JAX."""
    code = f"{FIND}; assert 'jax' not in sys.modules"
    return subprocess.Popen([sys.executable, "-c", code, source], stdout=subprocess.PIPE, text=True)


def test_many_processes_download_once(server, cache):
    served = f"/someone/flowers/resolve/{COMMIT}/model.safetensors"
    server.files[served] = CONTENT
    server.behaviours[served] = [slow(0.05)]  # almost a second
    processes = [start(f"hf://someone/flowers@{COMMIT}") for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert Path(paths.pop()).read_bytes() == CONTENT
    assert not paths
    assert len(server.gets(served)) == 1


def test_a_killed_process_leaves_a_part_that_the_next_one_continues(server, cache):
    served = f"/someone/flowers/resolve/{COMMIT}/model.safetensors"
    server.files[served] = CONTENT
    server.behaviours[served] = [slow(0.5)]
    process = start(f"hf://someone/flowers@{COMMIT}")
    while not any(path.stat().st_size for path in cache.rglob("*.partial")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sources.find(f"hf://someone/flowers@{COMMIT}").path.read_bytes() == CONTENT
    assert "Range" in server.gets(served)[-1]
    assert not list(cache.rglob("*.partial*"))
