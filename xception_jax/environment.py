"""What this process runs with: its packages, and the memory that it has held."""

from __future__ import annotations

import importlib.metadata
import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path


def peak_memory() -> int:
    """Returns the largest resident size of this process so far, in bytes.

    Linux' ru_maxrss also counts what the parent held when it started the process (it survives exec), so that a small
    child of a large process looks large; the mark in /proc belongs to the program alone.
    """
    try:
        mark = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        mark = None
    if mark:
        return int(mark[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed; this one is not where it runs from a checkout."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
