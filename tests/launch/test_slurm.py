"""The job of launch/slurm.sh on a real Slurm with two nodes: stopped, requeued, resumed to the same bits."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import NEWER_CODE, ROOT
from tests.launch.slurm_cluster import SlurmCluster, running, unpack_packages
from tests.tiny_run import TINY
from xception_jax.errors import ConfigError, PreemptedError

pytestmark = pytest.mark.slurm
SECONDS = 400  # for a run, on a busy machine


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        packages = unpack_packages()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"Slurm's packages cannot be downloaded with apt-get: {error}")
    with running(packages, tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Job:
    """A job of launch/slurm.sh."""

    def __init__(
        self, cluster: SlurmCluster, folder: Path, environment: dict[str, str], command_folder: str, *arguments: str
    ):
        self._cluster, self.workdir, self._output = cluster, folder / "run", folder / "output.txt"
        variables = {
            "CONFIG": "fashion_mnist",
            "WORKDIR": str(self.workdir),
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {NEWER_CODE}",
        }
        options = ["--parsable", "--gpus-per-node=0", f"--output={self._output}"]
        fields = [argument for argument in TINY if not argument.startswith("--config=")]
        # The programs of Slurm need variables of the cluster, the job needs those of the tests.
        everything = environment | cluster.environment | variables
        everything["PATH"] = f"{command_folder}:{everything['PATH']}"
        self.number = cluster.run("sbatch", *options, "launch/slurm.sh", *fields, *arguments, cwd=ROOT, env=everything)
        assert self.number.isdigit(), self.number

    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def fields(self) -> dict[str, str]:
        """Returns what Slurm knows about the job."""
        shown = self._cluster.run("scontrol", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait_for(self, pattern: str, **state: str) -> None:
        """Waits until the output has the pattern and Slurm shows the state."""
        deadline = time.monotonic() + SECONDS
        while not (re.search(pattern, self.output()) and state.items() <= self.fields().items()):
            report = f"{self.output()}\n{self.fields()}\n{self._cluster.logs()}"
            assert time.monotonic() < deadline, report
            time.sleep(0.2)

    def begin_soon(self) -> None:
        """Shortens the two minutes for which Slurm holds a requeued job. In the same second it would not start."""
        self._cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+5")

    def state_hash(self) -> str:
        (found,) = set(re.findall("state sha256: ([0-9a-f]{64})", self.output()))  # both processes print it
        return found


@pytest.fixture
def submit(cluster, shared_environment, command_folder, tmp_path):
    def submit(name: str, *arguments: str) -> Job:
        (tmp_path / name).mkdir()
        return Job(cluster, tmp_path / name, shared_environment, command_folder, *arguments)

    return submit


def test_a_job_that_is_stopped_is_requeued_and_ends_with_the_same_bits(submit, cluster):
    undisturbed = submit("undisturbed")
    undisturbed.wait_for("state sha256", JobState="COMPLETED")

    job = submit("disturbed", "--config.log_every=1 steps")
    job.wait_for("step 7/")
    cluster.run("scancel", "--signal=TERM", job.number)
    job.wait_for(f"the run ended with {PreemptedError.exit_code}; requeued", Restarts="1")
    steps = {path.name for path in (job.workdir / "checkpoints").iterdir() if path.name.isdigit()}
    assert steps, job.output()
    job.begin_soon()
    job.wait_for("state sha256", JobState="COMPLETED", Restarts="1")
    assert len(re.findall(r"\bstep 1/", job.output())) == 1, job.output()  # the second start did not begin anew
    assert job.state_hash() == undisturbed.state_hash()


def test_a_job_with_a_wrong_config_is_not_requeued(submit):
    job = submit("wrong", "--config.batchsize=8")
    job.wait_for("there is no field config.batchsize", JobState="FAILED")
    assert job.fields()["ExitCode"].startswith(f"{ConfigError.exit_code}:")
    assert job.fields()["Restarts"] == "0"
