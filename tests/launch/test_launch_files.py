"""The files in launch/ start the program as it wants to be started, and start it again after the right exit codes.

The scripts run for real. The programs that they call (xception-jax, srun, scontrol, gcloud) are small scripts that end
with the codes of a list, one after the other, and note how they were called.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from xception_jax.command_line import read_config, split_overrides
from xception_jax.config import resolve
from xception_jax.errors import BUG_EXIT_CODE, INTERRUPTED_EXIT_CODE, PreemptedError, StorageError, UserError

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
OF_ERRORS = {kind.exit_code for kind in UserError.__subclasses__()}
KILLED = (134, 137, 139, 143)  # 128 + SIGABRT, SIGKILL, SIGSEGV, SIGTERM
AGAIN = {PreemptedError.exit_code, StorageError.exit_code, INTERRUPTED_EXIT_CODE, *KILLED}
NEVER = {BUG_EXIT_CODE, *OF_ERRORS} - AGAIN
DATA = "/data/it's here"

STUBS = {
    "xception-jax": """
trap 'sleep 0.3; exit 75' TERM
printf '%s\\n' "$@" --end >> "$NOTES/arguments"
code="$(sed -n "$((${JAX_PROCESS_ID:-0} + 1))p" "$NOTES/codes")"
[[ -n "${JAX_PROCESS_ID:-}" ]] || sed -i 1d "$NOTES/codes"
[[ -z "$code" ]] || exit "$code"
for _ in {1..300}; do sleep 0.1; done
exit 99
""",
    # Options start with --, so the command begins with the first word that does not.
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "squeue": 'cat "$NOTES/job" 2>/dev/null || echo RUNNING',
    "ssh-keygen": 'touch "${@: -1}"',
    "scontrol": 'echo "$@" >> "$NOTES/scontrol"',
    # A slice with two workers, whose homes are folders and whose commands run for real. Code 200 of the program stands
    # for a slice that is taken away. The file `api` has the codes of the next calls of gcloud itself.
    "gcloud": """
verb="$4" command="${@: -1}"
echo "$verb" >> "$NOTES/gcloud"
failure="$(sed -n "s/^$verb //p" "$NOTES/api" 2>/dev/null | head -n 1)"
if [[ -n "$failure" ]]; then sed -i "0,/^$verb /{/^$verb /d}" "$NOTES/api"; exit "$failure"; fi
case "$verb" in
  create) printf '%s\\n' "$@" > "$NOTES/created"
    cat "$NOTES/granted" 2>/dev/null > "$NOTES/states" ||
      printf 'WAITING_FOR_RESOURCES\\nACTIVE\\n' > "$NOTES/states" ;;
  delete) rm -rf "$NOTES/states" "$NOTES/worker"* ;;
  describe)
    [[ -s "$NOTES/states" ]] || { echo "ERROR: NOT_FOUND: there is no such resource" >&2; exit 1; }
    head -n 1 "$NOTES/states"
    (($(wc -l < "$NOTES/states") == 1)) || sed -i 1d "$NOTES/states" ;;
  scp) for worker in worker0 worker1; do mkdir -p "$NOTES/$worker"; cp "$5" "$NOTES/$worker"; done ;;
  ssh)
    result=0
    for worker in worker0 worker1; do
      HOME="$NOTES/$worker"
      mkdir -p "$HOME"
      HOME="$HOME" bash -c "${command#--command=}" || { code=$?; ((result != 0)) || result=$code; }
    done
    ((result != 200)) || echo SUSPENDED > "$NOTES/states"
    exit "$result" ;;
esac
""",
    "pip": 'mkdir -p ~/.local/bin; ln -sf "$(command -v uv)" ~/.local/bin/uv',
    "uv": """
echo "$@" >> "$NOTES/uv"
[[ "$*" == *--constraint* ]] || { mkdir -p ~/venv/bin; ln -sf "$(command -v xception-jax)" ~/venv/bin/; exit; }
grep -q '^jax==' "${@: -2:1}" && [[ ! -e "$NOTES/broken" ]]
""",
}
FAST = {"POLL_SECONDS": "0", "RESTART_SECONDS": "0"}
VARIABLES = {
    "one_node.sh": {},
    "slurm.sh": {"SLURM_JOB_ID": "7"},
    "local_processes.sh": {"PROCESSES": "1"},
    "tpu_vm.sh": {"ZONE": "z", "WORKDIR": "gs://bucket/a run"},
}


class Launch:
    """Runs a script of launch/ in an environment in which only the stubs exist besides the programs of the system."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._groups = list[int]()
        programs = folder / "programs"
        programs.mkdir()
        for name, text in STUBS.items():
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (programs / name).chmod(0o755)
        path = f"{programs}:{os.environ['PATH']}"
        self.environment = {"PATH": path, "HOME": str(folder), "NOTES": str(folder), "DATA_DIR": DATA} | FAST

    def start(self, name: str, codes: list[int], *arguments: str, **variables: str) -> subprocess.Popen:
        """Starts a script. The program ends with `codes`, and then runs until it gets SIGTERM."""
        (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        process = subprocess.Popen(
            ["bash", LAUNCH / name, *arguments],
            cwd=ROOT,
            env=self.environment | VARIABLES[name] | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._groups.append(process.pid)
        return process

    def end(self) -> None:
        """Kills whatever is left of the scripts, for example after a failed test."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def __call__(self, name: str, codes: list[int], *arguments: str, **variables: str) -> tuple[int, str]:
        """Returns the exit code and the output of a script."""
        process = self.start(name, codes, *arguments, **variables)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def starts(self) -> list[list[str]]:
        """Returns the arguments of each start of the program."""
        path = self.folder / "arguments"
        text = path.read_text() if path.exists() else ""
        return [lines.splitlines() for lines in text.split("--end\n")[:-1]]

    def calls(self, program: str) -> list[str]:
        """Returns what a program noted of each of its calls."""
        path = self.folder / program
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def launch(tmp_path):
    launch = Launch(tmp_path)
    yield launch
    launch.end()


def check_arguments(arguments: list[str]) -> None:
    """Raises an error if the program would refuse the arguments."""
    assert arguments[0] == "train"
    options, overrides = split_overrides(arguments[1:])
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    assert set(given) == {"config", "workdir"}
    assert all(given.values())
    resolve(read_config(given["config"], overrides))


def test_every_file_is_tested_here():
    others = {"Dockerfile", "jobset.yaml", "skypilot.yaml"}
    assert {path.name for path in LAUNCH.iterdir()} == {*VARIABLES, *others}


@pytest.mark.parametrize("name", VARIABLES)
def test_scripts_have_no_syntax_error(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("name", VARIABLES)
def test_the_program_accepts_what_a_script_gives_it(launch, name):
    code, output = launch(name, [0, 0], "--config.name=two words; $(touch x)")
    assert code == 0, output
    assert len(launch.starts()) == (2 if name == "tpu_vm.sh" else 1)
    arguments = launch.starts()[-1]
    check_arguments(arguments)
    assert arguments[-1] == "--config.name=two words; $(touch x)"
    assert (f"--config.data.data_dir={DATA}" in arguments) == (name != "local_processes.sh")


RULE = "((code == 74 || code == 75 || code > 128))"


@pytest.mark.parametrize("name", ["one_node.sh", "slurm.sh", "tpu_vm.sh"])
def test_the_scripts_have_the_same_rule(name):
    assert RULE in (LAUNCH / name).read_text()


@pytest.mark.parametrize("code", sorted({0} | NEVER))
def test_what_a_new_start_cannot_mend_ends_a_run(launch, code):
    assert launch("one_node.sh", [75, code])[0] == code
    assert len(launch.starts()) == 2


@pytest.mark.parametrize("code", sorted(AGAIN))
def test_what_a_new_start_can_mend_is_started_again_but_not_for_ever(launch, code):
    ended, output = launch("one_node.sh", [code] * 9, MAX_RESTARTS="2")
    assert (ended, len(launch.starts())) == (code, 3)
    assert f"the run ended with {code}; start 2 of at most 3" in output


def test_a_job_is_requeued_but_not_for_ever(launch):
    assert launch("slurm.sh", [78])[0] == 78
    assert launch("slurm.sh", [75], SLURM_RESTART_COUNT="100")[0] == 75
    assert launch.calls("scontrol") == []
    (launch.folder / "job").write_text("COMPLETING\n")  # of `scancel 7`
    assert launch("slurm.sh", [75])[0] == 75
    assert launch.calls("scontrol") == []
    (launch.folder / "job").unlink()
    assert launch("slurm.sh", [75], SLURM_RESTART_COUNT="99")[0] == 75
    assert launch.calls("scontrol") == ["requeue 7"]


def test_a_run_on_a_slice_is_started_again_but_not_for_ever(launch):
    assert launch("tpu_vm.sh", [75] * 9, MAX_RESTARTS="1")[0] == 75
    assert launch.calls("gcloud").count("create") == 1
    assert launch.calls("gcloud")[-1] == "delete"
    assert len(launch.starts()) == 4
    assert launch("tpu_vm.sh", [0, 78])[0] == 78  # of the second worker
    assert len(launch.starts()) == 6


def test_a_slice_that_is_taken_away_is_requested_again(launch):
    code, output = launch("tpu_vm.sh", [200, 200, 0, 0])
    assert code == 0, output
    verbs = [verb for verb in launch.calls("gcloud") if verb != "describe"]
    once = ["create", "ssh", "scp", "ssh", "ssh"]  # asks which commit is there, copies, installs, trains
    assert verbs == [*once, "delete", *once, "delete"]


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_workers_get_the_commit_and_their_setup_once(launch):
    setup = {"KEEP": "1", "SETUP": 'echo "$HOME" >> "$NOTES/setup"; false; true'}
    assert launch("tpu_vm.sh", [0, 0], **setup)[0] == 0
    assert (launch.folder / "worker1" / "installed").read_text() == commit()
    assert "--python=3.12" in launch.calls("uv")[0]
    installed = len(launch.calls("uv"))
    assert launch("tpu_vm.sh", [0, 0], **setup)[0] == 0
    assert len(launch.calls("uv")) == installed  # the same commit
    (launch.folder / "worker1" / "installed").write_text("another\n")
    assert launch("tpu_vm.sh", [0, 0], **setup)[0] == 0
    assert len(launch.calls("uv")) == 2 * installed
    assert launch.calls("setup") == [str(launch.folder / f"worker{number}") for number in (0, 1)]


@pytest.mark.parametrize("broken", ["the installation", "the setup"])
def test_a_slice_on_which_nothing_could_be_installed_is_kept(launch, broken):
    if broken == "the installation":
        (launch.folder / "broken").touch()
    code, output = launch("tpu_vm.sh", [], SETUP="true; exit 32" if broken == "the setup" else "true")
    assert code == 1
    assert "The slice is kept" in output
    assert "delete" not in launch.calls("gcloud")
    assert launch.starts() == []


def test_failures_of_gcloud_itself_end_nothing(launch):
    (launch.folder / "api").write_text("ssh 1\nscp 1\ndelete 1\n")
    code, output = launch("tpu_vm.sh", [200, 200, 0, 0])
    assert code == 0, output
    assert len(launch.starts()) == 4


@pytest.mark.parametrize(("failures", "code"), [(3, 0), (99, 74)])
def test_a_slice_that_is_no_longer_needed_is_deleted_or_mentioned(launch, failures, code):
    (launch.folder / "api").write_text("delete 1\n" * failures)
    ended, output = launch("tpu_vm.sh", [0, 0])
    assert ended == code, output
    assert ("queued-resources delete xception" in output) == (code != 0)
    assert (launch.folder / "states").exists() == (code != 0)


def test_a_request_that_fails_is_not_made_again(launch):
    (launch.folder / "granted").write_text("FAILED\n")
    code, output = launch("tpu_vm.sh", [])
    assert code == 1
    assert "the slice xception: FAILED" in output
    assert "describe xception" in output
    assert launch.calls("gcloud").count("create") == 1


def test_a_script_that_is_stopped_while_it_waits_says_what_may_cost(launch):
    (launch.folder / "granted").write_text("WAITING_FOR_RESOURCES\n")
    process = launch.start("tpu_vm.sh", [])
    while launch.calls("gcloud").count("describe") < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "queued-resources delete xception --zone=z" in output


def test_the_script_is_started_anywhere(launch, tmp_path):
    environment = launch.environment | VARIABLES["tpu_vm.sh"]
    (launch.folder / "codes").write_text("0\n0\n")
    subprocess.run(["bash", LAUNCH / "tpu_vm.sh"], cwd=LAUNCH, env=environment, check=True, timeout=600)
    assert len(launch.starts()) == 2


def test_a_request_that_is_refused_ends_the_script(launch):
    (launch.folder / "api").write_text("create 1\n")
    assert launch("tpu_vm.sh", [])[0] == 1
    assert launch.calls("gcloud") == ["describe", "create"]


def test_a_bug_ends_a_run_on_a_slice(launch):
    assert launch("tpu_vm.sh", [1, 1])[0] == 1
    assert len(launch.starts()) == 2


def test_the_options_of_the_user_reach_gcloud(launch):
    given = {"CREATE_FLAGS": "--network=n --internal-ips", "SSH_FLAGS": "--internal-ip"}
    assert launch("tpu_vm.sh", [0, 0], **given)[0] == 0
    assert launch.calls("created")[-2:] == ["--network=n", "--internal-ips"]


@pytest.mark.parametrize("name", ["one_node.sh", "slurm.sh", "tpu_vm.sh"])
def test_without_a_directory_the_dataset_is_where_the_config_says(launch, name):
    assert launch(name, [0, 0], DATA_DIR="")[0] == 0
    assert not any(argument.startswith("--config.data.data_dir") for argument in launch.starts()[-1])


def test_a_disk_with_the_dataset_is_attached_to_the_slice(launch):
    assert launch("tpu_vm.sh", [0, 0])[0] == 0
    assert launch.calls("created")[-1] == "--spot"
    assert launch("tpu_vm.sh", [0, 0], DATA_DISK="projects/p/zones/z/disks/tfds")[0] == 0
    assert launch.calls("created")[-1] == "--data-disk=source=projects/p/zones/z/disks/tfds,mode=read-only"


def test_a_slice_that_exists_is_used(launch):
    (launch.folder / "states").write_text("PROVISIONING\nACTIVE\n")
    assert launch("tpu_vm.sh", [0, 0], KEEP="1")[0] == 0
    assert {"create", "delete"}.isdisjoint(launch.calls("gcloud"))


@pytest.mark.parametrize("name", ["one_node.sh", "local_processes.sh"])
def test_a_script_that_is_stopped_waits_for_the_run_and_starts_none(launch, name):
    process = launch.start(name, [])
    while not launch.starts():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=600)
    assert process.returncode == 75
    assert len(launch.starts()) == 1


def test_a_stopped_script_leaves_the_slice_alone(launch):
    process = launch.start("tpu_vm.sh", [])
    while not launch.starts():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode == 130
    assert "delete" not in launch.calls("gcloud")


def test_all_local_processes_are_started_and_the_first_error_is_returned(launch):
    code, _ = launch("local_processes.sh", [0, 78, 78], PROCESSES="3")
    assert (code, len(launch.starts())) == (78, 3)


def jobs() -> list[dict]:
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    return [job["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]]


def test_the_pods_start_again_after_the_right_codes():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (final,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (final["action"], final["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    for job in jobs():
        (rule,) = job["podFailurePolicy"]["rules"]
        assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "In")
        assert set(rule["onExitCodes"]["values"]) == NEVER
        pod = job["template"]["spec"]
        (container,) = pod["containers"]
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
        assert container["command"][0] == "xception-jax"
        check_arguments(container["command"][1:])


def test_nodes_start_again_after_the_right_codes():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert set(recovery["recover_on_exit_codes"]) == {PreemptedError.exit_code, INTERRUPTED_EXIT_CODE}
    assert recovery["max_restarts_on_errors"] == 0


def test_a_node_starts_the_program_with_all_arguments(launch):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    fields = ["--config.seed=5", "--config.name=two words; $(touch x)", "--config.data.train_split=train[:90%]"]
    (launch.folder / "codes").write_text("0\n")
    for part in ("setup", "run"):
        environment = launch.environment | task["envs"] | {"ARGS": shlex.join(fields)}
        subprocess.run(["bash", "-e", "-c", task[part]], cwd=ROOT, env=environment, check=True)
    (arguments,) = launch.starts()
    assert arguments[-3:] == fields
    check_arguments(arguments)


def test_no_code_is_left_out():
    """Every code of the program, and every signal, has its row in the table of the page."""
    page = (ROOT / "docs" / "howto" / "pod.md").read_text()
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    told = {row[0].strip(): row[2].strip() for row in rows if len(row) == 3}
    for code in OF_ERRORS | {BUG_EXIT_CODE, INTERRUPTED_EXIT_CODE}:
        (row,) = [start for codes, start in told.items() if str(code) in codes.split(", ")]
        assert row.startswith("yes") == (code in AGAIN), code
