"""Defines the dial study: its arms, banks and cells, and what is claimed beforehand."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from xception_jax.errors import ConfigError
from xception_jax.study.controls import EQUAL_WITHIN
from xception_jax.study.design import NAME
from xception_jax.study.dial.banks import CHANNELS, BankSpec
from xception_jax.study.dial.network import CONTROLS, DEPTHWISE, FORMS, DialArm, DialCost, count, solve
from xception_jax.study.dial.training import CURVE, Recipe
from xception_jax.study.study_file import wrong_types

_DEEPEST, _WIDEST = 64, 256
_SEGMENTS = tuple(n for n in range(1, CHANNELS + 1) if CHANNELS % n == 0)

TUNING, COUNTED = "tune", "test"
REGULAR = "regular"


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm and the banks on which it is trained.

    Attributes:
      arm: kind of network.
      banks: the banks.
    """

    arm: DialArm
    banks: tuple[BankSpec, ...]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The choice of a learning rate for each arm, with the same rates, banks and seed for all arms.

    Attributes:
      rates: the rates that are tried.
      banks: the banks on which they are tried; the mean accuracy over these decides.
      seed: seed of banks, images and networks; it must not be one of the study's seeds.
    """

    rates: tuple[float, ...]
    banks: tuple[BankSpec, ...]
    seed: int = 1_000_000


@dataclasses.dataclass(frozen=True)
class DialStudy:
    """The study.

    Attributes:
      name: names the study.
      question: in one sentence.
      hypotheses: the claims by code, as in `claims.CLAIMS`, stated before anything is measured.
      rows: the arms and their banks. The regular arm of each depth is the reference for the cost of this depth.
      seeds: each draws banks, images and networks of its own.
      recipe: how cells are trained.
      tuning: how the rate of an arm is chosen.
      margin: the smallest difference in accuracy that matters, as a share.
      control: which cost is equal at each depth, see `network.CONTROLS`.
      reference_width: channels of the regular arm in each block.
      bayes_images: draws for the accuracy of the Bayes classifier.
      budget: the cost of the study in words.
    """

    name: str
    question: str
    hypotheses: Mapping[str, str]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    recipe: Recipe
    tuning: Tuning
    margin: float = 0.01
    control: str = "multiply_adds"
    reference_width: int = 24
    bayes_images: int = 61_440
    budget: str = ""

    def costs(self) -> dict[str, DialCost]:
        """Returns the widths and the cost of each arm, by name."""
        found = {}
        for row in self.rows:
            reference = self.reference(row.arm)
            target = getattr(reference, self.control)
            found[row.arm.name] = reference if is_reference(row.arm) else solve(row.arm, self.control, target)
        return found

    def reference(self, arm: DialArm) -> DialCost:
        """Returns the cost that an arm has to have: that of the regular arm of its depth, or of its `cost_depth`."""
        depth = arm.cost_depth or arm.depth
        return count(DialArm(REGULAR, REGULAR, depth), (self.reference_width,) * depth)

    def steps(self, arm: DialArm) -> int:
        """Returns for how many steps an arm is trained."""
        return self.recipe.steps * arm.longer

    def arm(self, name: str) -> DialArm:
        """Returns the arm with this name."""
        return next(row.arm for row in self.rows if row.arm.name == name)

    def design(self) -> dict[str, Any]:
        """Returns the study as plain data."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def design_hash(self) -> str:
        """Returns the first 16 hexadecimal digits of the SHA-256 of the design without seeds and budget."""
        kept = {name: value for name, value in self.design().items() if name not in ADDABLE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def is_reference(arm: DialArm) -> bool:
    """Returns whether the width of an arm is that of the study, and not solved."""
    return arm.form == REGULAR and not arm.ends and arm.cost_depth in (0, arm.depth)


ADDABLE = ("seeds", "budget")
"""Fields that may change after the first cells that count: seeds may be added."""


@dataclasses.dataclass(frozen=True)
class DialCell:
    """One training run.

    Attributes:
      stage: `TUNING` or `COUNTED`.
      arm: name of its arm.
      bank: the bank.
      seed: its seed.
      rate: the learning rate; None if it is still to be chosen.
    """

    stage: str
    arm: str
    bank: BankSpec
    seed: int
    rate: float | None

    @property
    def key(self) -> tuple[str, ...]:
        """Returns what identifies its row in cells.csv."""
        rate = f"{self.rate:g}" if self.stage == TUNING else ""
        return self.stage, self.arm, self.bank.name, str(self.seed), rate


def tuning_cells(study: DialStudy) -> list[DialCell]:
    """Returns the cells that choose the rates."""
    tuning = study.tuning
    return [
        DialCell(TUNING, row.arm.name, bank, tuning.seed, rate)
        for row in study.rows
        for bank in tuning.banks
        for rate in tuning.rates
    ]


def counted_cells(study: DialStudy, rates: Mapping[str, float]) -> list[DialCell]:
    """Returns the cells that count, seed by seed, so that an unfinished study has complete seeds.

    Args:
      study: the study.
      rates: the chosen rate of each arm; arms without one are planned with None.
    """
    return [
        DialCell(COUNTED, row.arm.name, bank, seed, rates.get(row.arm.name))
        for seed in study.seeds
        for row in study.rows
        for bank in row.banks
    ]


def check_dial(study: DialStudy, where: str) -> DialStudy:
    """Returns the study if it is consistent.

    Args:
      study: the study.
      where: the file that describes it, for messages.

    Raises:
      ConfigError: names repeat, a reference is missing, or another part of the study is not valid.
    """
    with wrong_types(where):
        for what, fix in itertools.chain(_problems(study), _cost_problems(study)):
            raise ConfigError(what, where, fix)
    return study


def _problems(study: DialStudy) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, how to fix it)."""
    names = [row.arm.name for row in study.rows]
    if not names or not all(isinstance(seed, int) for seed in study.seeds):
        yield "there are no arms, or a seed is not a whole number", "list arms and seeds"
    if not 1 <= study.reference_width <= _WIDEST:
        yield f"the reference has {study.reference_width} channels", f"set 1 to {_WIDEST}"
    for bank in {*study.tuning.banks, *(bank for row in study.rows for bank in row.banks)}:
        if not bank.is_valid:
            yield f"the bank {bank.name!r} is not valid", "set 'within' or 'across', and an angle or a rank"
    if len(set(names)) < len(names):
        yield "two arms have the same name", "give each arm its own name"
    if study.control not in CONTROLS:
        yield f"the control is {study.control!r}", f"set it to one of {', '.join(CONTROLS)}"
    if len(study.seeds) < 2 or len(set(study.seeds)) < len(study.seeds):
        yield "there are fewer than two different seeds, or a seed repeats", "list at least two, each once"
    recipe = dataclasses.asdict(study.recipe) | {"bayes_images": study.bayes_images}
    for name, value in recipe.items():
        least = CURVE if name == "steps" else 1
        if name != "momentum" and not (type(value) is int and value >= least):
            yield f"{name} is {value!r}", f"set it to a whole number of at least {least}"
    for name in ("rates", "banks"):
        if not getattr(study.tuning, name):
            yield f"the tuning has no {name}", "list at least one"
    for rate in study.tuning.rates:
        if not 0 < rate == float(f"{rate:.6g}"):
            yield (
                f"the rate {rate!r} is not a positive number of up to six digits",
                "round it: cells.csv has six digits",
            )
    if study.tuning.seed in study.seeds:
        yield "the tuning shares a seed with the study", "give it its own seed"
    for depth in {row.arm.cost_depth or row.arm.depth for row in study.rows}:
        if not any(is_reference(row.arm) and row.arm.depth == depth for row in study.rows):
            yield f"there is no regular arm of depth {depth}, on which a gate relies", "add one"
    for row in study.rows:
        if not NAME.fullmatch(row.arm.name):
            yield f"an arm is called {row.arm.name!r}", "name arms with letters, digits, _ . and -"
        if not 1 <= row.arm.depth <= _DEEPEST or row.arm.segments not in (DEPTHWISE, *_SEGMENTS):
            fix = f"set 1 to {_DEEPEST} blocks, and segments that divide {CHANNELS} channels"
            yield f"{row.arm.name} has {row.arm.depth} blocks with {row.arm.segments} segments", fix
        if row.arm.multiplier < 1 or row.arm.longer < 1:
            yield f"{row.arm.name} has a multiplier or a factor of its steps below 1", "set whole numbers of at least 1"
        if row.arm.form not in FORMS:
            yield f"the form of {row.arm.name} is {row.arm.form!r}", f"set it to one of {', '.join(FORMS)}"
        if not row.banks:
            yield f"arm {row.arm.name} has no banks", "list some"


def _cost_problems(study: DialStudy) -> Iterator[tuple[str, str]]:
    """Yields (what is wrong, how to fix it) in the costs of arms whose fields are valid."""
    costs = study.costs()
    for row in study.rows:
        cost, target = (getattr(each, study.control) for each in (costs[row.arm.name], study.reference(row.arm)))
        if abs(cost / target - 1) > EQUAL_WITHIN:
            what = f"no width of {row.arm.name} costs as much as the regular arm of {study.reference_width} channels"
            yield what, "set a larger reference_width"
