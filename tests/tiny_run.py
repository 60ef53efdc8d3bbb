"""Flags of a training run that takes seconds, and a check of error messages."""

from __future__ import annotations

import subprocess

TINY = [
    "--config=configs/fashion_mnist.py",
    "--config.model.width_multiplier=0.05",
    "--config.model.middle_blocks=0",
    "--config.model.dropout_rate=0.2",
    "--config.data.train_split=train[:640]",
    "--config.data.eval_split=train[640:900]",
    "--config.data.test_split=test[:333]",
    "--config.batch_size=32",
    "--config.evaluation.batch_size=100",
    "--config.duration=3 epochs",
    "--config.evaluation.every=30 steps",
    "--config.evaluation.heat_maps=0",
    "--config.checkpoint.every=20 steps",
    "--config.log_every=5 steps",
]


def three_lines(process: subprocess.CompletedProcess) -> list[str]:
    """Returns the error, where and fix lines that a process printed, and checks that there is no traceback."""
    lines = [line for line in process.stderr.splitlines() if line.startswith(("error: ", "  where: ", "  fix: "))]
    assert [line.split(":")[0].strip() for line in lines] == ["error", "where", "fix"], process.stderr
    assert "Traceback" not in process.stderr
    return lines
