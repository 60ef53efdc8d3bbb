"""Measures what separable convolutions cost on a task whose truth is known: templates in noise, on two dials.

    xception-jax study run studies/dial --workdir runs/dial

A kernel can be separable within its filters (one spatial pattern a filter: the Inception hypothesis, which a pointwise
convolution in front represents exactly) or across them (one spatial filter a channel: Xception's layer, spatial first).
The paper calls the order unimportant (section 1.2). Here the templates that have to be found are separable in one way,
in the other, or in neither, by a dial, and the best possible accuracy is the same on all of them.

Sizes: smoke (under two minutes, interprets nothing), cpu (default: a night of two cores), second (after cpu: what was
left open, with claims of its own), full (one GPU); controls: multiply_adds (default), live_parameters:
studies/dial:cpu,live_parameters. Design, gates and claims: docs/studies/dial.md.
"""

import dataclasses
from typing import Any

from xception_jax.errors import ConfigError
from xception_jax.study.dial.banks import FREE, BankSpec
from xception_jax.study.dial.claims import FIRST, SECOND
from xception_jax.study.dial.design import DialStudy, Row, Tuning
from xception_jax.study.dial.network import DEPTHWISE, DialArm
from xception_jax.study.dial.training import Recipe

ANGLES = (0, 22, 45, 67)
FREE_BANK = BankSpec("across", FREE)
ENDS = (BankSpec("within", 0), BankSpec("across", 0), FREE_BANK)
SEPARABLE = ENDS[:2]
ACROSS = (*(BankSpec("across", angle) for angle in ANGLES), FREE_BANK)
ALL = (*(BankSpec("within", angle) for angle in ANGLES), *ACROSS)
THREE = (BankSpec("across", 0), BankSpec("across", 45), FREE_BANK)
RANKS = tuple(BankSpec(family, rank, "rank") for family in ("within", "across") for rank in (1, 2, 4, 8))
TUNING_BANKS = (BankSpec("within", 45), BankSpec("across", 45))

BASE = (
    DialArm("regular", "regular"),
    DialArm("depthwise_first", "depthwise_first"),
    DialArm("pointwise_first", "pointwise_first"),
)
SEGMENTS = tuple(DialArm(f"segments_{n}", "depthwise_first", segments=n) for n in (1, 2, 4))
POINTWISE_SEGMENTS = tuple(DialArm(f"pointwise_segments_{n}", "pointwise_first", segments=n) for n in (1, 2, 4))
BOTH_ENDS = tuple(DialArm(f"{form}_ends", form, ends=True) for form in ("depthwise_first", "pointwise_first"))
# Controls: two blocks at the cost of eight, twice the steps, and about as many spatial filters as pointwise first has.
WIDE = tuple(dataclasses.replace(arm, name=f"{arm.name}_wide", cost_depth=8) for arm in BASE[:2])
LONG = tuple(dataclasses.replace(arm, name=f"{arm.name}_long", longer=2) for arm in BASE[:2])
MULTIPLIER = (DialArm("depthwise_first_multiplier_6", "depthwise_first", multiplier=6),)


def deep(depth: int) -> tuple[DialArm, ...]:
    """Returns the base arms at another depth."""
    return tuple(DialArm(f"{arm.name}_{depth}", arm.form, depth, DEPTHWISE) for arm in BASE)


def rows(*groups: tuple[tuple[DialArm, ...], tuple[BankSpec, ...]]) -> tuple[Row, ...]:
    """Returns a row for each arm."""
    return tuple(Row(arm, banks) for arms, banks in groups for arm in arms)


SIZES: dict[str, dict[str, Any]] = {
    "smoke": {
        "rows": rows((BASE, ENDS)),
        "seeds": (0, 1),
        "recipe": Recipe(steps=10, batch_size=32, test_images=512),
        "tuning": Tuning((0.01,), ENDS[:1]),
        "reference_width": 6,
        "bayes_images": 2048,
        "budget": "under two minutes of two cores; shows that the study runs",
    },
    "cpu": {
        "rows": rows(
            (BASE, ALL), (SEGMENTS, ACROSS), (BOTH_ENDS, ENDS), (deep(8)[:2], THREE),
            (WIDE, THREE), (LONG, THREE), (MULTIPLIER, ENDS),
        ),
        "seeds": (0, 1, 2, 3, 4),
        "recipe": Recipe(steps=3000),
        "tuning": Tuning((0.02, 0.04, 0.08, 0.16, 0.32), TUNING_BANKS),
        "budget": "a night of two cores",
    },
    # After the first: new seeds, lower rates, fewer arms, and claims of its own, about medians.
    "second": {
        "rows": rows(
            (BASE[:1], ENDS), (BASE[1:], SEPARABLE), (MULTIPLIER, SEPARABLE), (BOTH_ENDS[:1], ENDS),
            (BOTH_ENDS[1:], SEPARABLE),
        ),
        "seeds": tuple(range(100, 110)),
        "recipe": Recipe(steps=3000),
        "tuning": Tuning((0.04, 0.08), TUNING_BANKS),
        "claims": SECOND,
        "budget": "two hours of two cores, besides the cells that choose the rates",
    },
    "full": {
        "rows": rows(
            (BASE, ALL + RANKS), (SEGMENTS, ALL), (POINTWISE_SEGMENTS, ALL), (BOTH_ENDS, ALL),
            (deep(4), ALL), (deep(8), ALL), (WIDE, ALL), (LONG, ALL), (MULTIPLIER, ALL),
        ),
        "seeds": tuple(range(10)),
        "recipe": Recipe(steps=6000),
        "tuning": Tuning((0.02, 0.04, 0.08, 0.16, 0.32), TUNING_BANKS),
        "budget": "not measured; for one GPU",
    },
}  # fmt: skip


def get_study(size: str = "cpu", control: str = "multiply_adds") -> DialStudy:
    if size not in SIZES:
        raise ConfigError(f"there is no size {size!r}", "the study, after its colon", f"choose {', '.join(SIZES)}")
    sized = dict(SIZES[size])
    claims = sized.pop("claims", FIRST)
    return DialStudy(
        name=f"dial-{size}-{control}",
        question="Which order and how many segments of a separable convolution fit kernels that are separable within "
        "filters, across filters, or not at all?",
        hypotheses={code: claim.text for code, claim in claims.items()},
        control=control,
        **sized,
    )
