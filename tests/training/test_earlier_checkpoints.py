"""A work directory that commit 4f6f645 wrote: its checkpoint has a manifest, but no digest."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from xception_jax.api import train
from xception_jax.config import from_json, override
from xception_jax.errors import BadDataError
from xception_jax.files import sha256
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.training import digest
from xception_jax.training.restore import open_run
from xception_jax.training.summary import Summary

ARCHIVE = Path(__file__).parent.parent / "data_of_releases" / "4f6f645" / "run.tar.xz"
STATE = "3af35e7b9a20bd2e22c5798dd9dc7c9f740243f412d97cf2e7a1856844e1595e"  # what that run printed at its end


@pytest.fixture
def workdir(tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def go_on(workdir: Path, duration: str) -> Summary:
    config = from_json((workdir / "config.json").read_text())
    changes = {"duration": duration, "evaluation.heat_maps": 0, "checkpoint.keep_latest": 9}
    return train(override(config, changes), str(workdir))


@pytest.mark.slow
def test_it_is_restored_to_the_bit_and_trained_further(workdir, capsys):
    assert go_on(workdir, "8 steps").state_sha256 == STATE
    assert not digest.exists(workdir / "checkpoints" / "8")
    summary = go_on(workdir, "10 steps")
    assert "damaged" not in capsys.readouterr().err
    assert summary.state_sha256 != STATE
    assert digest.exists(workdir / "checkpoints" / "10")
    assert [e["step"] for e in read_metrics(workdir / "metrics.jsonl") if e["split"] == "train"] == [2, 4, 6, 8, 10]
    assert open_run(str(workdir)).step == 10


def test_it_is_read_as_a_network(workdir):
    run = open_run(str(workdir))
    assert run.step == 8
    assert run.sha256 == sha256(workdir / "checkpoints" / "8" / "manifest.json")
    assert list(run.variables) == ["", "ema_"]
    assert np.isfinite(run.variables["ema_"]["params"]["head"]["predictions"]["kernel"]).all()


def rename(checkpoints: Path) -> None:
    (checkpoints / "8").rename(checkpoints / "9")


def drop_the_manifest(checkpoints: Path) -> None:
    (checkpoints / "8" / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(rename, "it holds the state of step 8"), (drop_the_manifest, "it has neither a manifest nor a digest")],
)
def test_it_is_not_used_without_proof(workdir, damage, reason):
    damage(workdir / "checkpoints")
    before = sorted(workdir.rglob("*"))
    with pytest.raises(BadDataError, match="every checkpoint is damaged") as caught:
        open_run(str(workdir))
    assert reason in caught.value.where
    assert sorted(workdir.rglob("*")) == before
    with pytest.raises(BadDataError, match="every checkpoint is damaged") as caught:
        go_on(workdir, "10 steps")
    assert reason in caught.value.where
    assert list((workdir / "checkpoints").glob("*.corrupt-*"))


def test_a_copy_under_another_number_is_not_used(workdir):
    shutil.copytree(workdir / "checkpoints" / "8", workdir / "checkpoints" / "12")
    assert open_run(str(workdir)).step == 8


@pytest.mark.slow
def test_exchanged_steps_change_nothing_in_the_end(workdir, tmp_path_factory, capsys):
    """The newer steps have digests, the older one is of that version."""
    ended = go_on(workdir, "20 steps")
    checkpoints = tmp_path_factory.mktemp("exchanged") / "checkpoints"
    shutil.copytree(workdir, checkpoints.parent, dirs_exist_ok=True)
    shutil.rmtree(checkpoints / "20")
    for name, new in (("12", "between"), ("16", "12"), ("between", "16")):
        (checkpoints / name).rename(checkpoints / new)
    assert open_run(str(checkpoints.parent)).step == 8
    capsys.readouterr()
    assert go_on(checkpoints.parent, "20 steps").state_sha256 == ended.state_sha256
    lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert [line.split(" and was")[0] for line in lines] == [
        "checkpoint 16 is damaged (it holds the state of step 12)",
        "checkpoint 12 is damaged (it holds the state of step 16)",
    ]
