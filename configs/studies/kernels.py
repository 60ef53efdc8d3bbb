"""Trains regular convolutions, whose kernels are then tested for separability.

    xception-jax study run studies/kernels --workdir runs/kernels
    xception-jax study kernels runs/kernels

If correlations across channels and in space can be mapped separately, a network without this constraint should learn
nearly separable kernels. `study kernels` measures, for each layer, the share of a filter's squared norm in one
spatial blueprint (BSConv) and the error of a sum of r depthwise separable convolutions (Network Decoupling), and
compares both with random kernels.

Two more arms see the same few images, one with their labels and one with random labels: what they share is owed to the
images and to training, and not to the task (Chowers and Weiss 2022, arXiv 2206.02454).

The stem is fixed, and no map is smaller than 7 x 7 pixels, so that every tap of a kernel meets pixels. Images of size
cpu are crops of colour photographs, because grey images would make kernels separable whatever is learned.

Sizes: smoke (shows that the study runs), cpu (default, only the two arms), cifar, imagenet (without them). Design,
gates and claims: docs/studies/kernels.md.
"""

from xception_jax.study.design import Arm, Search, Study
from xception_jax.study.kernels import RANDOM_LABELS, TRUE_LABELS
from xception_jax.study.kernels.claims import MEMORISED
from xception_jax.study.sizes import Size, fair_size

# Few different images, which can be memorized. At size cifar, as many are seen as by the other arm.
FEW_IMAGES = {
    "smoke": {"data.train_split": "train[:96]"},
    "cpu": {"data.train_split": "train", "duration": "200 epochs"},
    "cifar": {"data.train_split": "train[:10000]", "duration": "270 epochs"},
}
BY_HEART = {"data.augmentation": "none"}
WIDTHS = {"smoke": 0.037, "cpu": 0.054, "cifar": 0.174, "imagenet": 0.354}  # as many parameters as depthwise has
BUDGETS = {"cpu": "seven to eight processor minutes per cell"}
GATES = {"smoke": MEMORISED, "cpu": MEMORISED, "cifar": MEMORISED, "imagenet": None}


def _sized(size: str) -> Size:
    sized = fair_size(size)
    if size == "cpu":
        data = sized.config.data
        data.name, data.eval_crop = "photograph_crops", 1.0
        data.train_split, data.eval_split, data.test_split = "train", "dev", "test"
        sized.config.model.num_classes = 6
        # Every rate tells six photographs apart, so that a search would choose by ties.
        sized.config.schedule.learning_rate = 0.1
        sized.config.optimizer.weight_decay = 1e-4
        sized.config.evaluation.every = sized.config.checkpoint.every = "25 epochs"
    sized.config.model.module = "regular"
    sized.config.model.width_multiplier = WIDTHS[size]
    return sized


def get_study(size: str = "cpu") -> Study:
    sized, few = _sized(size), FEW_IMAGES.get(size)
    labels: tuple[Arm, ...] = ()
    if few is not None:
        labels = (
            Arm(TRUE_LABELS, {**BY_HEART, **few}),
            Arm(RANDOM_LABELS, {**BY_HEART, **few, "data.random_labels": 0}, tuned_as=(TRUE_LABELS,)),
        )
    # At size cpu there are no other images.
    arms = labels if size == "cpu" else (Arm("regular", {}), *labels)
    return Study(
        name=f"kernels-{size}",
        question="Are the kernels of trained regular convolutions separable?",
        hypothesis="The first layer tells about images and later ones about the task: claims K5 and K6 on true and "
        "random labels, in xception_jax/study/kernels/claims.py.",
        config=sized.config,
        arms=arms,
        seeds=tuple(range(10)) if size == "cpu" else sized.seeds,
        margin=sized.margin,
        reference=arms[0].name,
        control="width",
        search=None if size in ("smoke", "cpu") else Search(),
        gate=GATES[size],
        budget=BUDGETS.get(size, sized.budget),
    )
