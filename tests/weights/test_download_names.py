"""Names of weights and addresses on the hub lead to local files, wherever weights are taken."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from released import narrow
from weight_server import COMMIT, CONTENT, NAME, SERVED, status

from xception_jax.cli import main
from xception_jax.config import resolve_model
from xception_jax.data.imagenet_classes import class_names
from xception_jax.errors import BadDataError, InputMissingError, StorageError, UsageError
from xception_jax.runs import open_network
from xception_jax.weights import Network, Preprocessing, load_network, save_network, sources, tree
from xception_jax.weights.download import digest
from xception_jax.weights.keras import save_keras
from xception_jax.weights.released import KERAS_FILES, PICKLES, RELEASES
from xception_jax.weights.timm import timm_names

FLOWERS = "hf://someone/flowers"
MODEL = narrow(middle_blocks=1, num_classes=2)


def on_hub(server, file: str, content: bytes, revisions=("main", COMMIT), repository="someone/flowers") -> None:
    for revision in revisions:
        server.files[f"/{repository}/resolve/{revision}/{file}"] = content


def random_network(model=MODEL, classes=("daisy", "tulip")) -> Network:
    rng = np.random.default_rng(0)
    leaves = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in tree.shapes(model).items()}
    return Network(model, tree.unflatten(leaves), Preprocessing(71), classes, "here", "0")


def timm_file(model) -> bytes:
    """Returns a file with timm's names; every value is 1."""
    names = timm_names(model)
    shapes = {names[leaf]: shape for leaf, shape in tree.shapes(model).items()}
    orders = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    return safetensors.numpy.save(
        {name: np.ones([shape[axis] for axis in orders[len(shape)]], np.float32) for name, shape in shapes.items()}
    )


@pytest.fixture
def flowers(server, cache, tmp_path) -> bytes:
    """The content of our own weight file in a repository on the hub."""
    save_network(tmp_path / "x.safetensors", random_network())
    content = (tmp_path / "x.safetensors").read_bytes()
    on_hub(server, "model.safetensors", content)
    return content


def test_a_network_on_the_hub(server, cache, flowers, capsys):
    network = open_network(FLOWERS)
    assert network.source == f"{FLOWERS}@{COMMIT}/model.safetensors"
    assert network.sha256 == hashlib.sha256(flowers).hexdigest()
    assert network.classes == ("daisy", "tulip")
    requests = len(server.gets(f"/someone/flowers/resolve/{COMMIT}/model.safetensors"))
    assert open_network(network.source).source == network.source
    assert open_network(FLOWERS).source == network.source
    assert len(server.gets(f"/someone/flowers/resolve/{COMMIT}/model.safetensors")) == requests == 1
    assert server.seen[0][2]["Authorization"] == "Bearer secret"
    assert "using the cached commit" not in capsys.readouterr().err


def test_a_cached_commit_needs_no_server(server, cache, flowers, monkeypatch, capsys):
    path = sources.find(FLOWERS).path
    seen = len(server.seen)
    assert sources.find(f"{FLOWERS}@{COMMIT}").path == path
    assert len(server.seen) == seen
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sources.find(FLOWERS).path == path
    assert len(server.seen) == seen
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert sources.find(FLOWERS).path == path
    assert f"using the cached commit {COMMIT}" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadDataError, match="wrong sha256"):
        sources.find(FLOWERS)


def test_the_config_beside_the_weights_is_read(server, cache, tmp_path):
    """Weights and config are in a folder of a branch whose name has a slash."""
    model = narrow(num_classes=3, middle_blocks=2, padding="symmetric", batch_norm={"epsilon": 1e-5})
    described = {"pretrained_cfg": {"input_size": [3, 150, 150]}, "label_names": ["a", "b", "c"]}
    revisions = ("pr%2F1", COMMIT)
    on_hub(server, "small/x.safetensors", timm_file(model), revisions)
    on_hub(server, "small/config.json", json.dumps(described).encode(), revisions)
    network = load_network(f"{FLOWERS}@pr%2F1/small/x.safetensors", model)
    assert network.preprocessing.size == 150
    assert network.classes == ("a", "b", "c")
    assert server.gets(f"/someone/flowers/resolve/{COMMIT}/small/config.json")


def test_a_small_file_has_the_sum_of_git(server, cache, flowers, tmp_path):
    (tmp_path / "empty").touch()
    assert sources.HubFile("a/b").address == "hf://a/b@main/model.safetensors"
    git = subprocess.run(["git", "hash-object", tmp_path / "empty"], capture_output=True, text=True, check=True)
    assert digest(tmp_path / "empty", "git") == git.stdout.strip()


@pytest.mark.parametrize(
    ("code", "kind"), [(404, InputMissingError), (401, InputMissingError), (429, StorageError), (302, BadDataError)]
)
def test_what_the_hub_refuses(server, cache, flowers, code, kind):
    headers = {"Retry_After": "900", "Location": "https://evil.example/x", "X_Error_Message": "Access is restricted"}
    server.heads = [status(code, **headers)]
    with pytest.raises(kind) as raised:
        sources.find(FLOWERS)
    if code == 401:
        assert "Access is restricted" in raised.value.what
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_server_that_is_not_the_hub(server, cache, flowers):
    server.heads = [status(200)]
    with pytest.raises(BadDataError, match="does not answer as the Hugging Face Hub"):
        sources.find(FLOWERS)


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://x", "hf://x/y/", "hf://x/../y", "hf://x/y/../z", "hf://x/y/a//b", "hf://../x", "hf://x/y@"],
)
def test_addresses_that_make_no_sense(cache, server, address):
    with pytest.raises(UsageError, match="OWNER/REPO"):
        sources.find(address)
    assert server.seen == []


def test_a_release_of_timm_has_the_classes_of_imagenet(server, cache):
    name = "timm/inception_v3.gluon_in1k"
    model = narrow(middle_blocks=1, padding="symmetric", batch_norm={"epsilon": 1e-5})
    on_hub(server, "model.safetensors", timm_file(model), (RELEASES[name].revision, COMMIT), name)
    network = load_network(name, model)
    assert (network.source, network.classes) == (name, tuple(class_names()))
    seen = len(server.seen)
    load_network(name, model)
    assert len(server.seen) == seen


def test_a_release_of_keras(server, cache, tmp_path, monkeypatch):
    model = resolve_model({"name": "xception"})  # Keras' format holds no narrow network
    save_keras(tmp_path / "x.weights.h5", random_network(model, None))
    server.files[SERVED] = (tmp_path / "x.weights.h5").read_bytes()
    pinned = dataclasses.replace(RELEASES[NAME], md5=hashlib.md5(server.files[SERVED]).hexdigest())
    monkeypatch.setitem(RELEASES, NAME, pinned)
    network = load_network(NAME)
    assert (network.source, network.classes) == (NAME, tuple(class_names()))


def test_a_path_wins_over_a_name(server, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keras").mkdir()
    save_network(tmp_path / NAME, random_network())
    assert open_network(NAME).classes == ("daisy", "tulip")
    assert server.seen == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("keras/xeption", "keras/xception"),
        ("xception", "keras/xception"),
        ("timm/inception_v3.tv", "timm/inception_v3.tv_in1k"),
        ("keras/resnet50", "weights list"),
        ("timm/inception_v3.tf_adv_in1k", "hf://timm/inception_v3.tf_adv_in1k"),
    ],
)
def test_a_name_that_is_not_there(server, cache, wrong, right):
    with pytest.raises(InputMissingError, match="no such weight file or name") as raised:
        open_network(wrong)
    assert right in raised.value.fix


@pytest.mark.parametrize("name", PICKLES)
def test_weights_that_are_only_a_pickle(server, cache, name):
    with pytest.raises(BadDataError, match="only as a pickle") as raised:
        open_network(name)
    assert "safetensors.torch" in raised.value.fix
    assert server.seen == []


def test_every_release_says_where_it_is_and_what_it_must_be():
    for name, release in RELEASES.items():
        assert name.startswith("timm/" if release.repository else "keras/")
        assert {len(value) for value in release.pins.values()} <= {32, 64}
        assert release.repository in (None, name)
        assert release.pins or not release.checked
    assert len(KERAS_FILES) == 4


def call(monkeypatch, capsys, *arguments: object) -> str:
    """Runs a command in this process and returns what it printed."""
    monkeypatch.setattr(sys, "argv", ["xception_jax", *map(str, arguments)])
    assert main() == 0
    return capsys.readouterr().out


def test_commands_take_addresses(server, cache, flowers, tmp_path, monkeypatch, capsys):
    out = tmp_path / "y.safetensors"
    report = json.loads(call(monkeypatch, capsys, "convert", FLOWERS, out, "--json"))
    assert report["source_sha256"] == hashlib.sha256(flowers).hexdigest()
    assert load_network(out).classes == ("daisy", "tulip")


def test_the_list(server, cache, monkeypatch, capsys):
    rows = {row["name"]: row for row in json.loads(call(monkeypatch, capsys, "weights", "list", "--json"))}
    assert rows.keys() == RELEASES.keys()
    assert not any(row["cached"] or row["checked"] for row in rows.values())
    path = call(monkeypatch, capsys, "weights", "path", NAME).strip()
    assert Path(path).read_bytes() == CONTENT
    rows = {row["name"]: row for row in json.loads(call(monkeypatch, capsys, "weights", "list", "--json"))}
    assert [name for name in rows if rows[name]["cached"]] == [NAME]
    assert rows[NAME]["path"] == path
    lines = call(monkeypatch, capsys, "weights", "list").splitlines()
    line = next(line for line in lines if line.startswith(f"{NAME} "))
    assert " ".join(line.split()[1:]) == "xception 92 MB 79.0 % yes md5 (published, not yet compared)"


def test_verify(server, cache, flowers, tmp_path, monkeypatch, capsys):
    assert "nothing is in the cache" in call(monkeypatch, capsys, "weights", "verify")
    path = sources.find(NAME).path
    other = sources.find(FLOWERS).path
    (cache / "kernels").mkdir()  # of the CPU, compiled before
    for name in ("a.so", "a.so.sha256"):
        (cache / "kernels" / name).write_text("x")
    lines = call(monkeypatch, capsys, "weights", "verify").splitlines()
    assert lines == [f"{other}: has the recorded SHA-256", f"{NAME}: has the pinned md5"]
    sources.recorded(path).unlink()
    assert call(monkeypatch, capsys, "weights", "verify").splitlines() == lines
    for wrong, message in ((FLOWERS, "no such file"), (tmp_path, "this is a directory")):
        with pytest.raises(InputMissingError, match=message) as error:
            call(monkeypatch, capsys, "weights", "verify", wrong)
        assert str(wrong) in str(error.value)
    copy = tmp_path / "copy.h5"
    copy.write_bytes(CONTENT)
    assert hashlib.sha256(CONTENT).hexdigest() in call(monkeypatch, capsys, "weights", "verify", copy)
    other.write_bytes(b"")
    with pytest.raises(BadDataError, match="1 of 2 files are damaged"):
        call(monkeypatch, capsys, "weights", "verify")
    sources.recorded(path).unlink()
    path.write_bytes(b"")
    with pytest.raises(BadDataError, match="1 of 1 files are damaged"):
        call(monkeypatch, capsys, "weights", "verify", NAME)
    path.unlink()
    with pytest.raises(InputMissingError, match="no such file"):
        call(monkeypatch, capsys, "weights", "verify", NAME)
    with pytest.raises(InputMissingError, match="no such weight file"):
        call(monkeypatch, capsys, "weights", "path", tmp_path / "none.h5")


def test_the_command_does_not_need_jax(server, cache):
    code = (
        "import sys; from xception_jax.cli import main; from xception_jax.command_line import run_main\n"
        "try: run_main(main)\nfinally: print('jax' in sys.modules, file=sys.stderr)"
    )
    for arguments, status_ in ((["list"], 0), (["--help"], 0), (["path", "keras/xeption"], 66)):
        done = subprocess.run([sys.executable, "-c", code, "weights", *arguments], capture_output=True, text=True)
        assert done.returncode == status_
        assert done.stderr.splitlines()[-1] == "False"
