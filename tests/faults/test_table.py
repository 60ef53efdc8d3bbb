"""The table of faults leads to tests that exist, and no long test is left out of it."""

from __future__ import annotations

import pytest

from tests.faults.table import FAULTS, TESTS, places


@pytest.mark.parametrize("number", FAULTS)
def test_tests_of_a_fault_exist(number):
    assert FAULTS[number].tests
    assert not [name for name in FAULTS[number].tests if name not in places()]


def test_every_fault_is_there_once():
    assert sorted(FAULTS) == list(range(1, 62))


def test_every_file_with_long_tests_is_in_the_table():
    listed = {node.split("::")[0] for fault in FAULTS.values() for name in fault.tests for node in places()[name]}
    marked = [path for path in TESTS.rglob("test_*.py") if "mark.faults" in path.read_text()]
    assert {str(path.relative_to(TESTS.parent)) for path in marked} - {"tests/faults/test_table.py"} <= listed
