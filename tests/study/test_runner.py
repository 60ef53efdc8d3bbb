"""The runner as a user runs it: real processes, killed for real."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.study.simulated import POINTS, small_study, write_predictions, write_simulated
from xception_jax.cli import study as study_command
from xception_jax.config import override, to_json
from xception_jax.errors import BadDataError, ConfigError, InputMissingError, UsageError, WorkdirError
from xception_jax.logs.metrics_log import read_metrics
from xception_jax.study.cells import RECORD, choose_trials, find_equal, read_outcome, started_trials
from xception_jax.study.design import Search
from xception_jax.study.execute import run_cell, run_study, slurm_script
from xception_jax.study.kernels.networks import analyse
from xception_jax.study.predictions import read_answers
from xception_jax.study.report import write_study_report
from xception_jax.study.runner import make_slots, visible_gpus
from xception_jax.study.store import StoredStudy, open_study, read_study, write_study
from xception_jax.study.study_file import study_from_json, study_to_json
from xception_jax.training.workdir import hold_directory

STEPS = 40
TINY = """
import dataclasses
from tests.study.simulated import small_study
from xception_jax.config import override
from xception_jax.study.design import Arm, PlannedComparison

def get_study():
    study = small_study()
    config = override(study.config, {
        "model.width_multiplier": 0.05,
        "model.middle_blocks": 0,
        "data.train_split": "train[:320]",
        "data.eval_split": "train[320:420]",
        "data.test_split": "test[:99]",
        "batch_size": 32,
        "duration": "40 steps",
        "schedule.warmup": "0 steps",
        "log_every": "1 step",
        "evaluation.every": "20 steps",
        "checkpoint.every": "5 steps",
        "evaluation.batch_size": 100,
    })
    return dataclasses.replace(
        study, name="tiny", config=config, control="width", seeds=(0,), reference="good", margin=0.005,
        arms=(Arm("good", {}), Arm("split", {"mesh.data": 3})),
        comparisons=(PlannedComparison("split", "good"),), interactions=(),
    )
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory, shared_environment):
    """Returns a function that starts `study run` with further arguments."""
    directory = tmp_path_factory.mktemp("tiny")
    (directory / "tiny.py").write_text(TINY)
    root = directory / "W"

    started = []

    def start(*arguments):
        command = [sys.executable, "-m", "xception_jax", "study", "run", f"{directory}/tiny.py", "--workdir", str(root)]
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=shared_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield root, start
    for process in started:  # after a failure; the cells end with their runner
        process.kill()
        process.communicate()


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def step_of(cell):
    return max((entry["step"] for entry in read_metrics(cell / "metrics.jsonl")), default=0)


def holder(directory):
    """The process that says in the lock file that it holds the directory; None while it is about to."""
    try:
        return json.loads((directory / "lock").read_text())["pid"]
    except ValueError:
        return None


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # a zombie whose parent does not wait for it is not alive


@pytest.mark.slow
def test_a_study_survives_kills_of_cell_and_runner(start):
    root, start = start
    good, split = (root / "cells" / arm / "seed0" for arm in ("good", "split"))

    runner = start()
    wait_until(lambda: step_of(good) >= 6)
    first = holder(good)
    os.kill(first, signal.SIGKILL)  # the cell: the runner starts it again
    wait_until(lambda: (good / "cell.json").exists() and holder(good) not in (None, first))
    reached = step_of(good)  # by the first, until the second has cut the metrics back to its checkpoint
    wait_until(lambda: step_of(good) > reached)

    second = holder(good)
    runner.kill()  # the runner: the kernel tells the cell, which saves and ends
    runner.communicate()
    wait_until(lambda: not is_alive(second))
    assert (good / "log.txt").read_text().count("SIGTERM") == 2  # told once, stopped by it
    left_at = step_of(good)
    assert left_at < STEPS

    again = start("--jobs", "2")
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 78, errors  # that of the arm that needs three devices
    with np.load(root / "predictions.npz") as kept:  # of the cell that is done
        assert (kept["arm"].tolist(), kept["classes"].shape) == (["good"], (1, 99))
    assert [json.loads((cell / "cell.json").read_text())["exit_code"] for cell in (good, split)] == [0, 78]
    assert "devices" in json.loads((split / "cell.json").read_text())["message"]
    steps = [entry["step"] for entry in read_metrics(good / "metrics.jsonl") if entry["split"] == "train"]
    assert steps == list(range(1, STEPS + 1))  # each once, whatever was killed
    assert f"resumed at {left_at}" in (good / "log.txt").read_text()
    assert "split seed 0: failed with 78" in errors
    assert "tiny: 1 of 2 cells done" in output
    assert (root / "report.html").exists()

    # What it trained can be looked at.
    layers = analyse(root).layers
    assert [(layer.network, layer.layer) for layer in layers] == [("good seed 0", f"block1_conv{n}") for n in (1, 2)]
    assert all(0.1 < layer.first_component < 1 for layer in layers)
    (good / "checkpoints").rename(root / "elsewhere")  # what was measured stays with the cell
    assert analyse(root).layers == layers

    stored = read_study(root)
    assert [entry["change"] for entry in stored.history] == ["stated"]
    # Nothing is left: no process is started, and the code stays that of the failure.
    assert run_study(stored, {"PATH": ""}, jobs=1, retry=False) == 78
    # The study is held, and what was stated before stays.
    with open_study(root, stored.study, print), pytest.raises(WorkdirError, match="another run holds"):
        open_study(root, stored.study, print).__enter__()
    with pytest.raises(ConfigError, match="has changed since its first cells") as error:
        open_study(root, dataclasses.replace(stored.study, margin=0.01), print).__enter__()
    assert "margin: 0.005 -> 0.01" in error.value.details
    with open_study(root, dataclasses.replace(stored.study, seeds=(0, 1)), print) as more:
        assert [cell.record().get("exit_code") for cell in more.cells()] == [0, 78, None, None]
        assert more.history[-1]["change"] == "added seed 1"


def test_what_holds_a_cell_is_waited_for(tmp_path):
    stored = write_simulated(tmp_path, small_study())
    cell = stored.cells()[0]
    assert not cell.is_held()
    with hold_directory(cell.directory):
        assert cell.is_held()
    assert not cell.is_held()
    other = dataclasses.replace(cell, config=stored.cells()[1].config)
    with pytest.raises(ConfigError, match="was started with a different config"):
        other.prepare()


def test_slots_share_cores_and_gpus():
    slots = make_slots(2, [0, 1, 2, 3], ["4", "5"])
    assert [slot.cores for slot in slots] == [(0, 2), (1, 3)]
    assert [slot.environment for slot in slots] == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    (alone,) = make_slots(1, [0, 1], ["0", "1"])
    assert (alone.cores, alone.environment) == ((0, 1), {"CUDA_VISIBLE_DEVICES": "0,1"})
    shared = make_slots(4, [0, 1], ["0"])
    assert [slot.cores for slot in shared] == [(0,), (1,), (0,), (1,)]
    assert {slot.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in shared} == {"0.23"}
    assert all(slot.environment == {} for slot in make_slots(3, [0], []))
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2,3"}) == ["2", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"JAX_PLATFORMS": "cpu"}) == []


def test_cells_of_another_study_are_not_trained_again(tmp_path, capsys):
    """The points of the simulated axis have one config: it is the activation and the seed that count."""
    failed = [(f"{point}_relu", 0) for point in POINTS]
    other = write_simulated(tmp_path / "other", small_study(), fail=failed)
    arms = tuple(dataclasses.replace(arm, name=arm.name.replace("none", "nothing")) for arm in other.study.arms)
    study = small_study(name="again", arms=arms, reference="depthwise_nothing", comparisons=(), interactions=())
    stored = write_simulated(tmp_path / "again", study)
    shutil.rmtree(stored.root / "cells")

    for number, source in enumerate(other.cells()):  # as after a move: only the file of all predictions is left
        write_predictions(source, number)
        (source.directory / "kernels.json").write_text("{}")
    write_study_report(other.root)
    for source in other.cells():
        (source.directory / "predictions_test.npz").unlink()
    pairs = find_equal(stored.cells(), other.cells())
    assert [cell.directory for cell, _ in pairs] == [
        cell.directory for cell in stored.cells() if (cell.arm, cell.seed) not in failed
    ]
    for cell, source in pairs:
        assert cell.seed == source.seed
        assert cell.config.model == source.config.model
    for cell in stored.cells():
        if (cell.arm, cell.seed) in failed:
            finish(cell, 0.5)

    assert run_study(stored, {}, jobs=1, retry=False, reuse=[other]) == 0  # no process is started
    assert f"54 finished cells were taken from {other.root}" in capsys.readouterr().err
    cell, source = pairs[0]
    assert read_outcome(cell, "ema_top1") == read_outcome(source, "ema_top1") != read_outcome(pairs[-1][0], "ema_top1")
    assert cell.record()["reused_from"] == source.config.name == "simulated, 1_none, seed 0"
    assert {cell.record().get("reused_from") for cell in stored.cells() if (cell.arm, cell.seed) in failed} == {None}
    assert "54 cells were taken from another study" in (stored.root / "report.md").read_text()
    assert find_equal(stored.cells(), other.cells()) == []
    taken, theirs = read_answers(stored.root, stored.cells()), read_answers(other.root, other.cells())
    assert len(taken) == 54
    np.testing.assert_array_equal(taken[cell.arm, cell.seed].right, theirs[source.arm, source.seed].right)
    assert (cell.directory / "kernels.json").exists()


@pytest.mark.parametrize(
    "options",
    [["--retry", "--cell=0"], ["--retry", "--slurm=x.sh"], ["--print", "--cell=0"], ["--cell=0", "--slurm=x.sh"]],
)
def test_options_that_exclude_each_other_are_refused(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    study_command.add_arguments(parser)
    arguments = parser.parse_args(["run", "studies/spectrum", "--workdir", "x", *options])
    with pytest.raises(UsageError, match=r"does not work with|exclude each other"):
        study_command.run(arguments)


@pytest.mark.parametrize("option", ["--cell=0", "--slurm=x.sh"])
def test_a_job_of_an_array_takes_over_nothing(start, option):
    process = start[1]("--reuse", "elsewhere", option)
    _, errors = process.communicate()
    assert (process.returncode, "--reuse does not work with --cell or --slurm" in errors) == (
        UsageError.exit_code,
        True,
    ), errors


@pytest.fixture
def searched(tmp_path):
    """A study with a search: (what is stored, the cells of the search)."""
    trials = tuple({"schedule.learning_rate": rate} for rate in (0.05, 0.1, 0.2))
    stored = write_simulated(tmp_path, small_study(search=Search(trials)))
    shutil.rmtree(tmp_path / "cells")  # as before the search
    return stored, stored.search()


def finish(cell, accuracy, exit_code=0):
    cell.prepare()
    entries = ({"step": 9, "split": split, "ema_top1": accuracy} for split in ("dev", "test"))
    (cell.directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    cell.write_record(exit_code=exit_code, seconds=1.0)


def test_a_search_takes_the_best_on_the_development_split(searched):
    stored, cells = searched
    assert {cell.config.data.test_split for cell in cells} == {""}
    assert len(cells) == 3 * len(stored.study.arms)
    accuracy = {"1_none": (0.8, 0.9, 0.7), "1_relu": (0.9, 0.9, 0.9), "2_none": (0.5, 0.6, 0.95)}
    for cell in cells:
        if cell.arm in accuracy:
            lost = cell.arm == "2_none" and cell.trial == 2
            finish(cell, accuracy[cell.arm][cell.trial], 70 if lost else 0)
    chosen = choose_trials(stored.study, cells)
    rates = {arm: trial["schedule.learning_rate"] for arm, trial in chosen.items()}
    assert rates == {"1_none": 0.1, "1_relu": 0.05, "2_none": 0.1}
    tuned = {(cell.arm, cell.config.schedule.learning_rate) for cell in stored.cells() if cell.seed == 0}
    assert {("1_none", 0.1), ("1_relu", 0.05), ("2_none", 0.1)} <= tuned
    result = {arm.name: arm for arm in write_study_report(stored.root).arms}
    assert result["1_relu"].tuned_at_edge == ("schedule.learning_rate",)
    assert result["1_none"].tuned_at_edge == ()
    assert "chose the smallest or largest value that it tried for 1_relu" in " ".join(
        (stored.root / "report.html").read_text().split()
    )


def test_an_arm_keeps_the_trial_with_which_its_first_cell_was_started(searched):
    stored, cells = searched
    rate = {trial["schedule.learning_rate"]: number for number, trial in enumerate(stored.study.trials)}
    of_arm = {cell.trial: cell for cell in cells if cell.arm == "1_none"}
    finish(of_arm[rate[0.05]], 0.8)
    finish(of_arm[rate[0.1]], 0.9, exit_code=70)

    def rates():
        return {cell.config.schedule.learning_rate for cell in stored.cells() if cell.arm == "1_none"}

    assert rates() == {0.05}
    finish(of_arm[rate[0.1]], 0.9)  # by --retry, and better
    assert rates() == {0.1}
    finish(of_arm[rate[0.1]], 0.9, exit_code=70)
    next(cell for cell in stored.cells() if cell.arm == "1_none" and cell.seed == 2).prepare()
    finish(of_arm[rate[0.1]], 0.9)
    assert rates() == {0.05}


def test_arms_that_choose_together_keep_their_trial_together(searched):
    stored, _ = searched
    together = ("1_none", "1_relu")
    arms = tuple(dataclasses.replace(arm, tuned_as=together) for arm in stored.study.arms if arm.name in together)
    study = dataclasses.replace(stored.study, arms=arms)
    rate = study.trials[0]["schedule.learning_rate"]
    config = override(dataclasses.replace(stored, study=study).cells()[0].config, {"schedule.learning_rate": rate})
    first = stored.root / "cells/1_none/seed0"
    first.mkdir(parents=True)
    (first / "config.json").write_text(to_json(config))
    started = started_trials(study, stored.costs, stored.root)
    assert started == {name: dict(study.trials[0]) for name in together}


def test_an_arm_takes_no_trial_from_one_that_was_tuned_alone(searched):
    """Otherwise a study that resumes trains it with another rate than one that was not interrupted."""
    stored, _ = searched
    both = ("1_none", "1_relu")
    arms = [dataclasses.replace(arm, tuned_as=both if arm.name == "2_none" else ()) for arm in stored.study.arms]
    study = dataclasses.replace(stored.study, arms=tuple(arms))
    alone = dataclasses.replace(stored, study=study)
    rates = {0.05: (0.9, 0.5), 0.1: (0.8, 0.8), 0.2: (0.5, 0.9)}
    for cell in alone.search():
        if cell.arm in both:
            finish(cell, rates[cell.config.schedule.learning_rate][cell.arm == "1_relu"])
    expected = {"1_none": 0.05, "1_relu": 0.2, "2_none": 0.1}
    assert {name: trial["schedule.learning_rate"] for name, trial in alone.tuned().items()} == expected
    next(cell for cell in alone.cells() if cell.arm == "1_none").prepare()
    assert {name: trial["schedule.learning_rate"] for name, trial in alone.tuned().items()} == expected


@pytest.mark.parametrize("exit_code", [74, 75, -9])
def test_a_job_chooses_no_rate_before_all_trials_have_finished(searched, exit_code):
    stored, cells = searched
    for cell in cells:
        finish(cell, 0.9, exit_code if cell.trial == 1 and cell.arm == "1_none" else 0)
    number = len(cells) + [cell.arm for cell in stored.cells()].index("1_none")
    with pytest.raises(InputMissingError, match="1_none trial 1 is left"):
        run_cell(stored.root, number, {})


@pytest.mark.parametrize("record", ['{"exit_code": "0"}', '{"exit_code": 0, "seconds": "x"}', "[]", "{"])
def test_a_record_that_is_no_record_is_a_cell_that_has_not_ended(searched, record):
    cell = searched[1][0]
    finish(cell, 0.9)
    assert cell.state() == "done"
    (cell.directory / "cell.json").write_text(record)
    assert (cell.record(), cell.state()) == ({}, "waiting")


def test_a_finished_trial_whose_metrics_are_lost_is_named(searched):
    stored, cells = searched
    for cell in cells[:2]:
        finish(cell, 0.9)
    (cells[1].directory / "metrics.jsonl").unlink()
    with pytest.raises(BadDataError, match="is done, but its accuracy is not known"):
        choose_trials(stored.study, cells)


def test_the_training_accuracy_is_that_of_fifty_steps_or_more(searched):
    """The last log interval of a cell may have two steps, and its accuracy decides a gate."""
    cell = searched[1][0]
    cell.prepare()
    entries = [(50, 0.5), (100, 0.8), (102, 0.2)]
    lines = [json.dumps({"step": step, "split": "train", "top1": top1}) + "\n" for step, top1 in entries]
    (cell.directory / "metrics.jsonl").write_text("".join(lines))
    assert read_outcome(cell, "top1")["train_accuracy"] == pytest.approx((2 * 0.2 + 50 * 0.8) / 52)
    (cell.directory / "metrics.jsonl").write_text(lines[0])
    assert read_outcome(cell, "top1")["train_accuracy"] == 0.5


def test_several_arms_choose_a_trial_together(searched):
    stored, cells = searched
    together = ("1_none", "1_relu")
    arms = tuple(dataclasses.replace(arm, tuned_as=together) for arm in stored.study.arms)
    study = dataclasses.replace(stored.study, arms=arms)
    tried = dataclasses.replace(stored, study=study).search()
    assert {cell.arm for cell in tried} == set(together)
    assert study_from_json(study_to_json(study)) == study
    for cell in tried:
        # each has a best trial of its own, which loses by more in the other one
        finish(cell, {"1_none": (0.8, 0.79, 0.2), "1_relu": (0.3, 0.79, 0.8)}[cell.arm][cell.trial])
    chosen = choose_trials(study, cells)
    assert set(chosen) == {arm.name for arm in arms}
    write_study(dataclasses.replace(stored, study=study))
    write_study_report(stored.root)
    assert "learning_rate 0.1, as 1_none and 1_relu" in (stored.root / "report.html").read_text()
    assert {trial["schedule.learning_rate"] for trial in chosen.values()} == {0.1}
    lost = next(cell for cell in tried if (cell.arm, cell.trial) == ("1_none", 1))
    (lost.directory / RECORD).unlink()  # now 0.05 and 0.2 have both, with means of 0.55 and 0.5
    assert {trial["schedule.learning_rate"] for trial in choose_trials(study, cells).values()} == {0.05}


def test_the_slurm_script_is_a_script(searched, tmp_path):
    stored, search = searched
    plain = StoredStudy(stored.root, dataclasses.replace(stored.study, search=None), stored.costs, ())
    for study, last in ((stored, len(search) - 1), (plain, 59)):  # cells need what the search chooses
        script = slurm_script(study, "python -m xception_jax study run x.py", 8)
        assert f"#SBATCH --array=0-{last}%8" in script
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=True).returncode == 0
    assert f"--array={len(search)}-{len(search) + 59}%8 --dependency" in slurm_script(stored, "", 8)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (70, False), (75, True), (130, True)])
def test_a_job_that_was_stopped_is_requeued(searched, tmp_path, code, requeued):
    script = slurm_script(searched[0], f"bash -c 'exit {code}' --", 8)
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" > requeued\n')
    (tmp_path / "scontrol").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    script = script.replace(f"cd {os.getcwd()}", f"cd {tmp_path}")
    process = subprocess.run(["bash"], input=script, text=True, env=environment)
    assert process.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7_3\n"


def test_a_missing_dataset_is_reported_before_widths_are_solved(run_python, tmp_path):
    (tmp_path / "study.py").write_text(TINY.replace('"batch_size": 32', '"data.name": "nowhere", "batch_size": 32'))
    process = run_python("-m", "xception_jax", "study", "run", tmp_path / "study.py", "--workdir", tmp_path / "study")
    assert process.returncode == 66, process.stderr
    assert "the dataset nowhere is not in" in process.stderr
    assert not (tmp_path / "study").exists()
