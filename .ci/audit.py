"""Compares the packages of lock files with the known vulnerabilities, by pip-audit.

Exit codes: 0 if every package was checked and none is vulnerable, 1 if one is, 74 if some could not be checked, for
example without a network. pip-audit itself ends with 0 in the last case.

Usage: audit.py PIP_AUDIT LOCK_FILE ...
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

VULNERABLE, UNCHECKED = 1, 74


def audit(command: str, lock: str) -> tuple[list[dict[str, Any]], str]:
    """Returns the packages of a lock file as pip-audit describes them, and its messages."""
    options = ["--disable-pip", "--require-hashes", "--progress-spinner=off", "--format=json"]
    process = subprocess.run([command, *options, "--requirement", lock], capture_output=True, text=True)
    try:
        return json.loads(process.stdout)["dependencies"], process.stderr
    except (ValueError, KeyError, TypeError):
        return [], process.stderr


def main(command: str, locks: list[str]) -> int:
    """Prints one line for each vulnerability, and one for each file of which packages could not be checked."""
    code = 0
    for lock in locks:
        packages, messages = audit(command, lock)
        checked = [package for package in packages if "skip_reason" not in package]
        for package in checked:
            for found in package["vulns"]:
                fixed = ", ".join(found.get("fix_versions", [])) or "no version"
                print(f"{lock}: {package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
                code = VULNERABLE
        if not packages or len(checked) < len(packages):
            reason = next((package["skip_reason"] for package in packages if "skip_reason" in package), messages)
            last = (reason.strip().splitlines() or ["no answer"])[-1][:200]
            count = f"{len(packages) - len(checked)} of {len(packages)} packages" if packages else "the packages"
            print(f"{lock}: {count} could not be checked: {last}", file=sys.stderr)
            code = code or UNCHECKED
        else:
            print(f"{lock}: {len(packages)} packages checked")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
