"""Runs a study or one cell of it on this machine, or writes a script that runs it on a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from xception_jax.config import DataConfig, duration_in_steps
from xception_jax.data.datasets import open_dataset
from xception_jax.environment import usable_cores, with_allocator
from xception_jax.errors import (
    RESUMABLE_EXIT_CODES,
    SUCCESS_EXIT_CODE,
    DivergedError,
    InputMissingError,
    StorageError,
    UsageError,
)
from xception_jax.logs.console import format_count, say
from xception_jax.names import LINE_LENGTH, file_stem, in_shell, one_line, printable, printable_path
from xception_jax.study.cells import Cell, find_equal
from xception_jax.study.controls import cost_headline, solve_costs
from xception_jax.study.design import COSTS, Study
from xception_jax.study.predictions import read_answers, write_answers
from xception_jax.study.progress_table import ProgressTable
from xception_jax.study.runner import LOG, Runner, make_slots, visible_gpus
from xception_jax.study.store import StoredStudy, read_study
from xception_jax.study.turns import FILE as TURNS
from xception_jax.study.turns import lacks_turns, measure_turns, read_turns, write_turns


def check_datasets(study: Study) -> None:
    """Opens all data of a study, so that missing data are reported before hours of work.

    Raises:
      InputMissingError: a dataset or one of its splits is missing.
    """
    for data in {study.arm_config(arm).data for arm in study.arms}:
        for split in filter(None, (data.train_split, data.eval_split, data.test_split)):
            open_dataset(data, split)


def run_study(
    stored: StoredStudy, environment: Mapping[str, str], *, jobs: int, retry: bool, reuse: Sequence[StoredStudy] = ()
) -> int:
    """Runs the cells that are left, those of the search first, and writes the report.

    Args:
      stored: an open study.
      environment: environment of the cells' processes.
      jobs: number of processes that run at a time.
      retry: whether failed cells are run again.
      reuse: studies whose finished cells are copied instead of trained, where the configs are equal.

    Returns:
      0 if every cell is done, else the exit code of the first one that is not.

    Raises:
      PreemptedError: on SIGTERM or SIGINT.
      InputMissingError: a dataset or one of its splits is missing.
    """
    search, trained = stored.search(), stored.cells()
    if not any(cell.directory.exists() for cell in (*search, *trained)):
        (stored.root / TURNS).unlink(missing_ok=True)  # the data of the study may have been changed since
    _keep_turns(stored)
    _reuse(stored.root, search, reuse)
    codes = _run_phase(stored, search, environment, jobs, retry, later=len(trained))
    if missing := [cell for cell in search if not _has_chosen(cell)]:
        say(f"no rates are chosen, because {len(missing)} trials have not finished, such as {missing[0].name}")
        say(f"see {printable_path(missing[0].directory / LOG)}, then run the same command with --retry")
        return next(filter(None, codes))
    if search:
        tuned = stored.tuned()
        trained = [cell for cell in stored.cells() if cell.arm in tuned]
        for arm in (arm for arm in stored.study.arms if arm.name not in tuned):
            say(f"arm {arm.name} is left out: no trial has finished for {' and '.join(arm.deciding)}")
    _reuse(stored.root, trained, reuse)
    codes += _run_phase(stored, trained, environment, jobs, retry, before=search)

    from xception_jax.study.report import format_results, write_study_report

    print(format_results(write_study_report(stored.root)))
    return next(filter(None, codes), SUCCESS_EXIT_CODE)


def _keep_turns(stored: StoredStudy) -> None:
    """Measures the turned images of a study unless it was done before; added seeds need it again."""
    if lacks_turns(stored.study, read_turns(stored.root)):
        say("measuring how separable the turned images are")
        write_turns(stored.root, measure_turns(stored.study))


def _reuse(root: Path, cells: Sequence[Cell], studies: Sequence[StoredStudy]) -> None:
    """Takes over the finished cells of other studies, with their predictions."""
    for study in studies if cells else ():
        others = study.cells()
        answers = read_answers(study.root, others)
        pairs = find_equal(cells, [*study.search(), *others])
        for cell, other in pairs:
            cell.take_over(other)
        names = [((cell.arm, cell.seed), (other.arm, other.seed)) for cell, other in pairs if cell.trial is None]
        write_answers(root, {name: answers[theirs] for name, theirs in names if theirs in answers})
        say(f"{len(pairs)} finished cells were taken from {study.root}")


def _run_phase(
    stored: StoredStudy,
    cells: Sequence[Cell],
    environment: Mapping[str, str],
    jobs: int,
    retry: bool,
    *,
    before: Sequence[Cell] = (),
    later: int = 0,
) -> list[int]:
    """Runs the cells that are left, and returns the exit codes of all cells of the phase."""
    left = [cell for cell in cells if _is_left(cell, retry)]
    if left:
        steps = _total_steps(cells)
        slots = make_slots(jobs, usable_cores(), visible_gpus(environment))
        table = ProgressTable(stored.study, stored.costs, cells, steps, jobs, later, sys.stderr, before)
        Runner(left, slots, _cell_environment(stored.root, environment), table.show).run()
    return [_own_exit_code(cell.record().get("exit_code", SUCCESS_EXIT_CODE)) for cell in cells]


def _has_chosen(trial: Cell) -> bool:
    """Returns whether a trial has finished. One that diverged has, too: its rate is not chosen."""
    return trial.record().get("exit_code") in (SUCCESS_EXIT_CODE, DivergedError.exit_code)


def _own_exit_code(code: int) -> int:
    """Returns the exit code of the command for that of a cell, which is negative if a signal killed the cell."""
    return code if code >= 0 else StorageError.exit_code


def _is_left(cell: Cell, retry: bool) -> bool:
    return cell.state() in ("waiting", "stopped") or (retry and cell.state() == "failed")


def _cell_environment(root: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of cells: they find this package, and share their compilations.

    All seeds of an arm run the same training step.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH", ""))))
    return {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), **with_allocator(environment), "PYTHONPATH": path}


def _total_steps(cells: Sequence[Cell]) -> dict[Path, int]:
    """Returns the steps of each cell by its directory. Opens all data, so that none is missing once cells run."""
    examples: dict[DataConfig, int] = {}
    steps = {}
    for cell in cells:
        config, data = cell.config, cell.config.data
        if data not in examples:
            for split in filter(None, (data.eval_split, data.test_split)):
                open_dataset(data, split)
            examples[data] = len(open_dataset(data, data.train_split))
        steps[cell.directory] = duration_in_steps(config.duration, config.batch_size, examples[data])
    return steps


def run_cell(root: Path, number: int, environment: Mapping[str, str]) -> int:
    """Runs one cell, as each job of a job array does.

    Args:
      root: the study directory.
      number: number of the cell; the trials of a search come first.
      environment: environment of the cell's process.

    Returns:
      The exit code of the cell.

    Raises:
      UsageError: there is no cell with this number.
      InputMissingError: the search for the arm has not ended, or none of its trials has finished.
    """
    stored = read_study(root)
    search, cells = stored.search(), stored.cells()
    if not 0 <= number < len(search) + len(cells):
        raise UsageError(f"there is no cell {number}", "--cell", f"cells are 0 to {len(search) + len(cells) - 1}")
    cell = [*search, *cells][number]
    if search and number >= len(search):
        deciding = stored.study.arm(cell.arm).deciding
        left = [trial.name for trial in search if trial.arm in deciding and not _has_chosen(trial)]
        if left or cell.arm not in stored.tuned():
            what = f"the search for arm {cell.arm} has not ended: {', '.join(left)} is left"
            if not left:
                what = f"no trial has finished for {' and '.join(deciding)}, which choose for arm {cell.arm}"
            raise InputMissingError(what, str(root), f"run cells 0 to {len(search) - 1} first")
    if not _is_left(cell, retry=False):
        return cell.record()["exit_code"]
    _keep_turns(stored)
    slots = make_slots(1, usable_cores(), visible_gpus(environment))
    runner = Runner([cell], slots, _cell_environment(stored.root, environment), lambda runner: None)
    runner.run()
    return _own_exit_code(cell.record()["exit_code"])


def slurm_script(stored: StoredStudy, command: str, jobs: int) -> str:
    """Returns a Slurm script that runs all cells as a job array.

    Args:
      stored: the study; its directory must be on a file system that all nodes share.
      command: `study run` with the study's file, without further arguments.
      jobs: the largest number of jobs that run at a time.
    """
    search, cells = len(stored.search()), len(stored.cells())
    last = search + cells - 1
    resumable = "|".join(map(str, RESUMABLE_EXIT_CODES))
    submit = ["#   sbatch FILE"]
    if search:
        submit = [
            f"#   first the search:  sbatch --array=0-{search - 1}%{jobs} FILE",
            f"#   then the cells:    sbatch --array={search}-{last}%{jobs} --dependency=afterany:JOB FILE",
        ]
    lines = [
        "#!/bin/bash",
        f"# {printable(stored.study.name)}: {search} trials of a search, {cells} cells. Submit:",
        *submit,
        f"#SBATCH --job-name={file_stem(stored.study.name).replace(' ', '_')}",
        f"#SBATCH --array=0-{search - 1 if search else last}%{jobs}",
        "#SBATCH --gpus-per-task=1",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --signal=B:TERM@180",
        "#SBATCH --requeue",
        f'#SBATCH --output="{printable_path(stored.root)}/slurm-%A_%a.txt"',
        f"cd {in_shell(os.getcwd())}",
        f"{command} --workdir {in_shell(stored.root)} --cell $SLURM_ARRAY_TASK_ID &",
        "trap 'kill -TERM $!' TERM",
        "wait $! || { code=$?; wait $!; code=$?; }",
        "# stopped before its end: the next job resumes it",
        f'case "${{code:-0}}" in {resumable})',
        '  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}";;',
        "esac",
        "exit ${code:-0}",
    ]
    return "\n".join(lines) + "\n"


def list_cells(study: Study) -> str:
    """Returns a table of the arms of a study and their costs. Nothing is trained, and no data are opened."""
    costs = solve_costs(study, {})
    trials, tuned = len(study.trials), len(study.tried)
    cells = len(study.arms) * len(study.seeds)
    name_width = max(len(arm.name) for arm in study.arms)
    lines = [
        f"{study.name}: {one_line(study.question)}",
        f"  {len(study.arms)} arms x {len(study.seeds)} seeds {list(study.seeds)} = {cells} cells"
        + f", after {trials} trials of {tuned} arms = {trials * tuned}" * bool(trials),
        f"  {cost_headline(study, costs)}",
        f"  margin {study.margin:.2%}; budget: {study.budget or 'not stated'}",
        f"{'arm':{name_width}} {'width':>8} "
        + "".join(f"{label:>10} {'off':>6} " for label in ("parameters", "live", "mult-adds", "live"))
        + f"{'ch/seg':>7}",
    ]
    reference = costs[study.reference]
    for arm in study.arms:
        cost = costs[arm.name]
        values = [(getattr(cost, name), getattr(reference, name)) for name in COSTS]
        lines.append(
            f"{arm.name:{name_width}} {cost.width_multiplier:8.4g} "
            + "".join(f"{format_count(value):>10} {value / base - 1:+6.1%} " for value, base in values)
            + f"{cost.channels_per_segment:7.1f}"
        )
    lines += [f"hypothesis: {one_line(study.hypothesis)}"]
    lines += [f"  {claim.code}: {one_line(claim.text)}" for claim in study.claims]
    lines += [f"  {c.name}: {c.expected}" for c in study.comparisons]
    lines += [f"  {entry.name} along {study.axis}: {entry.expected}" for entry in study.interactions]
    return "\n".join(printable(line, LINE_LENGTH) for line in lines)
