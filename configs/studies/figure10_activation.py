"""Figure 10 (section 4.7): compares none, ReLU and ELU between the depthwise and the pointwise convolution.

    xception-jax study run studies/figure10_activation --workdir runs/figure10

Results of the paper, read off the plot, one seed each: none 0.790, ELU 0.780, ReLU 0.770.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds,
live_multiply_adds, width. Cost: docs/howto/study.md.
"""

from xception_jax.study.design import Arm, PlannedComparison, Study
from xception_jax.study.sizes import study_size


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = study_size(size)
    return Study(
        name=f"figure10-{size}-{control}",
        question="Does a non-linearity between the depthwise and the pointwise convolution harm?",
        hypothesis="Both are worse than none, ReLU worse than ELU (figure 10).",
        config=sized.config,
        arms=tuple(Arm(name, {"model.intermediate_activation": name}) for name in ("none", "relu", "elu")),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="none",
        comparisons=(
            PlannedComparison("relu", "none", "worse"),
            PlannedComparison("elu", "none", "worse"),
            PlannedComparison("elu", "relu", "better"),
        ),
        control=control,
        budget=sized.budget,
    )
