"""Checks whether the dial study measured what it claims to. If a gate fails, its report interprets nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from xception_jax.study.dial.banks import BankSpec
from xception_jax.study.dial.claims import unknown_claims
from xception_jax.study.dial.design import REGULAR, tuning_cells
from xception_jax.study.dial.execute import chosen_rates
from xception_jax.study.dial.records import CELLS, record_key
from xception_jax.study.dial.results import DialResults
from xception_jax.study.gates import CheckedGate, key_of_largest, range_of

BAYES_RANGE = 0.003
FLAT = 0.01
MARGINAL = 0.30
PULLED = 0.10
_EXACT = 1e-6


def check_gates(results: DialResults) -> list[CheckedGate]:
    """Computes all gates."""
    return [gate for check in _CHECKS for gate in check(results)]


def _complete(results: DialResults) -> Iterator[CheckedGate]:
    """Checks that the records are those of the stated design: they may come from several machines."""
    study, planned = results.study, results.planned
    tuning = {cell.key for cell in tuning_cells(study)}
    tuned = {record_key(CELLS, row) for row in results.cells} & tuning
    for name, done, wanted in (
        ("cells that choose the rates and are missing", tuned, tuning),
        ("cells that count and are missing", results.done & planned, planned),
    ):
        yield CheckedGate(name, len(wanted) - len(done), 0, f"{len(done)} of {len(wanted)} cells")
    rates, design = chosen_rates(study, results.cells), study.design_hash()
    unfit = [
        record_key(CELLS, row)
        for row in results.counted
        if record_key(CELLS, row) not in planned
        or float(row["rate"]) != rates.get(row["arm"])
        or int(row["steps"]) != study.steps(study.arm(row["arm"]))
        or row["design"] != design
    ]
    name = "cells with another rate, number of steps or design than stated"
    yield CheckedGate(name, len(unfit), 0, " ".join(unfit[0]) if unfit else "")
    other = unknown_claims(study)
    yield CheckedGate("claims that this version states differently", len(other), 0, ", ".join(other))


def _all_banks(results: DialResults) -> dict[str, BankSpec]:
    return {bank.name: bank for row in results.study.rows for bank in row.banks}


def _bayes(results: DialResults) -> Iterator[CheckedGate]:
    means = {name: float(results.of_banks("bayes_accuracy", name).mean()) for name in _all_banks(results)}
    value, detail = range_of(means)
    yield CheckedGate("range of the Bayes accuracy over the banks, mean over seeds", value, BAYES_RANGE, detail)


def _flat(results: DialResults) -> Iterator[CheckedGate]:
    for row in results.study.rows:
        if row.arm.form == REGULAR:
            name = f"range of the accuracy of {row.arm.name} over the banks, mean over seeds"
            if not results.complete:  # it would show accuracies
                yield CheckedGate(name, math.nan, FLAT, "cells are missing")
                continue
            means = {bank.name: float(results.accuracy(row.arm.name, bank.name).mean()) for bank in row.banks}
            value, detail = range_of(means)
            yield CheckedGate(name, value, FLAT, detail)


def _ranks(results: DialResults) -> Iterator[CheckedGate]:
    """Checks the measured dial: exact at the separable end and for ranks, and rising with the angle for each seed."""
    wrong, checked = [], 0
    banks = _all_banks(results)
    of_family = [  # the free bank is the end of both
        (family, spec)
        for family in ("within", "across")
        for spec in banks.values()
        if spec.family == family or spec.name == "free"
    ]
    for family, spec in of_family:
        dial = results.of_banks(family, spec.name)
        ranks = results.of_banks(f"rank_{family}", spec.name)
        intended = spec.dial if spec.unit == "rank" else 1 if spec.dial == 0 else 9
        good = (ranks == intended) & ((dial <= _EXACT) if intended == 1 else (dial > _EXACT))
        previous = [
            other
            for other in banks.values()
            if (family, other) in of_family and other.unit == spec.unit and other.dial < spec.dial
        ]
        for other in previous:
            good &= results.of_banks(family, other.name) < dial
        checked += len(good)
        wrong += [spec.name] * int((~good).sum())
    yield CheckedGate("banks whose measured rank or dial is not the intended one", len(wrong), 0, f"of {checked}")


def _marginals(results: DialResults) -> Iterator[CheckedGate]:
    for column, name in (("from_means", "the channel means"), ("from_sums", "the channel sums")):
        means = {bank: float(results.of_banks(column, bank).mean()) for bank in _all_banks(results)}
        worst = key_of_largest(means)
        yield CheckedGate(f"accuracy of the best classifier that sees only {name}", means[worst], MARGINAL, worst)


def _pulled(results: DialResults) -> Iterator[CheckedGate]:
    """Compares the dial of the regular networks' templates, pulled back to the input, with that of the banks."""
    for row in results.study.rows:
        if row.arm.form != REGULAR:
            continue
        name = f"largest difference between the dial of {row.arm.name}, pulled back, and that of its bank"
        if not results.complete:
            yield CheckedGate(name, math.nan, PULLED, "cells are missing")
            continue
        off = {}
        for bank in row.banks:
            for family in ("within", "across"):
                pulled = results.of_cells(f"pulled_{family}", row.arm.name, bank.name)
                off[bank.name, family] = float(np.abs(pulled - results.of_banks(family, bank.name)).mean())
        worst = key_of_largest(off)
        yield CheckedGate(name, off[worst], PULLED, f"{worst[1]} filters, {worst[0]}")


_CHECKS: tuple[Callable[[DialResults], Iterator[CheckedGate]], ...] = (
    _complete, _bayes, _flat, _ranks, _marginals, _pulled,
)  # fmt: skip
