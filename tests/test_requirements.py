"""The lock files agree with the requirements that they were made from."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT


def requirements(name: str) -> list[Requirement]:
    """Returns the requirements of a file and of the files that it includes."""
    found = []
    for line in (ROOT / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            found += requirements(line.removeprefix("-r "))
        elif line:
            found.append(Requirement(line))
    return found


def lines(name: str) -> list[str]:
    return (ROOT / name).read_text().splitlines()


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Returns {package: (version, number of hashes)} of a lock file."""
    entries = re.split(r"\n(?=\w)", re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).strip())
    pins = {}
    for entry in entries:
        package, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()
        pins[canonicalize_name(package)] = (version, len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry)))
    return pins


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_a_lock_file_pins_every_requirement(name):
    pins = locked(f"{name}.lock")
    for requirement in requirements(f"{name}.txt"):
        package = canonicalize_name(requirement.name)
        assert package in pins, f"{package} is not in {name}.lock: run make lock"
        version, _ = pins[package]
        assert requirement.specifier.contains(version, prereleases=True), f"{name}.lock is out of date: run make lock"
    assert all(hashes for _, hashes in pins.values())


def test_the_packages_that_tests_of_extras_use_are_those_of_the_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {extra: set(packages) for extra, packages in project["optional-dependencies"].items()}
    assert set(extras) == {"cloud", "cuda12", "tpu", "onnx", "tensorboard", "wandb"}
    assert extras["cloud"] == {line for line in lines("requirements-cloud.txt") if ">" in line}
    assert {"-r requirements-cloud.txt", *extras["onnx"]} <= set(lines("requirements-dev.txt"))
    jax = next(requirement for requirement in requirements("requirements.txt") if requirement.name == "jax")
    for extra in ("cuda12", "tpu"):
        assert extras[extra] == {f"jax[{extra}]{jax.specifier}"}


def test_the_lock_files_agree():
    """`make test` extends the environment of `make train`: it must not replace its packages."""
    assert locked("requirements.lock").items() <= locked("requirements-dev.lock").items()
