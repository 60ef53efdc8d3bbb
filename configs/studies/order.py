"""Compares depthwise first with pointwise first. Section 1.2 of the paper calls the order "unimportant" without a test.

    xception-jax study run studies/order --workdir runs/order

BSConv (Haase and Amthor 2020) argues for pointwise first. The orders are compared with and without a ReLU between the
two convolutions, for depthwise convolutions and for four segments.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds,
live_multiply_adds, width. Cost: docs/howto/study.md.
"""

from xception_jax.study.design import Arm, PlannedComparison, Study
from xception_jax.study.sizes import study_size

SEGMENTS = {"depthwise": "depthwise", "4": 4}
ACTIVATIONS = ("none", "relu")
ORDERS = {"spatial": "depthwise_first", "pointwise": "pointwise_first"}


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = study_size(size)
    return Study(
        name=f"order-{size}-{control}",
        question="Does it matter whether the spatial or the pointwise convolution comes first?",
        hypothesis="It does not (section 1.2): in a stack of such layers the orders differ at its two ends.",
        config=sized.config,
        arms=tuple(
            Arm(
                f"{segments}_{activation}_{order}",
                {
                    "model.segments": value,
                    "model.intermediate_activation": activation,
                    "model.order": ORDERS[order],
                },
                line=f"{order} first",
            )
            for segments, value in SEGMENTS.items()
            for activation in ACTIVATIONS
            for order in ORDERS
        ),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="depthwise_none_spatial",
        comparisons=tuple(
            PlannedComparison(f"{segments}_{activation}_pointwise", f"{segments}_{activation}_spatial", "equivalent")
            for segments in SEGMENTS
            for activation in ACTIVATIONS
        ),
        control=control,
        tolerance=0.02 if size == "cpu" else 0.01,  # channels of a narrow network come in coarse steps
        budget=sized.budget,
    )
