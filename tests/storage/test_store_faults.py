"""The store on a server for gs:// that fails, answers late, or not at all."""

from __future__ import annotations

import os
import sys
import textwrap
import time

import pytest

from tests.storage.conftest import BRISK, BUCKET, run_child
from tests.storage.gcs_objects import Objects
from tests.storage.gcs_requests import Fault, Request, Tokens
from tests.storage.gcs_server import GcsServer
from xception_jax.errors import InputMissingError, StorageError, UserError, WorkdirError
from xception_jax.storage import ABSENT, Patience, open_store


def test_a_listing_has_all_pages(gcs, gs_store):
    names = [f"{number:04}" for number in range(2345)]
    for name in names:
        gcs.objects.put(BUCKET, f"run/{name}", b"", {})
    assert gs_store.list() == names
    assert sum(path.endswith("/o") for _, path in gcs.requests) >= 3


def failing(control, status: int, *, page: int = 0):
    """Lets requests fail from the given page of a listing on."""

    def decide(request: Request) -> Fault | None:
        return Fault(status=status) if bool(request.query.get("pageToken")) == bool(page) else None

    control.control = decide


@pytest.mark.parametrize("page", [0, 1])
@pytest.mark.parametrize(("status", "code"), [(401, 74), (403, 73), (404, 73), (503, 74)])
def test_a_listing_is_complete_or_fails(gcs, gs_store, status, code, page):
    """TensorStore takes such an answer for an empty page, which looks like a run without checkpoints."""
    for number in range(1001):
        gcs.objects.put(BUCKET, f"run/{number}", b"", {})
    failing(gcs, status, page=page)
    with pytest.raises(UserError) as error:
        gs_store.list()
    assert error.value.exit_code == code


OPERATIONS = {
    "read": lambda store: store.read("x"),
    "exists": lambda store: store.exists("x"),
    "put": lambda store: store.put("x", "new"),
    "put_if": lambda store: store.put_if("x", "new", ABSENT),
    "list": lambda store: store.list(),
    "delete": lambda store: store.delete("x"),
    "open": lambda store: open_store(store.root, "--workdir", patience=BRISK),
}
FAULTS = {
    "500": Fault(status=500),
    "503": Fault(status=503),
    "429": Fault(status=429),
    "cut": Fault(cut=True),
    "lost": Fault(lost=True),
}


WITHOUT_BODY = {("delete", "cut"), ("exists", "cut")}
CASES = [(operation, fault) for operation in OPERATIONS for fault in FAULTS if (operation, fault) not in WITHOUT_BODY]


@pytest.mark.parametrize(("operation", "fault"), CASES)
def test_a_fault_that_lasts_ends_with_74(gcs, gs_store, operation, fault):
    gcs.objects.put(BUCKET, "run/x", b"old", {})
    gcs.requests.clear()
    gcs.control = lambda request: FAULTS[fault]
    begin = time.monotonic()
    with pytest.raises(StorageError) as error:
        OPERATIONS[operation](gs_store)
    assert time.monotonic() - begin < BRISK.total + 10
    assert error.value.exit_code == 74
    assert "injected" in error.value.what or fault in ("cut", "lost")
    assert str(error.value).count("\n") == 2
    assert 2 <= len(gcs.requests) <= 500  # no tight loop: each waits for up to 0.1 s


@pytest.mark.parametrize(("operation", "fault"), CASES)
def test_a_fault_that_passes_is_not_noticed(gcs, gs_store, operation, fault):
    gcs.objects.put(BUCKET, "run/x", b"old", {})
    failures = iter([FAULTS[fault]] * 2)
    gcs.control = lambda request: next(failures, None)
    result = OPERATIONS[operation](gs_store)
    expected = {"read": b"old", "exists": True, "list": ["x"], "put_if": None, "delete": None}
    if operation in expected:
        assert result == expected[operation]
    gcs.control = lambda request: None
    assert gs_store.read("x") == {"put": b"new", "delete": None}.get(operation, b"old")


@pytest.mark.faults  # depends on times, and fails on a busy machine
def test_an_operation_that_has_failed_is_not_repeated_in_the_background(gcs, gs_place):
    patience = Patience(retries=100, first_delay=0.1, longest_delay=0.1, total=0.5)
    store = open_store(gs_place, "--workdir", patience=patience)
    gcs.control = lambda request: Fault(status=503)
    with pytest.raises(StorageError, match="took too long") as error:
        store.put("x", "late")
    gcs.control = lambda request: None
    time.sleep(0.5)
    assert not gcs.mutations
    assert error.traceback  # it refers to the operation, which would otherwise end with it


def test_latency_is_waited_for(gcs, gs_store):
    gcs.control = lambda request: Fault(delay=1)
    gs_store.put("x", "1")
    assert gs_store.list() == ["x"]


def test_a_conditional_write_whose_answer_is_lost_is_refused(gcs, gs_store):
    """Documented: the repetition of the request finds the generation that the first one has made."""
    gcs.control = lambda request: None if gcs.mutations else Fault(lost=True)  # also late requests of earlier tests
    assert gs_store.put_if("x", "mine", ABSENT) is None
    assert gs_store.read("x") == b"mine"


@pytest.mark.parametrize(
    ("status", "what", "fix"),
    [
        (401, "credentials", "gcloud auth application-default login"),
        (403, "no permission", "Storage Object User"),
        (404, "the bucket bucket does not exist", "gcloud storage buckets create gs://bucket"),
    ],
)
@pytest.mark.parametrize("unusable", [WorkdirError, InputMissingError])
def test_a_bucket_that_cannot_be_used_is_refused_at_once(gcs, gs_place, status, what, fix, unusable):
    gcs.control = lambda request: Fault(status=status)
    with pytest.raises(unusable) as error:
        open_store(gs_place, "--workdir", unusable=unusable, patience=BRISK)
    assert what in error.value.what
    assert fix in error.value.fix
    assert error.value.where == gs_place
    assert not gcs.mutations


def test_a_missing_bucket_is_refused(gcs, s3_bucket):
    for url in ("gs://nothing/run", "s3://nothing-here/run"):
        with pytest.raises(WorkdirError, match="does not exist"):
            open_store(url, "--workdir", patience=BRISK)


@pytest.mark.parametrize("operation", ["read", "put", "list", "delete"])
def test_credentials_that_expire_end_with_74_and_the_command_that_renews_them(gcs, gs_store, operation):
    gcs.control = lambda request: Fault(status=401)
    with pytest.raises(StorageError) as error:
        OPERATIONS[operation](gs_store)
    assert "gcloud auth application-default login" in error.value.fix


@pytest.mark.parametrize("status", [401, 403])
def test_s3_without_permission_is_refused(gcs, s3_bucket, monkeypatch, status):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", gcs.url)  # answers every request with an error
    gcs.control = lambda request: Fault(status=status)
    with pytest.raises(WorkdirError) as error:
        open_store("s3://bucket/run", "--workdir", patience=BRISK)
    assert "AWS_PROFILE" in error.value.fix


def test_a_missing_package_is_named_with_the_command_that_installs_it(gcs, gs_place, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    with pytest.raises(WorkdirError) as error:
        open_store(gs_place, "--workdir")
    assert "pip install '.[cloud]'" in error.value.fix


def test_a_server_that_never_answers_ends_with_74_and_the_process_ends(gcs, gs_place):
    program = """
        import sys, time
        from xception_jax.errors import StorageError
        from xception_jax.storage import Patience, open_store
        store = open_store(sys.argv[1], "--workdir", patience=Patience(total=4))
        store.put("ready", "")
        for operation in (store.read, store.exists, store.list, store.delete, lambda name: store.put(name, "")):
            begin = time.monotonic()
            try:
                operation("x")
            except StorageError as error:
                assert time.monotonic() - begin < 30, error
                print(error.exit_code)
    """
    gcs.control = lambda request: Fault(delay=20) if any("ready" in m.name for m in gcs.mutations) else None
    begin = time.monotonic()
    process = run_child(program, gs_place)
    assert process.stdout.split() == ["74"] * 5, process.stderr
    assert time.monotonic() - begin < 200


def test_a_token_that_expires_is_renewed(gcs, monkeypatch):
    program = """
        import sys, time
        from xception_jax.storage import Patience, Store, open_store
        from xception_jax.storage.store import _open
        objects = _open({"driver": "gcs", "bucket": "bucket", "path": "run/"}, Patience(retries=1, total=5))
        store = Store("gs://bucket/run", objects, lambda prefix: [], Patience(total=5), RuntimeError)
        for number in range(4):
            store.put(str(number), "")
            time.sleep(0.8)
    """
    gcs.tokens = Tokens(promised=61, valid=2)  # TensorStore asks for a new one a minute before the old one expires
    monkeypatch.delenv("GOOGLE_AUTH_TOKEN_FOR_TESTING")
    process = run_child(program, GCE_METADATA_ROOT=gcs.url.removeprefix("http://"))
    assert process.returncode == 0, process.stderr
    assert [m.name for m in gcs.mutations] == [f"run/{number}" for number in range(4)]
    assert len(gcs.tokens.issued) > 1


# --- the server itself ---


def test_every_prefix_of_the_writes_can_be_served_again(gcs, gs_store):
    expected = [[]]
    for name, content in (("a", "1"), ("b", "2"), ("a", "3"), ("b", None)):
        if content is None:
            gs_store.delete(name)
        else:
            gs_store.put(name, content)
        expected.append([(name, gs_store.read(name)) for name in gs_store.list()])
    recorded = list(gcs.mutations)
    assert len(recorded) == 4
    for count, content in enumerate(expected):
        gcs.objects = Objects([BUCKET], recorded[:count])
        assert [(name, gs_store.read(name)) for name in gs_store.list()] == content
    assert gs_store.put("c", "") > gs_store.entry("a").generation


def test_the_variable_of_other_clients_sends_tensorstore_to_an_emulator_too(gcs, run_python):
    code = """
        from xception_jax.storage import open_store
        store = open_store("gs://bucket/x", "")
        store.put("a", "b")
        print(store.list())
    """
    needed = ("STORAGE_EMULATOR_HOST", "GOOGLE_AUTH_TOKEN_FOR_TESTING", "NO_PROXY")
    process = run_python("-c", textwrap.dedent(code), environment={name: gcs.environment()[name] for name in needed})
    assert process.returncode == 0, process.stderr
    assert process.stdout == "['a']\n"
    assert gcs.objects.get(BUCKET, "x/a", {}).content == b"b"


def test_a_server_can_be_used_as_a_context():
    with GcsServer() as server, server.as_default():
        assert os.environ["STORAGE_EMULATOR_HOST"] == server.url


def test_after_each_write_of_a_renaming_one_of_both_is_complete(gcs, gs_store):
    for name in ("a", "b/c", "z"):
        gs_store.put(f"1/{name}", name)
    gs_store.put("1/done", "")
    begin = len(gcs.mutations)
    gs_store.move_prefix("1/", "2/", first="done")
    recorded = list(gcs.mutations)
    assert len(recorded) == begin + 8
    for count in range(begin, len(recorded) + 1):
        gcs.objects = Objects([BUCKET], recorded[:count])
        complete = [prefix for prefix in ("1/", "2/") if gs_store.exists(f"{prefix}done")]
        assert complete
        for prefix in complete:
            assert [gs_store.read(f"{prefix}{name}") for name in ("a", "b/c", "z")] == [b"a", b"b/c", b"z"]
