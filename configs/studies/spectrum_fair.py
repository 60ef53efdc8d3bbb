"""Measures the spectrum between regular and depthwise convolutions, with arms that cost the same (section 1.2).

    xception-jax study run studies/spectrum_fair --workdir runs/spectrum_fair

The first study of the spectrum (`studies/spectrum`) compared networks whose stem followed the width, whose last maps
had one pixel, and whose regular end had a pointwise convolution behind it. Here the stem is fixed, no map is
smaller than seven pixels, the control is a live cost, learning rates are tuned, and one convolution without a pointwise
partner stands at the regular end.

Sizes: smoke (shows that the study runs), cpu (default), cifar, imagenet; controls: live_parameters (default),
live_multiply_adds, parameters, multiply_adds, width. Design, gate and claims: docs/studies/spectrum_fair.md.
"""

from typing import Any

from xception_jax.study.claims import Claim, Part, Term
from xception_jax.study.design import CHANNELS_PER_SEGMENT, COSTS, Arm, Interaction, PlannedComparison, Search, Study
from xception_jax.study.sizes import fair_size

POINTS: dict[str, dict[str, Any]] = {
    **{str(width): {"model.group_width": width} for width in (1, 2, 4, 8, 16)},
    "all": {"model.group_width": "all"},
}
# Lines of effects need fewer points than that of the accuracy: these have the ends, and two points in between.
OF_EFFECTS = ("1", "2", "8", "all")
# What two cores can train in hours; larger sizes have all points and lines.
SMALL = {"smoke": (("1", "all"), ("none",)), "cpu": (OF_EFFECTS, ("none", "relu", "bn", "bn_relu"))}
BATCH_NORM = {"model.intermediate_batch_norm": True}
# BatchNorm without an activation separates the effect of an activation behind BatchNorm from that of BatchNorm.
LINES: dict[str, dict[str, Any]] = {
    "none": {},
    "relu": {"model.intermediate_activation": "relu"},
    "bn": BATCH_NORM,
    "bn_relu": BATCH_NORM | {"model.intermediate_activation": "relu"},
    "bn_elu": BATCH_NORM | {"model.intermediate_activation": "elu"},
}
SHARED = (("none", "relu"), ("bn", "bn_relu", "bn_elu"))
EFFECTS = {"relu": "none", "bn_relu": "bn", "bn_elu": "bn"}
RATES = {
    "cpu": (0.0125, 0.035, 0.1),
    "cifar": (0.05, 0.1, 0.2, 0.4),
    "imagenet": (0.1, 0.2, 0.4, 0.8),
}
GATES = {"smoke": 0.9, "cpu": 0.88, "cifar": 0.9, "imagenet": None}  # a ReLU, whose harm is measured, must pass, too
# Every weight is alive here, so that this cost is the same as the one that is controlled. The others differ.
EQUAL_WITH = {"parameters": "live_parameters", "live_parameters": "parameters"}
TOLERANCES = {"smoke": 0.2, "cpu": 0.02, "cifar": 0.02, "imagenet": 0.01}


def claims(points: tuple[str, ...], margin: float) -> tuple[Claim, ...]:
    """Returns the claims; slopes are over log2 of the channels that a spatial filter sees.

    A slope has a second part without the point at the end that has the most weight, so that no single arm decides it.
    """
    shown = tuple(point for point in points if point in OF_EFFECTS)

    def along(line: str, baseline: str = "", over: tuple[str, ...] = shown) -> tuple[Term, ...]:
        return tuple((f"{point}_{line}", f"{point}_{baseline}" if baseline else "", 1.0) for point in over)

    def slopes(name: str, line: str, baseline: str) -> tuple[Part, ...]:
        return (
            Part(f"slope of {name}", along(line, baseline), "above", 0.0, "slope"),
            Part(f"slope of {name}, without depthwise", along(line, baseline, shown[1:]), "above", 0.0, "slope"),
        )

    def at(point: str, line: str, baseline: str) -> tuple[Term, ...]:
        return ((f"{point}_{line}", f"{point}_{baseline}", 1.0),)

    return (
        Claim(
            "S1",
            "At equal live cost, a depthwise separable network is better than a regular one by more than the margin.",
            (Part("depthwise - regular, none", (("1_none", "regular", 1.0),), "above", margin),),
        ),
        Claim(
            "S2",
            "At equal live cost, accuracy falls with the channels that a spatial filter sees.",
            tuple(
                Part(name, along("none", over=chosen), "below", 0.0, "slope")
                for name, chosen in (
                    ("slope of the accuracy, none", points),
                    ("slope, without all channels", points[:-1]),
                )
                if len(chosen) > 1  # the smoke size has two points
            ),
        ),
        Claim(
            "S3",
            "The effect of a ReLU between the convolutions rises with the channels that a spatial filter sees, as in "
            "the paper and behind BatchNorm.",
            (*slopes("relu - none", "relu", "none"), *slopes("BN and relu - BN", "bn_relu", "bn")),
        ),
        Claim(
            "S4",
            "Behind BatchNorm, the effect of a ReLU changes its sign along the spectrum: it harms depthwise, and "
            "helps where a spatial filter sees all channels.",
            (
                Part("BN and relu - BN, depthwise", at("1", "bn_relu", "bn"), "below", 0.0),
                Part("BN and relu - BN, all channels", at("all", "bn_relu", "bn"), "above", 0.0),
            ),
        ),
        Claim(
            "S5",
            "Behind BatchNorm, the effect of an ELU rises with the channels that a spatial filter sees, and depthwise "
            "an ELU is better than a ReLU.",
            (
                *slopes("BN and elu - BN", "bn_elu", "bn"),
                Part("elu - relu behind BN, depthwise", at("1", "bn_elu", "bn_relu"), "above", 0.0),
            ),
        ),
    )


def get_study(size: str = "cpu", control: str = "live_parameters") -> Study:
    sized = fair_size(size)
    smoke = size == "smoke"
    points, lines = SMALL.get(size, (tuple(POINTS), tuple(LINES)))
    sized.config.model.initialization = "variance_preserving"  # glorot's variance changes along the axis

    def arm(point: str, line: str) -> Arm:
        # Lines that are compared share a rate, the best on average, so that its choice is no part of the effect.
        shared = next(group for group in SHARED if line in group)
        tuned_as = tuple(f"{point}_{each}" for each in shared if each in lines) if point in OF_EFFECTS else ()
        return Arm(f"{point}_{line}", POINTS[point] | LINES[line], line, tuned_as)

    arms = [arm(point, line) for point in points for line in lines if line == "none" or point in OF_EFFECTS]
    effects = {line: baseline for line, baseline in EFFECTS.items() if line in lines}
    stated = claims(points, sized.margin)
    names = {arm.name for arm in arms} | {"regular"}
    return Study(
        name=f"spectrum_fair-{size}-{control}",
        question="How many channels should a spatial filter see, and does that decide whether an activation helps?",
        hypothesis="Correlations across channels and in space are best mapped apart: at equal live cost, accuracy "
        "falls from depthwise to regular convolutions. A ReLU between the convolutions harms where a filter sees one "
        "channel and helps where it sees all of them (section 4.7).",
        config=sized.config,
        arms=(*arms, Arm("regular", {"model.module": "regular"}, line="regular")),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="1_none",
        comparisons=(
            *(
                PlannedComparison(f"{point}_none", "1_none", "unknown", "channels a filter sees")
                for point in points
                if point != "1"
            ),
            PlannedComparison("all_none", "regular", "unknown", "pointwise partner"),
            *(
                PlannedComparison(f"{point}_{line}", f"{point}_{baseline}", "unknown", f"{line} - {baseline}")
                for line, baseline in effects.items()
                for point in OF_EFFECTS
            ),
        ),
        interactions=tuple(
            Interaction(
                f"{line} - {baseline}",
                tuple((f"{point}_{line}", f"{point}_{baseline}") for point in OF_EFFECTS),
                "unknown",  # S3 to S5 state what is expected
            )
            for line, baseline in effects.items()
        ),
        control=control,
        unequal=tuple(cost for cost in COSTS if cost not in (control, EQUAL_WITH.get(control))),
        tolerance=TOLERANCES[size],
        axis=CHANNELS_PER_SEGMENT,
        search=None if smoke else Search(tuple({"schedule.learning_rate": rate} for rate in RATES[size])),
        analysis="welch",
        gate=GATES[size],
        claims=tuple(claim for claim in stated if claim.arms <= names),
        budget=sized.budget,
    )
