"""Directories that were renamed, exchanged, copied or changed, with and without their manifests."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from xception_jax.errors import BadDataError
from xception_jax.training import digest, manifest
from xception_jax.training.checkpoint import Checkpoints
from xception_jax.training.fingerprint import state_fingerprint
from xception_jax.training.manifest import DamagedError, sealed


def state_at(step: int) -> dict:
    noise = np.random.default_rng(step).standard_normal((64, 32), np.float32)
    return {"params": {"kernel": jax.numpy.asarray(noise)}, "step": jax.numpy.int32(step)}


ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state_at(0))


def fill(directory: Path, steps: tuple[int, ...] = (20, 40, 60)) -> None:
    with Checkpoints(directory, keep_latest=10, report=lambda line: None) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step), {"top1": float("nan")})


def latest(directory: Path, **options) -> tuple[int, list[str]]:
    """Returns the step that was restored, after a check of its bits, and the lines that were reported."""
    lines: list[str] = []
    with Checkpoints(directory, keep_latest=10, report=lines.append, **options) as checkpoints:
        step, state = checkpoints.restore_latest(ABSTRACT)
    assert state_fingerprint(state) == state_fingerprint(state_at(step))
    return step, lines


def exchange(directory: Path, one: str, other: str) -> None:
    (directory / one).rename(directory / "between")
    (directory / other).rename(directory / one)
    (directory / "between").rename(directory / other)


def copy(directory: Path, one: str, other: str) -> None:
    shutil.rmtree(directory / other, ignore_errors=True)
    shutil.copytree(directory / one, directory / other)


def drop_manifests(directory: Path) -> None:
    for path in directory.glob("*/manifest.json"):
        path.unlink()


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("filled")
    fill(directory)
    return directory


@pytest.fixture
def checkpoints(filled, tmp_path) -> Path:
    shutil.copytree(filled, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


# --- directories -----------------------------------------------------------------------------------------------------

MOVES = {
    "exchanged": (lambda d: exchange(d, "40", "60"), {"60": "40", "40": "60"}),
    "renamed": (lambda d: (d / "60").rename(d / "100"), {"100": "60"}),
    "copied": (lambda d: copy(d, "40", "100"), {"100": "40"}),
    "copied over": (lambda d: copy(d, "40", "60"), {"60": "40"}),
    "linked": (lambda d: (d / "100").symlink_to("40"), {"100": "40"}),
    "only the state copied": (lambda d: copy(d, "40/default", "60/default"), {"60": None}),
    "only the digest copied": (lambda d: copy(d, "40/digest", "60/digest"), {"60": None}),
    "state and digest copied": (
        lambda d: [copy(d, f"40/{item}", f"60/{item}") for item in ("default", "digest")],
        {"60": None},
    ),
    "renamed far away": (lambda d: (d / "60").rename(d / str(10**30)), {str(10**30): "60"}),
}


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("move", MOVES)
def test_step_that_is_not_what_its_name_says_is_set_aside(checkpoints, move, with_manifest):
    move, wrong = MOVES[move]
    move(checkpoints)
    if not with_manifest:
        drop_manifests(checkpoints)
    step, lines = latest(checkpoints)
    assert step == max(
        {20, 40, 60} - {int(name) for name in wrong} & {int(n) for n in os.listdir(checkpoints) if n.isdigit()}
    )
    for (name, holds), line in zip(wrong.items(), lines, strict=False):
        reason = f"checkpoint {name} is damaged (it holds the state of step {holds}) and was kept as {name}.corrupt-"
        assert line.startswith(reason if holds and with_manifest else f"checkpoint {name} is damaged (")
    assert len(lines) == len(wrong) + (not with_manifest)
    assert latest(checkpoints) == (step, [])
    assert not (checkpoints / "40" / "damage.txt").exists()


@pytest.mark.parametrize("with_manifest", [True, False])
def test_step_of_another_run_is_set_aside(checkpoints, tmp_path, with_manifest):
    """Both runs have the same config, and even the same states."""
    fill(tmp_path / "other")
    copy(tmp_path, "other/60", "checkpoints/60")
    if not with_manifest:
        drop_manifests(checkpoints)
    before = sorted(checkpoints.rglob("*"))
    for read_only in (True, False):
        assert not read_only or sorted(checkpoints.rglob("*")) == before
        step, lines = latest(checkpoints, read_only=read_only)
        assert step == 40
        assert lines[0].startswith("checkpoint 60 is damaged (it was saved by another run)")


def test_identity_of_the_run_follows_its_directory(checkpoints, tmp_path):
    checkpoints.rename(tmp_path / "moved")
    assert latest(tmp_path / "moved") == (60, [])
    run = (tmp_path / "moved" / "run_id").read_text()
    for content in (None, "", "not an identifier", "\0" * 100):
        if content is None:
            (tmp_path / "moved" / "run_id").unlink()
        else:
            (tmp_path / "moved" / "run_id").write_text(content)
        assert latest(tmp_path / "moved") == (60, [])
        assert (tmp_path / "moved" / "run_id").read_text() == run


def test_without_its_identifier_most_steps_decide(checkpoints, tmp_path):
    fill(tmp_path / "other")
    copy(tmp_path, "other/60", "checkpoints/60")
    (checkpoints / "run_id").unlink()
    step, lines = latest(checkpoints)
    assert step == 40
    assert "it was saved by another run" in lines[0]


def test_a_step_of_a_backup_is_welcome_in_a_new_directory(checkpoints, tmp_path):
    shutil.copytree(checkpoints / "40", tmp_path / "new" / "40")
    assert latest(tmp_path / "new") == (40, [])
    assert (tmp_path / "new" / "run_id").read_text() == (checkpoints / "run_id").read_text()


def test_one_step_that_is_asked_for_is_verified_too(checkpoints):
    exchange(checkpoints, "40", "60")
    with Checkpoints(checkpoints, read_only=True) as opened:
        with pytest.raises(BadDataError, match="checkpoint 60 is damaged: it holds the state of step 40"):
            opened.restore(60, ABSTRACT)
    assert (checkpoints / "60").exists()


# --- manifests and digests -------------------------------------------------------------------------------------------


def test_deleted_manifest_is_written_again_when_the_content_matches(checkpoints):
    path = checkpoints / "60" / "manifest.json"
    before = path.read_text()
    path.unlink()
    line = "checkpoint 60 had no manifest; its content matches its digest, so a manifest is added"
    assert latest(checkpoints) == (60, [line])
    assert path.read_text() == before


@pytest.mark.parametrize("which", [("manifest.json", "digest"), ("manifest.json", "digest/digest.json"), ("digest",)])
def test_without_proof_a_step_is_not_used(checkpoints, which):
    for name in which:
        path = checkpoints / "60" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    step, lines = latest(checkpoints)
    assert step == 40
    reason = "it has neither a manifest nor a digest" if len(which) == 2 else "digest/commit_success.txt is missing"
    assert reason in lines[0]


def deep(levels: int = 100_000) -> str:
    return "[" * levels + "]" * levels


def resealed(change):
    """Returns a damage that changes the content of a manifest or digest and gives it a seal that fits."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        del content["sha256"]
        change(content)
        path.write_text(sealed(content))

    return damage


def replace_by(make):
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


MALFORMED = {
    "empty": lambda path: path.write_text(""),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "null": lambda path: path.write_text("null"),
    "list": lambda path: path.write_text("[1]"),
    "text": lambda path: path.write_text('"sha256"'),
    "number": lambda path: path.write_text("1e999"),
    "huge number": lambda path: path.write_text('{"sha256": ' + "9" * 10_000 + "}"),
    "no object": lambda path: path.write_text('{"sha256": []}'),
    "nested list": lambda path: path.write_text(deep()),
    "nested value": lambda path: path.write_text('{"sha256": "", "record": ' + deep() + "}"),
    "nested just so": lambda path: path.write_text('{"sha256": "", "record": ' + deep(900) + "}"),
    "nested objects": lambda path: path.write_text('{"a":' * 50_000 + "1" + "}" * 50_000),
    "lone surrogate": lambda path: path.write_text('{"sha256": "\\ud800"}'),
    "65 MiB": lambda path: os.truncate(path, 65 << 20),
    "directory": replace_by(lambda path: path.mkdir()),
    "pipe": replace_by(os.mkfifo),
    "link to a device": replace_by(lambda path: path.symlink_to("/dev/zero")),
    "link to itself": replace_by(lambda path: path.symlink_to(path.name)),
    "no record": resealed(lambda content: content.pop("record")),
    "record of text": resealed(lambda content: content.update(record="x")),
    "record without step": resealed(lambda content: content["record"].pop("step")),
    "step of text": resealed(lambda content: content["record"].update(step="60")),
    "step of lists": resealed(lambda content: content["record"].update(step=[["\x1b[31m\n"]])),
    "metrics of text": resealed(lambda content: content["record"].update(metrics={"top1": "high"})),
    "metrics of lists": resealed(lambda content: content["record"].update(metrics=[1])),
    "identity of numbers": resealed(lambda content: content["record"].update(identity={"dataset": [1]})),
    "run of numbers": resealed(lambda content: content["record"].update(run=[1])),
    "files of lists": resealed(lambda content: content.update(files=[1])),
    "file of numbers": resealed(lambda content: content.update(files={"a": 1})),
    "size of text": resealed(lambda content: content.update(files={"a": {"size": "1", "sha256": ""}})),
    "name with NUL": resealed(lambda content: content.update(files={"a\0\x1b[31m\n": {"size": 1, "sha256": ""}})),
    "name of a surrogate": resealed(lambda content: content.update(files={"\ud800": {"size": 1, "sha256": ""}})),
    "name too long": resealed(lambda content: content.update(files={"x" * 10_000: {"size": 1, "sha256": ""}})),
    "name of a device": resealed(lambda content: content.update(files={"/dev/zero": {"size": 0, "sha256": ""}})),
}
ONLY_DIGEST = {
    "no arrays": resealed(lambda content: content.pop("arrays")),
    "arrays of lists": resealed(lambda content: content.update(arrays=[1])),
    "an array less": resealed(lambda content: content["arrays"].pop("step")),
    "an array more": resealed(lambda content: content["arrays"].update(more=content["arrays"]["step"])),
    "array of text": resealed(lambda content: content["arrays"].update(step="x")),
    "no parts": resealed(lambda content: content["arrays"]["params/kernel"].update(parts={})),
    "parts of lists": resealed(lambda content: content["arrays"]["params/kernel"].update(parts=[1])),
    "part outside": resealed(lambda content: content["arrays"]["params/kernel"].update(parts={"0:64,0:33": "x"})),
    "index of text": resealed(lambda content: content["arrays"]["params/kernel"].update(parts={"x": "x"})),
    "three axes": resealed(lambda content: content["arrays"]["params/kernel"].update(parts={"0:1,0:1,0:1": "x"})),
    "another dtype": resealed(lambda content: content["arrays"]["params/kernel"].update(array="int32[64, 32]")),
    "another digest": resealed(lambda content: content["arrays"]["params/kernel"].update(parts={"0:64,0:32": "x"})),
    "no metadata": resealed(lambda content: content.pop("metadata")),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("manifest.json", kind) for kind in MALFORMED] + [("digest", kind) for kind in [*MALFORMED, *ONLY_DIGEST]],
)
def test_malformed_manifest_or_digest_sets_the_step_aside(checkpoints, name, kind):
    path = checkpoints / "60" / ("digest/digest.json" if name == "digest" else name)
    if name == "digest":
        (checkpoints / "60" / "manifest.json").unlink()
    (MALFORMED | ONLY_DIGEST)[kind](path)
    step, lines = latest(checkpoints, best_metric="top1", keep_best=1)
    assert (step, len(lines)) == (40, 1)
    assert lines[0].isprintable()
    assert len(lines[0]) < 500
    assert lines[0].startswith("checkpoint 60 is damaged (")


def test_manifest_that_lists_less_than_the_digest(checkpoints):
    resealed(lambda content: content["files"].clear())(checkpoints / "60" / "manifest.json")
    step, lines = latest(checkpoints)
    assert step == 40
    assert "manifest.json and digest.json differ" in lines[0]


@pytest.mark.parametrize("kind", ["binary", "nested list", "list", "65 MiB", "pipe", "link to a device"])
def test_malformed_metadata_of_orbax(checkpoints, kind):
    (checkpoints / "60" / "manifest.json").unlink()
    MALFORMED[kind](checkpoints / "60" / "_CHECKPOINT_METADATA")
    step, lines = latest(checkpoints)
    assert (step, len(lines)) == (40, 1)


@pytest.mark.parametrize("run", ["x", "\0", 1, None, ["a"]])
def test_identity_that_is_none(checkpoints, run):
    (checkpoints / "run_id").unlink()
    for step in (20, 40, 60):
        (checkpoints / str(step) / "manifest.json").unlink()
        resealed(lambda content: content["record"].update(run=run))(checkpoints / str(step) / "digest" / "digest.json")
    with Checkpoints(checkpoints) as opened, pytest.raises(BadDataError, match="every checkpoint is damaged"):
        opened.restore_latest(ABSTRACT)


@pytest.mark.parametrize(
    "content", ["nested " * 1000, "two\nlines \x1b[31m", b"\xff\xfe", None], ids=["long", "lines", "binary", "pipe"]
)
def test_hostile_reason_of_an_earlier_run(checkpoints, content):
    for path in checkpoints.glob("[0-9]*"):
        path.rename(checkpoints / f"{path.name}.corrupt-then")
    path = checkpoints / "60.corrupt-then" / "damage.txt"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with Checkpoints(checkpoints) as opened, pytest.raises(BadDataError, match="every checkpoint is damaged") as caught:
        opened.restore_latest(ABSTRACT)
    assert caught.value.where.isprintable()
    assert len(caught.value.where) < 2000


# --- flipped bits ----------------------------------------------------------------------------------------------------


def flips(directory: Path, places: list[tuple[Path, int]], seed: int) -> dict[str, int]:
    """Flips one bit of each byte, one after the other. Returns how many were found, and how many nothing reads."""
    moments, outcomes = random.Random(seed), {"found": 0, "not read": 0}
    with Checkpoints(directory, read_only=True, report=lambda line: None) as opened:
        for path, place in places:
            before = path.read_bytes()
            changed = bytearray(before)
            changed[place] ^= 1 << moments.randrange(8)
            path.write_bytes(changed)
            try:
                restored = opened.restore(60, ABSTRACT)
            except BadDataError:
                outcomes["found"] += 1
            else:
                assert state_fingerprint(restored) == state_fingerprint(state_at(60)), path
                name = path.relative_to(directory / "60").as_posix()
                assert name == "_CHECKPOINT_METADATA", path
                assert same_but_time(before, changed)
                outcomes["not read"] += 1
            path.write_bytes(before)
    return outcomes


def every_byte(directory: Path) -> list[tuple[Path, int]]:
    return [(path, place) for path in manifest.files_below(directory) for place in range(path.stat().st_size)]


def same_but_time(*contents: bytes) -> bool:
    one, other = map(json.loads, contents)
    return one.pop("commit_timestamp_nsecs") != other.pop("commit_timestamp_nsecs") and one == other


COUNTS = [40, pytest.param(None, marks=pytest.mark.faults)]  # some bytes, and all of them


@pytest.mark.parametrize("count", COUNTS)
def test_every_flipped_bit_is_found(checkpoints, count):
    places = every_byte(checkpoints / "60")
    places = random.Random(0).sample(places, count) if count else places
    assert flips(checkpoints, places, seed=0) == {"found": len(places), "not read": 0}


@pytest.mark.parametrize("count", COUNTS)
def test_every_flipped_bit_that_is_read_is_found_without_a_manifest(checkpoints, count):
    drop_manifests(checkpoints)
    places = every_byte(checkpoints / "60")
    places = random.Random(0).sample(places, count) if count else places
    outcomes = flips(checkpoints, places, seed=1)
    print(f"a bit flipped in {len(places):,} bytes, without a manifest: {outcomes}")
    assert sum(outcomes.values()) == len(places)
    assert outcomes["not read"] <= 19  # digits of the time of the commit


@pytest.mark.parametrize("name", ["params/kernel", "step"])
def test_flipped_bit_of_a_restored_array_is_found(checkpoints, name):
    """As if memory or a library had changed it: the files are intact."""
    found = digest.read(checkpoints / "60")
    state = jax.tree.map(lambda leaf: np.array(leaf), state_at(60))
    found.verify_arrays(state)
    array = state["step"] if name == "step" else state["params"]["kernel"]
    array.reshape(-1).view(np.uint8)[-1] ^= 1
    with pytest.raises(DamagedError, match=f"the SHA-256 of the array {name} differs"):
        found.verify_arrays(state)
