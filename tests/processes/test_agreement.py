"""Processes that do not agree end with the same error, which is printed once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, free_port


@pytest.fixture(scope="module")
def results(shared_environment):
    """Returns what each exchange gave in process 0 and in process 1."""
    address = f"localhost:{free_port()}"
    program = [sys.executable, "tests/processes/agreement_program.py", address]
    options = {"cwd": ROOT, "env": shared_environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pair = [subprocess.Popen([*program, str(number)], text=True, **options) for number in (0, 1)]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def test_all_know_the_values_of_all(results):
    assert [result["gather"] for result in results] == [["value 0", "value 1"]] * 2
    assert [result["again"] for result in results] == [["second run 0", "second run 1"]] * 2


def test_no_thread_is_left_that_could_crash_the_end_of_the_process(results):
    assert [result["threads"] for result in results] == [[], []]


def test_an_error_of_one_is_the_error_of_all(results):
    assert [result["nobody"] for result in results] == [0, 1]
    error = ["BadDataError", "damaged on 1 (process 1 of 2)", "here", "mend it"]
    assert [result["one"] for result in results] == [[*error, False], [*error, True]]


def test_a_disk_that_fails_on_one_is_the_same_error_of_all(results):
    what = "a file cannot be read or written: Stale file handle (process 1 of 2)"
    fix = "free space there, or make it readable and writable; then run the same command again"
    error = ["StorageError", what, "images", fix]
    assert [result["disk"] for result in results] == [[*error, False], [*error, True]]


def test_of_several_errors_the_first_is_told(results):
    error = ["BadDataError", "damaged on 0 (process 0 of 2)", "here", "mend it"]
    assert [result["both"] for result in results] == [[*error, True], [*error, False]]


@pytest.mark.parametrize(
    ("name", "values"), [("different", "0 and 1"), ("missing", "missing and 1"), ("null", "missing and None")]
)
def test_different_values_are_named(results, name, values):
    assert [result["equal"] for result in results] == [None, None]
    error = ["ConfigError", f"processes 0 and 1 have different configs: seed is {values}", "seed", "use one config"]
    assert [result[name] for result in results] == [[*error, True], [*error, False]]
