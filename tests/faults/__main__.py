"""Injects the faults and prints how often each was tried and how often the promise was kept.

`python -m tests.faults [NUMBER ...]`, or `make test-faults`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from tests.faults.table import FAULTS, TESTS, places


def main(arguments: list[str]) -> int:
    """Runs the tests of the given faults, by default all, and prints a table. Returns an exit code."""
    faults = {number: FAULTS[number] for number in map(int, arguments)} if arguments else FAULTS
    nodes = sorted({node for fault in faults.values() for name in fault.tests for node in places()[name]})
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        options = ["-m", "not kernels", f"--junitxml={report}", "-o", "faulthandler_timeout=7200"]
        command = [sys.executable, "-m", "pytest", *options, *nodes]
        code = subprocess.run(command, cwd=TESTS.parent).returncode
        outcomes = read_outcomes(report)
    print(f"\n{'':3} {'tried':>6} {'kept':>6} {'broken':>6}  fault: promise")
    for number, fault in faults.items():
        found = Counter[str]()
        for node in {node for name in fault.tests for node in places()[name]}:
            for case, outcome in outcomes.items():
                if case == node or case.startswith((f"{node}[", f"{node}::")):
                    found[outcome] += 1
        skipped = f" ({found['skipped']} skipped)" if found["skipped"] else ""
        tried = found["kept"] + found["broken"]
        print(f"{number:3} {tried:6} {found['kept']:6} {found['broken']:6}  {fault.what}: {fault.promise}{skipped}")
    total = Counter(outcomes.values())
    print(f"    {total['kept'] + total['broken']:6} {total['kept']:6} {total['broken']:6}  in all, each test once")
    return code


def read_outcomes(report: Path) -> dict[str, str]:
    """Returns 'kept', 'broken' or 'skipped' for each test case, by its node identifier."""
    outcomes = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "broken" if failed else "skipped" if case.find("skipped") is not None else "kept"
        outcomes[f"{file}::{case.get('name')}"] = outcome
    return outcomes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
