"""Figure 9 (section 4.6): compares Xception with and without residuals, each at its own learning rate.

    xception-jax study run studies/figure9_residual --workdir runs/figure9

The paper trains both with settings tuned for the first, and notes that they may not be optimal for the second. Here
each arm is first tuned on the development split with the same trials of learning rate and weight decay, then trained
with all seeds.

Sizes: cpu (default), cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds,
live_multiply_adds, width. Cost: docs/howto/study.md.
"""

from itertools import product

from xception_jax.study.design import Arm, PlannedComparison, Search, Study
from xception_jax.study.sizes import study_size

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0)  # relative to the learning rate of the size
DECAYS = (1.0, 5.0)  # relative to its weight decay


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = study_size(size)
    rate, decay = sized.config.schedule.learning_rate, sized.config.optimizer.weight_decay
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
        search=Search(
            tuple(
                {"schedule.learning_rate": factor * rate, "optimizer.weight_decay": times * decay}
                for factor, times in product(FACTORS, DECAYS)
            )
        ),
        budget=sized.budget,
    )
