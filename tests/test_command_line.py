"""Command lines that make no sense: three lines and an exit code, whichever command."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import subprocess
import sys
from importlib import import_module

import pytest

from tests.conftest import ROOT
from xception_jax.cli import COMMANDS, main, parse
from xception_jax.command_line import Parser, read_config, run_main, split_overrides
from xception_jax.config import FIELDS, resolve
from xception_jax.config.shipped import shipped_names
from xception_jax.errors import ConfigError, InputMissingError, UsageError, UserError

LONG = "long" * 2000


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("", 64, "required: command"),
        ("nonsense", 64, "invalid choice: 'nonsense'"),
        ("evaluate --compare a.npz", 64, "--compare: expected 2 arguments"),
        ("predict a.png --weights b --top many", 64, "invalid int value: 'many'"),
        ("predict a.png --weights b --nonsense", 64, "unrecognized arguments: --nonsense"),
        ("train --config=mnist --batch_sise=3", 64, "unrecognized arguments: --batch_sise=3"),
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


@pytest.mark.parametrize(
    ("argument", "fix"),
    [
        ("--batch_size=3", "did you mean --config.batch_size?"),
        ("--data.name=x", "did you mean --config.data.name?"),
        ("--learning_rate=1", "did you mean --config.schedule.learning_rate?"),
        ("--size=3", "see "),
    ],
)
def test_an_option_that_is_a_field_is_answered_with_it(argument, fix):
    for command in (
        ["train", "--config=fashion_mnist", "--workdir=x"],
        ["plan", "--config=imagenet", "--topology=v5e:8"],
    ):
        with pytest.raises(UsageError, match=f"unrecognized arguments: {argument}") as error:
            parse([*command, argument])
        assert error.value.fix.startswith(fix)
    with pytest.raises(UsageError) as error:  # a command without a config
        parse(["predict", "a.png", "--weights=b", "--learning_rate=1"])
    assert error.value.fix.endswith("predict --help")


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


@pytest.mark.parametrize(
    ("body", "override", "expected"),
    [
        ("config = default_config(); config.model.segments = 4", "model.segments=depthwise", "depthwise"),
        (
            "config = default_config(); config.loss.class_weights = (1.0, 2.0)",
            "loss.class_weights=balanced",
            "balanced",
        ),
        ("config = default_config(); config.model.group_width = 4", "model.group_width=2", 2),
        ("config = default_config(); config.model.group_width = 4", "model.group_width=None", None),
        ("config = ConfigDict({'batch_size': 32})", "seed=3", 3),
        ("config = ConfigDict({'batch_size': 32})", "data.augmentation=shift", "shift"),
        ("config = FrozenConfigDict(default_config())", "seed=3", 3),
    ],
)
def test_a_field_is_overridden_whatever_the_file_says(body, override, expected, tmp_path):
    imports = (
        "from ml_collections import ConfigDict, FrozenConfigDict\nfrom xception_jax.config import default_config\n"
    )
    (tmp_path / "mine.py").write_text(f"{imports}\n\ndef get_config():\n    {body}\n    return config\n")
    config = resolve(read_config(str(tmp_path / "mine.py"), [f"--config.{override}"]))
    assert functools.reduce(getattr, override.partition("=")[0].split("."), config) == expected


@pytest.mark.parametrize(("values", "expected"), [(["3", "None"], None), (["None", "3"], 3)])
def test_of_several_overrides_the_last_counts(values, expected):
    overrides = [f"--config.model.stem_width={value}" for value in values]
    assert resolve(read_config("fashion_mnist", overrides)).model.stem_width == expected


def test_references_between_fields_follow_an_override(tmp_path):
    body = "config = default_config(); config.evaluation.batch_size = config.get_ref('batch_size') * 2"
    text = f"from xception_jax.config import default_config\n\n\ndef get_config():\n    {body}\n    return config\n"
    (tmp_path / "mine.py").write_text(text)
    assert read_config(str(tmp_path / "mine.py"), ["--config.batch_size=5"]).evaluation.batch_size == 10


def test_a_file_may_postpone_annotations(tmp_path):
    lines = [
        "from __future__ import annotations",
        "import dataclasses",
        "from xception_jax.config import default_config",
    ]
    lines += ["@dataclasses.dataclass", "class Setting:", "    seed: int = 3"]
    lines += [
        "def get_config():",
        "    config = default_config()",
        "    config.seed = Setting().seed",
        "    return config",
    ]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    assert read_config(str(tmp_path / "mine.py"), []).seed == 3


@pytest.mark.parametrize("name", ["finetune", "open_images", "fashion_mnist"])
def test_a_variant_that_a_config_does_not_have_is_refused(name):
    with pytest.raises(ConfigError, match=r"nothing|1 was given"):
        read_config(f"{name}:nothing", ["--config.batch_size=8"])
    assert read_config(name, ["--config.batch_size=8"]).batch_size == 8


def test_a_work_directory_that_cannot_be_used_is_refused_before_jax_is_imported(run_python, tmp_path):
    from xception_jax.training.workdir import hold_directory

    (tmp_path / "file").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "lock").symlink_to(tmp_path / "file")
    places = [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "linked", tmp_path / "held"]
    code = f"""
import sys
from xception_jax.cli import main
from xception_jax.errors import WorkdirError
for place in {[str(place) for place in places]!r}:
    sys.argv = ["xception-jax", "train", "--config=fashion_mnist", f"--workdir={{place}}"]
    try:
        main()
    except WorkdirError as error:
        print(error)
    assert "jax" not in sys.modules, place
"""
    with hold_directory(tmp_path / "held"):
        process = run_python("-c", code)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("there is a file in its place") == 2
    assert process.stdout.count("error: ") == len(places)
    assert f"process {os.getpid()}" in process.stdout


VALUES = ("", "-1", "0", "9" * 400, "1e400", "nan", "\x00", "[" * 10_000, "\udc80", "x" * 5000, "=", "None", "a\nb")


def three_lines_and_a_code(arguments, capsys, monkeypatch):
    """Runs a command that must refuse its arguments, in three lines and without a traceback."""
    code = run_command(*arguments, monkeypatch=monkeypatch)
    errors = capsys.readouterr().err
    assert code in (64, 65, 66, 73, 74, 78), (arguments, errors)
    lines = [line for line in errors.splitlines() if line.startswith(("error: ", "  where: ", "  fix: "))]
    assert [line.split(":")[0].strip() for line in lines] == ["error", "where", "fix"], (arguments, errors)


def flags_of(command):
    """Returns every flag of a command, found in its parser, and the arguments that it needs besides."""
    parser = Parser()
    import_module(f"xception_jax.cli.{command}").add_arguments(parser)
    parsers = [((), parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += [((name,), sub) for name, sub in action.choices.items()]
    for words, each in parsers:
        needed = [f"{a.option_strings[0]}=nothing" for a in each._actions if a.required and a.option_strings]
        places = ["nothing.png" for a in each._actions if not a.option_strings and a.nargs in (None, "+", "*")]
        for action in each._actions:
            if action.option_strings and action.nargs != 0:
                count = action.nargs if isinstance(action.nargs, int) else 1
                yield action.option_strings[-1], count, [*words, *places], needed


# A file that is missing ends every command early, so that nothing is computed for a value that is accepted.
@pytest.mark.parametrize("command", COMMANDS)
def test_any_value_of_any_flag_is_accepted_or_refused_in_three_lines(command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))  # `train` adds one
    monkeypatch.setenv("TFDS_DATA_DIR", os.environ.get("TFDS_DATA_DIR", str(tmp_path)))  # `study` sets it
    for flag, count, places, needed in flags_of(command):
        rest = [argument for argument in needed if not argument.startswith(f"{flag}=")]
        for value in set(VALUES) - {"\x00"}:  # which no system passes on
            given = [f"{flag}={value}"] if count == 1 else [flag, *[value] * count]
            three_lines_and_a_code([command, *places, *rest, *given], capsys, monkeypatch)


@pytest.mark.parametrize("name", FIELDS)
def test_any_value_of_any_field_is_accepted_or_refused(name):
    for value in VALUES:
        with contextlib.suppress(UserError):
            resolve({name: value})
    for value in VALUES[:4]:
        with contextlib.suppress(UserError):
            resolve(read_config("fashion_mnist", [f"--config.{name}={value}"]))


@pytest.mark.parametrize("argument", ["--config.=3", "--config.model.=1", "--config.model=3", "--config.a-b=1"])
def test_an_override_of_no_field_is_refused(argument):
    with pytest.raises(ConfigError, match=r"there is no field config\.|config.model is a section"):
        read_config("fashion_mnist", [argument])


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("x = 1", "has no function get_config", ""),
        ("get_config = 1", "has no function get_config", ""),
        ("def get_config(): pass", "returns NoneType", ""),
        ("def get_config():\n    return {}", "returns dict", ""),
        ("def get_config():\n    raise SystemExit(3)", "SystemExit: 3", ":2"),
        ("import json\n\ndef get_config():\n    json.loads('{')", "JSONDecodeError", ":4"),
        ("def get_config():\n    return get_config()", "RecursionError", ":2"),
        ("def get_config(:", "SyntaxError", ":1"),
        ("\x00", "null bytes", ""),
        ("import no_such_module", "ModuleNotFoundError", ":1"),
        ("def get_config(size):\n    pass", "does not take no argument", ""),
    ],
)
def test_a_config_that_does_not_run_is_blamed_with_its_line(text, words, line, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as raised:
        read_config(str(path), ["--config.batch_size=3"])
    assert raised.value.where == f"{path}{line}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken.py"]  # no compiled copy that could be stale


OUTPUT = """
import sys
from xception_jax.process import run_program
def main():
    exec(sys.argv[1])
run_program(main, resumable=True)
"""


@pytest.mark.parametrize(
    ("streams", "statement", "code", "lines"),
    [
        (">/dev/full", "print(1)", 74, 3),
        (">/dev/full", "print('x' * 100_000)", 74, 3),
        (">&-", "print(1)", 74, 3),
        (">&-", "pass", 0, 0),
        ("2>/dev/full >/dev/null", "raise KeyError", 1, 0),
        ("2>&- >/dev/null", "print(1, file=sys.stderr)", 0, 0),
        ("<&- >/dev/null", "sys.stdin.read()", 0, 0),
        (">/dev/null", "raise OSError(28, 'No space left on device', 'a/b')", 74, 3),
        (">/dev/null", "raise PermissionError(13, 'Permission denied', 'a/b')", 74, 3),
        (">/dev/null", "raise MemoryError", 71, 3),
        (">/dev/null", "raise type('JaxRuntimeError', (RuntimeError,), {})('RESOURCE_EXHAUSTED: 9G')", 71, 3),
        (">/dev/null", "import os; os.environ['JAX_PLATFORMS'] = 'cuda'; import jax; jax.devices()", 78, 3),
        (">/dev/null", "import os; os.environ['JAX_PLATFORMS'] = 'none'; import jax; jax.devices()", 78, 3),
        (">/dev/null", "raise KeyboardInterrupt", 130, 0),
        (">/dev/null", "import os, signal; os.kill(os.getpid(), 15); signal.pause()", 75, 3),
        (">/dev/null", "import threading; threading.Thread(target=threading.Event().wait).start()", 0, 0),
        (">/dev/null", "import threading; threading.Thread(target=threading.Event().wait).start(); 1 / 0", 1, None),
        ("| true", "import time; time.sleep(0.3); print(1)", 141, 0),
    ],
)
def test_a_program_ends_with_a_promised_code_and_no_hang(streams, statement, code, lines, tmp_path):
    (tmp_path / "program.py").write_text(OUTPUT)
    shell = f'{sys.executable} {tmp_path}/program.py "$0" {streams}; exit ${{PIPESTATUS[0]}}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", shell, statement]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == code, process.stderr
    if lines is not None:
        assert len(process.stderr.splitlines()) == lines, process.stderr
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["predict", "", "--weights", "w"], "after predict"),
        (["predict", "a.png", "--weights", "w", "--contact_sheet", ""], "after --contact_sheet"),
        (["evaluate", "w", "--per_class="], "--per_class"),
        (["prepare", "image_folder", "--groups", ""], "after --groups"),
    ],
)
def test_an_argument_that_is_empty_is_refused(arguments, where):
    """As that of a shell's variable that is not set."""
    with pytest.raises(UsageError, match="empty") as error:
        parse(arguments)
    assert error.value.where == where


def test_a_value_that_ends_in_an_equals_sign_is_not_empty():
    args = parse(["prepare", "image_folder", "--source", "d", "--name", "n", "--groups=(p[0-9]+)="])
    assert args.groups == "(p[0-9]+)="


def test_the_home_directory_is_known_where_a_shell_does_not_replace_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    args = parse(["predict", "~/a.png", "b~/c.png", "--weights=~/w.h5", "--contact_sheet", "~ada.png"])
    assert (args.images, args.weights, args.contact_sheet) == (
        ["/home/ada/a.png", "b~/c.png"],
        "/home/ada/w.h5",
        "~ada.png",
    )


def test_a_section_is_not_replaced_as_a_whole():
    with pytest.raises(ConfigError, match=r"config.data is a section, not a field"):
        read_config("fashion_mnist", ["--config.data={}"])
