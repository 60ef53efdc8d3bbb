"""Command lines that make no sense: three lines and an exit code, whichever command."""

from __future__ import annotations

import sys

import pytest

from xception_jax.__main__ import main
from xception_jax.command_line import run_main

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
        (f"evaluate {LONG}", 66, "longer than the system allows"),
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
