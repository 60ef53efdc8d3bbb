"""The files in launch/ pass the tools of their makers: the schema of Kubernetes, SkyPilot, shellcheck, gcloud."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

INTERPRETER = os.environ.get("LAUNCH", "")
LAUNCH = ROOT / "launch"
pytestmark = pytest.mark.skipif(not INTERPRETER, reason="needs other packages: make test-launch")

VALIDATE = (
    "import json, sys, kubernetes_validate as k; k.validate(json.load(sys.stdin), k.latest_version(), strict=True)"
)
LOAD = "import sys, sky; task = sky.Task.from_yaml(sys.argv[1]); print(task.num_nodes, task.resources)"


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **options)


def jobs() -> list[dict]:
    """Returns the Jobs that the JobSet makes. Its own schema is only known to its controller."""
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    return [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        for job in jobset["spec"]["replicatedJobs"]
    ]


def validate(job: dict) -> subprocess.CompletedProcess:
    return run(INTERPRETER, "-c", VALIDATE, input=json.dumps(job))


def test_the_jobs_have_the_schema_of_kubernetes():
    for job in jobs():
        process = validate(job)
        assert process.returncode == 0, process.stderr


def test_a_misspelt_field_of_a_job_is_found():
    (job,) = jobs()
    job["spec"]["backofLimit"] = 0
    assert "backofLimit" in validate(job).stderr


@pytest.fixture
def load(tmp_path):
    """Returns a function: what SkyPilot says of a task."""
    home = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return lambda path: run(INTERPRETER, "-c", LOAD, path, env=home, cwd=ROOT)


def test_skypilot_reads_the_task(load):
    process = load(LAUNCH / "skypilot.yaml")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("2 ")
    assert "[Spot]" in process.stdout


def test_skypilot_refuses_a_misspelt_field(load, tmp_path):
    text = (LAUNCH / "skypilot.yaml").read_text().replace("num_nodes:", "num_node:")
    (tmp_path / "task.yaml").write_text(text)
    assert load(tmp_path / "task.yaml").returncode != 0


def test_shellcheck_finds_nothing():
    process = run(Path(INTERPRETER).parent / "shellcheck", *LAUNCH.glob("*.sh"))
    assert process.returncode == 0, process.stdout


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="the Google Cloud CLI is not installed")
def test_gcloud_has_the_options(tmp_path):
    script = (LAUNCH / "tpu_vm.sh").read_text().replace("\\\n", " ").replace("'value(state.state)'", "x")
    script = script.replace('"$CAPACITY"', "--spot").replace('"$NAME:"', "x:").replace('"$1"', "x").replace(" 2>&1", "")
    script = script.replace('"${create_flags[@]}"', "--network=x --internal-ips").replace(
        '"${ssh_flags[@]}"', "--internal-ip"
    )
    script = "\n".join(line for line in script.splitlines() if not line.lstrip().startswith("echo"))
    disk = "--data-disk=source=$DATA_DISK,mode=read-only"
    script = script.replace(f'${{DATA_DISK:+"{disk}"}}', disk.replace("$DATA_DISK", "x"))
    commands = [
        " ".join(re.sub(r'"\$\w+"', "x", text).split()) for text in re.findall(r"gcloud compute [^;|&)\n]+", script)
    ]
    assert len(commands) == 5
    for command in commands:
        process = run("gcloud", "meta", "lint-gcloud-commands", f"--command-string={command}",
                      env=os.environ | {"CLOUDSDK_CONFIG": str(tmp_path)})  # fmt: skip
        assert process.returncode == 0, process.stderr
        (answer,) = json.loads(process.stdout)
        assert answer["success"], (command, answer["error_message"])
