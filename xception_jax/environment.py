"""Queries the environment of this process: peak memory and package versions."""

from __future__ import annotations

import importlib.metadata
import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path


def peak_memory() -> int:
    """Returns the peak resident memory of this process, in bytes.

    On Linux, ru_maxrss survives exec and includes the memory of the parent process, so this reads VmHWM from /proc,
    which does not.
    """
    try:
        mark = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        mark = None
    if mark:
        return int(mark[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the given packages. Packages that are not installed are omitted."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
