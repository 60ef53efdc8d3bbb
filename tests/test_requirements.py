"""The lock files agree with the requirements that they were made from."""

from __future__ import annotations

import json
import re
import subprocess
import sys
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


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "requirements-build", "requirements-tools"])
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
    assert locked("requirements-build.lock").items() <= locked("requirements-dev.lock").items()


@pytest.mark.parametrize("path", sorted(ROOT.glob("requirements*.lock")), ids=lambda path: path.name)
def test_every_line_of_a_lock_file_is_a_pin_a_hash_or_a_comment(path):
    """An option, an address or a package without a hash would be installed unchecked."""
    line = re.compile(r"(#.*|[\w.-]+==\S+( ; .*)? \\| {4}--hash=sha256:[0-9a-f]{64}( \\)?)")
    assert [text for text in path.read_text().splitlines() if not line.fullmatch(text)] == []


def test_make_installs_locked_packages_by_hash():
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "(PIP_INSTALL) " in line]
    of_locks = [line for line in installs if "REQUIREMENTS" in line or ("-r $<" in line and "HASHES" in line)]
    assert len(of_locks) == 3
    assert all("$(HASHES)" in line for line in of_locks)
    editable = next(line for line in installs if "--editable ." in line and "tpu" not in line)
    assert "--no-build-isolation" in editable


def test_workflows_may_only_read_unless_a_job_says_more():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        assert "\npermissions:\n  contents: read\n" in text
        assert "pull_request_target" not in text
        assert text.count("actions/checkout@") == text.count("persist-credentials: false")
        assert all(re.fullmatch(r"actions/[\w-]+@(v\d+|[0-9a-f]{40})", use) for use in re.findall(r"uses: (\S+)", text))


def test_an_audit_that_could_check_nothing_fails(tmp_path):
    """pip-audit ends with 0 if it finds none of the packages, for example on a mirror."""
    answers = {
        0: [{"name": "a", "version": "1", "vulns": []}],
        1: [{"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}],
        74: [{"name": "a", "skip_reason": "not found"}, {"name": "b", "version": "1", "vulns": []}],
    }
    for code, packages in answers.items():
        (tmp_path / "answer.json").write_text(json.dumps({"dependencies": packages}))
        script = tmp_path / "pip-audit"
        script.write_text(f"#!/bin/sh\ncat {tmp_path}/answer.json\n")
        script.chmod(0o755)
        process = subprocess.run(
            [sys.executable, ROOT / ".ci" / "audit.py", script, "a.lock"], capture_output=True, text=True
        )
        assert process.returncode == code
        assert len((process.stdout + process.stderr).splitlines()) == (2 if code == 1 else 1)
    script.write_text("#!/bin/sh\necho no network >&2; exit 1\n")
    process = subprocess.run(
        [sys.executable, ROOT / ".ci" / "audit.py", script, "a.lock"], capture_output=True, text=True
    )
    assert (process.returncode, process.stderr) == (74, "a.lock: the packages could not be checked: no network\n")
