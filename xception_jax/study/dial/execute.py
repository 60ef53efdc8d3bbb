"""Runs a dial study: chooses the rates, trains the cells that are left, and writes the report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xception_jax.errors import SUCCESS_EXIT_CODE, PreemptedError
from xception_jax.logs.console import format_count, format_duration, say
from xception_jax.names import LINE_LENGTH, printable
from xception_jax.signals import StopRequested, StopSignals
from xception_jax.study.dial import task
from xception_jax.study.dial.banks import BankSpec, make_bank, measure
from xception_jax.study.dial.claims import CLAIMS
from xception_jax.study.dial.design import COUNTED, TUNING, DialCell, DialStudy, counted_cells, tuning_cells
from xception_jax.study.dial.network import DialCost
from xception_jax.study.dial.records import (
    BANKS,
    CELLS,
    add_record,
    cell_record,
    done,
    read_records,
    save_network,
    state,
)
from xception_jax.study.dial.training import Outcome, train
from xception_jax.study.dial.workers import Run, open_workers
from xception_jax.training.workdir import hold_directory


def run_dial(study: DialStudy, root: Path, report: Callable[[str], None] = say, jobs: int = 1) -> int:
    """Runs the cells that are left, and writes the report.

    Each finished cell adds a row to cells.csv. After an interruption, the same command trains the missing cells.

    Args:
      study: the study.
      root: its directory.
      report: called with a line for each cell.
      jobs: number of cells that run at a time, each in a process with its share of cores and GPUs; 1 for this process.
        On a CPU, a cell hardly uses more than one core.

    Returns:
      0.

    Raises:
      WorkdirError: another process runs this study, or the directory cannot be written.
      ConfigError: the directory holds cells of another design.
      StorageError: a record cannot be written.
      PreemptedError: on SIGTERM or SIGINT, or a process was killed.
    """
    try:
        with StopSignals(report, str(root)), hold_directory(root):
            with open_workers(jobs) as run:
                return _run(study, root, report, run, jobs)
    except StopRequested as stop:
        what = f"stopped by {stop}; finished cells are saved, and the running one starts again"
        raise PreemptedError(what, str(root), "run the same command to resume") from None


def _run(study: DialStudy, root: Path, report: Callable[[str], None], run: Run, jobs: int) -> int:
    state(root, study)
    cells = tuning_cells(study)
    planned = len(cells) + len(counted_cells(study, {}))

    def finished(cell: DialCell, outcome: Outcome, seconds_left: float) -> None:
        # Accuracies of counted cells are not shown: an observer could stop the study at a favourable moment.
        shown = f", {outcome.accuracy:.1%}" if cell.stage == TUNING else ""
        report(
            f"{len(done(root))}/{planned} {cell.stage} {cell.arm}, {cell.bank.name}, seed {cell.seed}, rate "
            f"{cell.rate:g}{shown}: {outcome.seconds:.0f} s; {format_duration(seconds_left / jobs)} left of this stage"
        )

    _run_cells(study, cells, root, run, finished)
    rates = chosen_rates(study, read_records(root, CELLS))
    _run_cells(study, counted_cells(study, rates), root, run, finished)

    from xception_jax.study.dial.report import format_dial, write_dial_report

    print(format_dial(write_dial_report(root)))
    return SUCCESS_EXIT_CODE


def _run_cells(
    study: DialStudy,
    cells: Sequence[DialCell],
    root: Path,
    run: Run,
    finished: Callable[[DialCell, Outcome, float], None],
) -> None:
    """Trains the cells that are left. Calls `finished` with each, its outcome and the seconds that are left."""
    known, strengths = done(root), _strengths(root)
    left = [cell for cell in cells if cell.key not in known]
    banks = dict.fromkeys((cell.bank, cell.seed) for cell in left)
    missing = [(bank, seed) for bank, seed in banks if (bank.name, seed) not in strengths]
    for _, bank_values in run((each, functools.partial(_bank_values, study, *each)) for each in missing):
        add_record(root, BANKS, bank_values)
    strengths = _strengths(root)
    costs, took = study.costs(), dict[str, list[float]]()
    work = ((cell, _training(study, cell, costs[cell.arm], strengths[cell.bank.name, cell.seed])) for cell in left)
    for number, (cell, (outcome, variables)) in enumerate(run(work), 1):
        values: dict[str, Any] = dataclasses.asdict(outcome)
        values |= {"pulled_within": outcome.pulled.within, "pulled_across": outcome.pulled.across}
        if cell.stage == COUNTED:
            save_network(root, cell, variables)
        add_record(root, CELLS, cell_record(study, cell, values))
        took.setdefault(cell.arm, []).append(outcome.seconds)
        typical = float(np.mean([seconds for arm in took.values() for seconds in arm]))
        seconds = sum(float(np.mean(took.get(later.arm, [typical]))) for later in left[number:])
        finished(cell, outcome, seconds)


def _training(study: DialStudy, cell: DialCell, cost: DialCost, strength: float) -> Callable[[], tuple[Outcome, Any]]:
    """Returns the function that trains a cell."""
    assert cell.rate is not None
    arm = study.arm(cell.arm)
    return functools.partial(
        train,
        arm,
        cost.widths,
        make_bank(cell.bank, cell.seed),
        strength,
        rate=cell.rate,
        seed=cell.seed,
        recipe=dataclasses.replace(study.recipe, steps=study.steps(arm)),
        test_part=task.TUNE if cell.stage == TUNING else task.TEST,
    )


def _strengths(root: Path) -> dict[tuple[str, int], float]:
    """Returns the strength of each bank that is known, by name and seed."""
    return {(row["bank"], int(row["seed"])): float(row["strength"]) for row in read_records(root, BANKS)}


def _bank_values(study: DialStudy, spec: BankSpec, seed: int) -> dict[str, Any]:
    """Computes the row of a bank."""
    bank = make_bank(spec, seed)
    strength = task.match_strength(bank, task.stream(seed, task.BAYES), count=min(study.bayes_images, 40_960))
    key = task.stream(seed, task.CHECK)
    bayes = task.bayes_accuracy(bank, strength, key, study.bayes_images)
    from_means, from_sums = task.marginal_accuracies(bank, strength, key, min(study.bayes_images, 20_480))
    dial = dataclasses.asdict(measure(bank))
    values: dict[str, Any] = {"bank": spec.name, "seed": seed, "strength": strength, "bayes_accuracy": bayes.value}
    return values | {"bayes_error": bayes.error, "from_means": from_means, "from_sums": from_sums, **dial}


def tried_rates(study: DialStudy, rows: Sequence[Mapping[str, str]]) -> dict[str, dict[float, float]]:
    """Returns the mean accuracy over the banks of the tuning, by arm and rate.

    A network that diverged guesses, and what is not a number counts as 0.
    """
    tried: dict[str, dict[float, float]] = {}
    for arm in (row.arm.name for row in study.rows):
        for rate in sorted(study.tuning.rates):
            found = [
                np.nan_to_num(float(row["accuracy"]))
                for row in rows
                if (row["stage"], row["arm"], row["rate"]) == (TUNING, arm, f"{rate:g}")
            ]
            if found:
                tried.setdefault(arm, {})[rate] = float(np.mean(found))
    return tried


def chosen_rates(study: DialStudy, rows: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Returns the rate of each arm with the highest mean accuracy; of equally good ones the smallest."""
    return {arm: max(means, key=lambda rate: (means[rate], -rate)) for arm, means in tried_rates(study, rows).items()}


def list_dial(study: DialStudy) -> str:
    """Returns a table of the arms and their costs, and the claims. Nothing is trained."""
    costs, tuned, counted = study.costs(), tuning_cells(study), counted_cells(study, {})
    width = max(map(len, costs))
    lines = [
        f"{study.name}: {study.question}",
        f"  {len(tuned)} cells choose the rates {study.tuning.rates}, then {len(counted)} count: "
        f"{len(study.seeds)} seeds {list(study.seeds)}",
        f"  steps of {study.recipe.batch_size} images; equal {study.control.replace('_', '-')} "
        f"for arms of one reference; margin {study.margin:.1%}; budget: {study.budget or 'not stated'}",
        f"{'arm':{width}} {'steps':>6} {'depth':>5} {'segments':>8} {'widths':>9} {'weights':>8} {'live':>8} "
        f"{'off':>6} {'mult-adds':>9} {'off':>6}  banks",
    ]
    for row in study.rows:
        cost, reference = costs[row.arm.name], study.reference(row.arm)
        segments = "1" if row.arm.form == "regular" else str(row.arm.segments or "all")
        lines.append(
            f"{row.arm.name:{width}} {study.steps(row.arm):>6,} {row.arm.depth:>5} {segments:>8} "
            f"{f'{cost.widths[0]}..{cost.widths[-1]}':>9} {cost.weights:>8,} {cost.live_parameters:>8,} "
            f"{cost.live_parameters / reference.live_parameters - 1:+6.1%} {format_count(cost.multiply_adds):>9} "
            f"{cost.multiply_adds / reference.multiply_adds - 1:+6.1%}  {' '.join(b.name for b in row.banks)}"
        )
    lines += [f"{code}: {text}" for code, text in study.hypotheses.items()]
    untested = [code for code in study.hypotheses if code in CLAIMS and not set(CLAIMS[code].arms) <= set(costs)]
    lines += [f"not tested, because arms are missing: {', '.join(untested)}"] * bool(untested)
    return "\n".join(printable(line, LINE_LENGTH) for line in lines)
