"""Compares spatial kernels of 3, 5 and 7 pixels at equal cost.

    xception-jax study run studies/kernel_size --workdir runs/kernel_size

A larger depthwise kernel costs little, because only 1.6 % of the multiply-adds of Xception are spatial. ConvNeXt (Liu
et al. 2022) finds 7 better than 3 at 224 pixels.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds,
live_multiply_adds, width. Cost: docs/howto/study.md.
"""

from xception_jax.study.design import Arm, PlannedComparison, Study
from xception_jax.study.sizes import study_size

SIDES = (3, 5, 7)


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = study_size(size)
    # Large kernels exceed most feature maps of 32-pixel images.
    expected = "better" if size == "imagenet" else "unknown"
    return Study(
        name=f"kernel_size-{size}-{control}",
        question="Do larger depthwise kernels pay for themselves?",
        hypothesis="At 299 pixels they do, as depthwise kernels cost little; at 32 pixels, where the last feature maps "
        "have one or two, nothing is expected.",
        config=sized.config,
        arms=tuple(Arm(f"{side}x{side}", {"model.kernel_size": side}) for side in SIDES),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="3x3",
        comparisons=(PlannedComparison("5x5", "3x3", expected), PlannedComparison("7x7", "3x3", expected)),
        control=control,
        axis="model.kernel_size",
        budget=sized.budget,
    )
