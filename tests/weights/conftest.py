from __future__ import annotations

import dataclasses
import hashlib

import pytest
from released import Released
from weight_server import CONTENT, NAME, SERVED, running

from tests.evaluation.conftest import multilabel_run  # noqa: F401
from xception_jax.weights import download
from xception_jax.weights.released import RELEASES


@pytest.fixture(scope="session")
def xception() -> Released:
    return Released("xception")


@pytest.fixture(scope="session")
def inception_v3() -> Released:
    return Released("inception_v3")


@pytest.fixture(scope="session", params=["xception", "inception_v3"])
def released(request) -> Released:
    return request.getfixturevalue(request.param)


@pytest.fixture
def server():
    """A server on loopback with the file of the release `NAME`."""
    with running() as server:
        server.files[SERVED] = CONTENT
        yield server


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """An empty cache; names and addresses lead to the server, which has another file for `NAME`."""
    for variable in ("XCEPTION_JAX_OFFLINE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XCEPTION_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XCEPTION_JAX_WEIGHTS_URL", server.url)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(download, "BACKOFF", 0.01)
    pinned = dataclasses.replace(RELEASES[NAME], md5=hashlib.md5(CONTENT).hexdigest())
    monkeypatch.setitem(RELEASES, NAME, pinned)
    return tmp_path / "cache"
