"""Measures the spectrum between the Inception and the Xception hypothesis (sections 1.2 and 4.7).

    xception-jax study run studies/spectrum --workdir runs/spectrum

The paper notes that the networks between a regular convolution (one segment of channels) and a depthwise one (a
segment for each channel) are unexplored. It finds that a ReLU between the two convolutions hurts at the depthwise
end. Its explanation is the depth of the intermediate feature spaces: non-linearities help for deep ones, as in
Inception, and hurt for those with one channel. If so, the sign of the effect changes along the spectrum.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds,
live_multiply_adds, width: studies/spectrum:cifar,multiply_adds. Cost: docs/howto/study.md.
"""

from xception_jax.study.design import CHANNELS_PER_SEGMENT, Arm, Interaction, PlannedComparison, Study
from xception_jax.study.sizes import study_size

ACTIVATIONS = ("none", "relu", "elu")
# The points of the axis and their config fields. Narrow networks have room for fewer segments, and so fewer points.
POINTS = {str(n): {"model.segments": n} for n in (1, 2, 4, 8, 16)}
GROUPS = {f"width{n}": {"model.group_width": n} for n in (8, 4, 2)}
DEPTHWISE = {"depthwise": {"model.segments": "depthwise"}}


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = study_size(size)
    points = {
        "cpu": POINTS | DEPTHWISE,
        "cifar": POINTS | {"width4": GROUPS["width4"], "width2": GROUPS["width2"]} | DEPTHWISE,
        "imagenet": {name: POINTS[name] for name in ("1", "2", "4", "8")} | GROUPS | DEPTHWISE,
    }[size]
    arms = [
        Arm(f"{point}_{activation}", fields | {"model.intermediate_activation": activation}, line=activation)
        for point, fields in points.items()
        for activation in ACTIVATIONS
    ]
    expected = {"depthwise": "worse", "1": "better"}
    return Study(
        name=f"spectrum-{size}-{control}",
        question="Does the sign of the effect of an activation between the two convolutions change along the spectrum?",
        hypothesis="A ReLU between the convolutions helps where segments are deep (a regular convolution) and harms "
        "where they are one channel deep: its effect rises through zero with the channels per segment. An ELU does "
        "the same, less at the depthwise end (figure 10).",
        config=sized.config,
        arms=tuple(arms),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="depthwise_none",
        comparisons=tuple(
            PlannedComparison(f"{point}_{activation}", f"{point}_none", expected.get(point, "unknown"))
            for activation in ("relu", "elu")
            for point in points
        ),
        interactions=tuple(
            Interaction(
                f"{activation} - none",
                tuple((f"{point}_{activation}", f"{point}_none") for point in points),
                "rises through zero",
            )
            for activation in ("relu", "elu")
        ),
        control=control,
        axis=CHANNELS_PER_SEGMENT,
        budget=sized.budget,
    )
