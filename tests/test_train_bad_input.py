"""What a user mistypes: the whole program says in three lines what is wrong, where, and what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.tiny_run import TINY, three_lines
from xception_jax.cli import main
from xception_jax.command_line import run_main


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--config.batchsize=3"], 78, "did you mean config.batch_size"),
        (["--config.batch_size=0"], 78, "at least 1"),
        (["--config.batch_size=abc"], 78, "whole number"),
        (["--config.schedule.learning_rate=-1"], 78, "above 0"),
        (["--config.model.name=resnet"], 78, "'inception_v3'"),
        (["--config.mesh.fsdp=3"], 78, "does not fit 1 devices"),
        (["--config.model.num_classes=11"], 78, "set it to 10"),
        (["--config.loss.name=sigmoid"], 78, "set it to 'softmax'"),
        (["--config.data.name=imagenet2012"], 66, "xception-jax prepare imagenet2012"),
        (["--config.data.eval_split=nothing"], 66, "no split 'nothing'"),
        (["--config.data.eval_split=train[600:700]"], 78, "eval_split=train[600:700] share images"),
        (["--config.data.test_split=train[800:]"], 78, "config.data.test_split=train[800:] share images"),
        (["--config=configs/nothing.py"], 66, "choose one of fashion_mnist"),
        (["--config=nothing"], 66, "choose one of fashion_mnist"),
        (["--config=studies/spectrum"], 66, "there is no config studies/spectrum"),
        (["--nothing=1"], 64, "--help"),
        (["--config.seed=1", "--config.data.cache", "2"], 78, "True or False"),
        (["nothing"], 64, "unrecognized arguments: nothing"),
        (["--workdir=gs://"], 78, "gs://"),
        (["--workdir=s3://bucket/run"], 73, "use a local directory"),
        (["--workdir="], 64, "is empty"),
        (["--config.data.data_dir=gs://bucket/data"], 78, "gcloud storage cp"),
        (["--config.batch_size=2000", "--config.duration=1 epoch"], 78, "at most 640"),
    ],
)
def test_bad_input_costs_three_lines(monkeypatch, capsys, tmp_path, arguments, code, words):
    command = ["xception-jax", "train", *TINY, f"--workdir={tmp_path / 'run'}", *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as raised:
        run_main(main)
    process = subprocess.CompletedProcess(command, raised.value.code, *capsys.readouterr())
    assert process.returncode == code, process.stderr
    assert words in " ".join(three_lines(process))
    assert not (ROOT / "gs:").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:\n", "broken.py:1"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    import os\n    return os.nothing\n", "broken.py:3"),
    ],
)
def test_a_config_that_does_not_run_is_named_with_its_line(run_python, tmp_path, text, words):
    path = tmp_path / "broken.py"
    path.write_text(text)
    process = run_python("train.py", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert process.returncode == 78, process.stderr
    assert words in " ".join(three_lines(process))


def test_without_a_config_or_with_a_file_as_work_directory(run_python, tmp_path):
    process = run_python("train.py")
    assert process.returncode == 64
    assert "train --config=fashion_mnist --workdir=" in three_lines(process)[2]
    file = tmp_path / "file"
    file.touch()
    process = run_python("train.py", *TINY, f"--workdir={file}")
    assert process.returncode == 73
    three_lines(process)


def test_help_names_the_fields_and_where_defaults_come_from(run_python):
    process = run_python("train.py", "--help")
    assert process.returncode == 0
    lines = process.stdout.splitlines()
    schedule = lines[lines.index("schedule:") : lines.index("ema:")]
    rate = schedule.index("  config.schedule.learning_rate=0.045")
    assert schedule[rate + 1].startswith("      a number above 0")
    assert "paper: section 4.2" in schedule[rate + 1]
    assert max(map(len, lines)) <= 120
