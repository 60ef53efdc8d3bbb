from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import urllib.request

import pytest

from tests.conftest import ROOT
from tests.storage.gcs_objects import Objects
from tests.storage.gcs_server import GcsServer
from xception_jax.storage import Patience, Store, open_store

BUCKET = "bucket"
BRISK = Patience(retries=3, first_delay=0.05, longest_delay=0.1, total=5)
"""The limits of the tests: one second if every request fails, five for listings and if the server does not answer."""

_numbers = itertools.count(1)


def run_child(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a Python program, and waits for it to end."""
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    variables = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def gcs_process():
    with GcsServer() as server:
        yield server


@pytest.fixture
def gcs(gcs_process, monkeypatch) -> GcsServer:
    """Returns a server with one empty bucket, which clients in this process and its children use."""
    gcs_process.objects = Objects([BUCKET])
    gcs_process.control = lambda request: None
    gcs_process.tokens = None
    gcs_process.requests.clear()
    for name, value in gcs_process.environment().items():
        monkeypatch.setenv(name, value)
    return gcs_process


@pytest.fixture(scope="session")
def moto(tmp_path_factory):
    """Starts a server for S3, and yields its address.

    It is a program of another environment (`pipx install 'moto[server]'`), because it needs other versions of packages.
    """
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("needs moto_server")
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as file:
        server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", "0"], stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not (address := re.search(r"http://127.0.0.1:\d+", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield address[0]
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_bucket(moto, monkeypatch, tmp_path_factory) -> str:
    """Returns the name of an empty bucket of a server for S3, which clients in this process and its children use."""
    empty = tmp_path_factory.mktemp("aws") / "config"
    empty.touch()
    variables = {
        "AWS_ENDPOINT_URL_S3": moto,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(empty),
        "AWS_SHARED_CREDENTIALS_FILE": str(empty),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(_numbers)}"
    urllib.request.urlopen(urllib.request.Request(f"{moto}/{name}", method="PUT")).close()
    return name


@pytest.fixture
def file_place(tmp_path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def gs_place(gcs) -> str:
    return f"gs://{BUCKET}/run"


@pytest.fixture
def s3_place(s3_bucket) -> str:
    return f"s3://{s3_bucket}/run"


@pytest.fixture(params=["file", "gs", "s3"])
def place(request) -> str:
    """Returns an empty directory of each kind."""
    return request.getfixturevalue(f"{request.param}_place")


@pytest.fixture
def store(place) -> Store:
    return open_store(place, "--workdir", patience=BRISK)


@pytest.fixture
def gs_store(gs_place) -> Store:
    return open_store(gs_place, "--workdir", patience=BRISK)
