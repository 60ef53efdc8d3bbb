"""Trains regular convolutions, whose kernels are then tested for separability.

    xception-jax study run studies/kernels --workdir runs/kernels
    xception-jax study kernels runs/kernels

If correlations across channels and in space can be mapped separately, a network without this constraint should learn
nearly separable kernels. `study kernels` measures, for each layer, the share of a filter's squared norm in one
spatial blueprint (BSConv) and the error of a sum of r depthwise separable convolutions (Network Decoupling), and
compares both with random kernels.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds,
live_multiply_adds, width. Cost: docs/howto/study.md.
"""

from xception_jax.study.design import Arm, PlannedComparison, Study
from xception_jax.study.sizes import study_size


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = study_size(size)
    return Study(
        name=f"kernels-{size}-{control}",
        question="Are the kernels of trained regular convolutions separable, and more so with a ReLU after them?",
        hypothesis="In every layer the first component holds a larger share than in random kernels, and its excess is "
        "larger in late layers than in early ones; with a ReLU in between a regular network is better (spectrum).",
        config=sized.config,
        arms=(
            Arm("depthwise", {"model.segments": "depthwise"}),
            Arm("regular_none", {"model.segments": 1}),
            Arm("regular_relu", {"model.segments": 1, "model.intermediate_activation": "relu"}),
        ),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="depthwise",
        comparisons=(
            PlannedComparison("regular_relu", "regular_none", "better"),
            PlannedComparison("depthwise", "regular_none", "better"),
        ),
        control=control,
        budget=sized.budget,
    )
