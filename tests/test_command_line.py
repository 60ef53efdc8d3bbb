"""Command lines that make no sense: three lines and an exit code, whichever command."""

from __future__ import annotations

import sys

import pytest

from xception_jax.cli import COMMANDS, main
from xception_jax.command_line import read_config, run_main, split_overrides
from xception_jax.config.shipped import shipped_names
from xception_jax.errors import ConfigError, InputMissingError

LONG = "long" * 2000


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("", 64, "required: command"),
        ("nonsense", 64, "invalid choice: 'nonsense'"),
        ("evaluate --compare a.npz", 64, "--compare: expected 2 arguments"),
        ("predict a.png --weights b --top many", 64, "invalid int value: 'many'"),
        ("predict a.png --weights b --nonsense", 64, "unrecognized arguments: --nonsense"),
        (f"predict {LONG} --weights b", 66, "no such image"),
        (f"evaluate {LONG}", 66, "no such weight file"),
    ],
)
def test_a_wrong_command_line_costs_three_lines(arguments, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["xception_jax", *arguments.split()])
    with pytest.raises(SystemExit) as raised:
        run_main(main)
    assert raised.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "where", "fix"]
    assert words in lines[0]


def run_command(*arguments, monkeypatch):
    """Runs a command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["xception-jax", *arguments])
    with pytest.raises(SystemExit) as raised:
        run_main(main)
    return raised.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_program_that_runs(command, monkeypatch, capsys):
    assert run_command(command, "--help", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: xception-jax {command}")
    assert "python -m" not in text
    monkeypatch.setattr(sys, "argv", ["somewhere/__main__.py", command, "--help"])
    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().out.replace("python -m xception_jax", "xception-jax").split() == text.split()


# A process, because this one has imported JAX.
def test_help_and_missing_files_do_not_wait_for_jax(run_python, tmp_path):
    lines = [["--version"], *([command, "--help"] for command in COMMANDS)]
    lines += [
        ["train", "--config=nothing", "--workdir=x"],
        ["predict", "nothing.jpg", "--weights=x"],
        ["predict", "README.md", "--weights=nothing.h5"],
        ["evaluate", "nothing"],
        ["explain", "README.md", "--weights=nothing.h5"],
        ["embed", "README.md", "--weights=nothing.h5", "--out=x.npz"],
        ["probe", "nothing.npz", "nothing.npz"],
        ["export", "nothing", "x", "--format=stablehlo"],
        ["convert", "nothing.h5", "x.safetensors"],
        ["study", "run", "studies/nothing", "--workdir=x"],
        ["study", "report", "nothing"],
        ["study", "kernels", "nothing"],
    ]
    code = f"""
import contextlib, io, sys
from xception_jax.cli import main
from xception_jax.errors import InputMissingError
for arguments in {lines!r}:
    sys.argv = ["xception-jax", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(InputMissingError, SystemExit):
        main()
        print(arguments, "is accepted", file=sys.stderr)
    loaded = {{"jax", "matplotlib", "flax", "tensorflow_datasets"}} & set(sys.modules)
    assert not loaded, (arguments, loaded)
"""
    process = run_python("-c", code)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""


def test_overrides_may_stand_anywhere_and_without_an_equals_sign():
    arguments = [
        "--config.seed",
        "-3",
        "train",
        "--config.data.cache",
        "--config=imagenet",
        "--noconfig.model.residual",
    ]
    others, overrides = split_overrides(arguments)
    assert others == ["train", "--config=imagenet"]
    assert overrides == ["--config.seed=-3", "--config.data.cache", "--noconfig.model.residual"]
    config = read_config("imagenet:inception_v3", overrides)
    assert (config.seed, config.data.cache, config.model.residual) == (-3, True, False)
    assert config.model.name == "inception_v3"


def test_a_name_is_a_shipped_config_and_a_path_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion_mnist").mkdir()
    (tmp_path / "mine.py").write_text("from xception_jax.config import default_config as get_config\n")
    assert "fashion_mnist" in shipped_names()
    assert read_config("fashion_mnist", []).batch_size == 64
    assert read_config("mine.py", ["--config.batch_size=3"]).batch_size == 3
    for missing in ("mine", "fashion_mnist.py", "configs/imagenet.py", "studies/spectrum"):
        with pytest.raises(InputMissingError, match="there is no config"):
            read_config(missing, [])


@pytest.mark.parametrize("name", ["finetune", "open_images", "fashion_mnist"])
def test_a_variant_that_a_config_does_not_have_is_refused(name):
    with pytest.raises(ConfigError, match=r"nothing|1 was given"):
        read_config(f"{name}:nothing", ["--config.batch_size=8"])
    assert read_config(name, ["--config.batch_size=8"]).batch_size == 8
