"""The spectrum between the Inception hypothesis and the Xception one (sections 1.2 and 4.7; open in the paper).

    python -m xception_jax study run configs/studies/spectrum.py --workdir runs/spectrum

Between a regular convolution (one segment of channels) and a depthwise one (a segment for each channel) lie networks
that the paper says were not explored. It finds a ReLU between the two convolutions harmful at the depthwise end, and
explains that by the depth of the spaces in between: helpful for deep ones, as in Inception, harmful for those of one
channel. If that is so, the sign of the effect changes on the way.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), multiply_adds, width:
configs/studies/spectrum.py:cifar,multiply_adds. Cost: docs/study.md.
"""

from xception_jax.study.design import CHANNELS_PER_SEGMENT, Arm, Interaction, PlannedComparison, Study
from xception_jax.study.sizes import study_size

ACTIVATIONS = ("none", "relu", "elu")
# The name of a point, and the fields that make it. Stages of a narrow network are few segments wide: fewer points.
POINTS = {str(n): {"model.segments": n} for n in (1, 2, 4, 8, 16)}
GROUPS = {f"width{n}": {"model.group_width": n} for n in (8, 4, 2)}
DEPTHWISE = {"depthwise": {"model.segments": "depthwise"}}


def get_study(size="cpu", control="parameters"):
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
