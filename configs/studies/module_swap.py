"""Compares the modules of figures 1, 3, 4 and the separable convolution in one macro layout (sections 1 and 2).

    xception-jax study run studies/module_swap --workdir runs/module_swap

The paper's Xception also differs from its Inception V3 in residuals, stem and depth. Here only the module changes
and, to match the cost, the width; the rest is that of figure 5. The modules are the canonical Inception module
(figure 1), the simplified one (figure 2, in its equivalent form of figure 3 with three segments after a pointwise
convolution), the extreme one (figure 4, a segment for each channel) and the depthwise separable convolution, each
with and without residuals.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds,
live_multiply_adds, width. Cost: docs/howto/study.md.
"""

from typing import Any

from xception_jax.study.design import Arm, PlannedComparison, Study
from xception_jax.study.sizes import study_size

MODULES: dict[str, dict[str, Any]] = {
    "canonical": {"model.module": "inception"},
    "simplified": {"model.segments": 3, "model.order": "pointwise_first"},
    "extreme": {"model.segments": "depthwise", "model.order": "pointwise_first"},
    "separable": {"model.segments": "depthwise", "model.order": "depthwise_first"},
}
RESIDUALS = {"residual": True, "plain": False}


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = study_size(size)
    comparisons = [
        PlannedComparison(f"{arm}_{residual}", f"{baseline}_{residual}", expected)
        for residual in RESIDUALS
        for arm, baseline, expected in (
            ("simplified", "canonical", "unknown"),
            ("extreme", "simplified", "better"),
            ("extreme", "canonical", "better"),
            ("separable", "extreme", "equivalent"),
        )
    ]
    comparisons += [PlannedComparison(f"{module}_residual", f"{module}_plain", "better") for module in MODULES]
    return Study(
        name=f"module_swap-{size}-{control}",
        question="Is the extreme Inception module better than the Inception module, with all else equal?",
        hypothesis="The stronger hypothesis, that correlations across channels and in space are best mapped apart, "
        "makes the better use of the same parameters (section 1.2); the order is unimportant; residuals "
        "help every module (section 4.6).",
        config=sized.config,
        arms=tuple(
            Arm(f"{module}_{residual}", fields | {"model.residual": value}, line=residual)
            for residual, value in RESIDUALS.items()
            for module, fields in MODULES.items()
        ),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="separable_residual",
        comparisons=tuple(comparisons),
        control=control,
        tolerance=0.02 if size == "cpu" else 0.01,  # channels of a narrow network come in coarse steps
        budget=sized.budget,
    )
