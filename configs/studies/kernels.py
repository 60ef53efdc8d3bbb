"""Trains regular convolutions, whose kernels are then tested for separability.

    xception-jax study run studies/kernels --workdir runs/kernels
    xception-jax study kernels runs/kernels

If correlations across channels and in space can be mapped separately, a network without this constraint should learn
nearly separable kernels. `study kernels` measures, for each layer, the share of a filter's squared norm in one
spatial blueprint (BSConv) and the error of a sum of r depthwise separable convolutions (Network Decoupling), and
compares both with random kernels.

Two more arms see the same few images, one with their labels and one with random labels: what they share is owed to the
images and to training, and not to the task (Chowers and Weiss 2022, arXiv 2206.02454).

Sizes: smoke (shows that the study runs), cpu (default), cifar, imagenet (without the two arms); controls: parameters
(default), live_parameters, multiply_adds, live_multiply_adds, width. Design, gates and claims: docs/studies/kernels.md.
"""

import dataclasses

from ml_collections import ConfigDict

from xception_jax.study.design import Arm, PlannedComparison, Search, Study
from xception_jax.study.kernels import RANDOM_LABELS, TRUE_LABELS
from xception_jax.study.sizes import Size, study_size

# As many images are seen as by the other arms of the size, but few different ones, which can be learned by heart.
FEW_IMAGES = {
    "smoke": {"data.train_split": "train[:96]", "duration": "4 epochs"},
    "cpu": {"data.train_split": "train[:2000]", "duration": "55 epochs"},
    "cifar": {"data.train_split": "train[:10000]", "duration": "270 epochs"},
}
BY_HEART = {"model.segments": 1, "data.augmentation": "none"}


def _smoke() -> Size:
    """Returns a size that trains for seconds on the images that come with the package."""
    sized = study_size("cpu")
    config = ConfigDict(sized.config)
    config.update_from_flattened_dict(
        {
            "model.width_multiplier": 0.05,
            "model.middle_blocks": 0,
            "data.name": "fashion_mnist_subset",
            "data.train_split": "train[:320]",
            "data.eval_split": "train[320:420]",
            "data.test_split": "test[:100]",
            "duration": "1 epoch",
            "schedule.warmup": "0 steps",
            "evaluation.batch_size": 100,
            "evaluation.every": "1 epoch",
            "checkpoint.every": "1 epoch",
        }
    )
    return dataclasses.replace(sized, config=config, seeds=(0, 1), budget="minutes; shows that the study runs")


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    sized = _smoke() if size == "smoke" else study_size(size)
    few = FEW_IMAGES.get(size)
    labels = (
        Arm(TRUE_LABELS, BY_HEART | few),
        Arm(RANDOM_LABELS, BY_HEART | few | {"data.random_labels": 0}, tuned_as=TRUE_LABELS),
    ) if few else ()  # fmt: skip
    return Study(
        name=f"kernels-{size}-{control}",
        question="Are the kernels of trained regular convolutions separable, and more so with a ReLU after them?",
        hypothesis="In every layer the first component holds a larger share than in random kernels, and its excess is "
        "larger in late layers than in early ones; with a ReLU in between a regular network is better (spectrum). "
        "Claims K5 and K6 on true and random labels are in xception_jax/study/kernels/claims.py.",
        config=sized.config,
        arms=(
            Arm("depthwise", {"model.segments": "depthwise"}),
            Arm("regular_none", {"model.segments": 1}),
            Arm("regular_relu", {"model.segments": 1, "model.intermediate_activation": "relu"}),
            *labels,
        ),
        seeds=sized.seeds,
        margin=sized.margin,
        reference="depthwise",
        comparisons=(
            PlannedComparison("regular_relu", "regular_none", "better"),
            PlannedComparison("depthwise", "regular_none", "better"),
        ),
        control=control,
        search=Search(({},)) if size == "smoke" else Search(),
        budget=sized.budget,
    )
