"""Figure 9 (section 4.6): compares Xception with and without residuals, each at its own learning rate.

    xception-jax study run studies/figure9_residual --workdir runs/figure9

The paper trains both with settings tuned for the first, and notes that they may not be optimal for the second. Here
each arm is first tuned on the development split with the same trials of learning rate and weight decay, then trained
with all seeds.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds,
live_multiply_adds, width. Cost: docs/howto/study.md.
"""

from xception_jax.study.design import Arm, PlannedComparison, Study
from xception_jax.study.sizes import study_size


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = study_size(size)
    return Study(
        name=f"figure9-{size}-{control}",
        question="What do residual connections add when the learning rate is tuned for each network?",
        hypothesis="They help (figure 9: 0.790 against 0.672 at one learning rate); less so after tuning.",
        config=sized.config,
        arms=(Arm("residual", {"model.residual": True}), Arm("plain", {"model.residual": False})),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="residual",
        comparisons=(PlannedComparison("residual", "plain", "better"),),
        control=control,
        budget=sized.budget,
    )
