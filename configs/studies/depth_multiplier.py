"""Compares one, two and four spatial filters per channel at equal cost.

    xception-jax study run studies/depth_multiplier --workdir runs/depth_multiplier

The paper uses one. With more, the space between the two convolutions is larger than the input, and at equal cost the
network is narrower.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds,
live_multiply_adds, width. Cost: docs/howto/study.md.
"""

from xception_jax.study.design import Arm, PlannedComparison, Study
from xception_jax.study.sizes import study_size

MULTIPLIERS = (1, 2, 4)


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = study_size(size)
    return Study(
        name=f"depth_multiplier-{size}-{control}",
        question="Is one spatial filter for each channel enough?",
        hypothesis="At equal cost a network is better wide than with several spatial filters for each channel: the "
        "correlations across channels are the harder part.",
        config=sized.config,
        arms=tuple(Arm(f"x{m}", {"model.depth_multiplier": m}) for m in MULTIPLIERS),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="x1",
        comparisons=(PlannedComparison("x2", "x1", "worse"), PlannedComparison("x4", "x1", "worse")),
        control=control,
        axis="model.depth_multiplier",
        budget=sized.budget,
    )
