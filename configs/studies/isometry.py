"""Measures what separability costs on real images that are turned without losing anything: separably, or freely.

    xception-jax study run studies/isometry --workdir runs/isometry

Blocks of 2 x 2 pixels and 3 channels are multiplied by an orthogonal matrix exp(t A) (data/turn.py). A Kronecker turn
keeps channels and space separable, a free turn of the same norm does not; information, norms and the error of the best
possible classifier stay the same. If depthwise separable convolutions work because images are separable, free turns
cost them more, relative to a regular 3 x 3 convolution, than Kronecker turns do. That is a difference of differences:

    effect(t) = (depthwise - regular | free turn t) - (depthwise - regular | Kronecker turn t)

Sizes: smoke (two minutes, interprets nothing), cpu (default; garments stacked as channels, which this package ships),
cifar, imagenet; controls: parameters (default), live_parameters, multiply_adds, live_multiply_adds, width. Design,
gates and claims: docs/studies/isometry.md.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from xception_jax.config import default_config
from xception_jax.errors import ConfigError
from xception_jax.study.claims import Claim, Part, Term
from xception_jax.study.design import Arm, PlannedComparison, Search, Study
from xception_jax.study.gates import Gate
from xception_jax.study.sizes import study_size

MODULES: dict[str, dict[str, Any]] = {
    "regular": {"model.module": "regular"},
    "depthwise": {},
    "pointwise": {"model.order": "pointwise_first"},
    "depthwise3": {"model.depth_multiplier": 3},  # three spatial filters for each channel, also at the image
}
KINDS = ("kronecker", "free")
ANGLES = (0.25, 0.5, 1.0)
RATES = (0.4, 1.0, 2.5)  # times the rate of the config
MARGIN = 0.01
GATES = {"smoke": 0.8, "cpu": 0.8, "cifar": 0.8, "imagenet": None}  # training accuracy
FLAT = 0.015  # regular networks find both kinds of turns about as difficult
DEEP = "deep"

Turns = tuple[tuple[str, float], ...]
NONE = ("none", 0.0)
ENDS = tuple((kind, 1.0) for kind in KINDS)
TURNS = (NONE, *((kind, angle) for angle in ANGLES for kind in KINDS))


def name(module: str, kind: str, angle: float, depth: str = "") -> str:
    """Returns the name of an arm, such as depthwise_free_100 or regular_none."""
    return "_".join(filter(None, (module, depth, kind, f"{round(100 * angle)}" if angle else "")))


def arms(modules: tuple[str, ...], turns: Turns, deep: int = 0) -> Iterator[Arm]:
    """Yields an arm for each module and turn. All arms of a module have the rate that is best for both turns at t = 1.

    Args:
      modules: keys of `MODULES`.
      turns: kinds and angles.
      deep: number of middle modules; 0 for none.
    """
    depth = DEEP if deep else ""
    for module in modules:
        tuned_as = tuple(name(module, *turn, depth) for turn in ENDS)
        for kind, angle in turns:
            fields = {"data.turn": kind, "data.turn_angle": angle} if angle else {}
            fields |= MODULES[module] | ({"model.middle_blocks": deep} if deep else {})
            line = f"{module}{', deep' if deep else ''}, {kind}"
            yield Arm(name(module, kind, angle, depth), fields, line, tuned_as)


def effect(angle: float, weight: float = 1.0, depth: str = "", module: str = "depthwise") -> tuple[Term, ...]:
    """Returns `weight` times the effect at an angle."""
    return tuple(
        (name(module, kind, angle, depth), name("regular", kind, angle, depth), sign * weight)
        for kind, sign in (("free", 1.0), ("kronecker", -1.0))
    )


def slope() -> tuple[Term, ...]:
    """Returns the least-squares slope of the effect over the angle; at 0 the effect is 0, because nothing is turned."""
    points = (0.0, *ANGLES)
    mean = sum(points) / len(points)
    norm = sum((point - mean) ** 2 for point in points)
    return tuple(term for angle in ANGLES for term in effect(angle, (angle - mean) / norm))


H6 = Claim(
    "H6",
    "Free turns cost depthwise separable convolutions more than Kronecker turns do: the effect at t = 1 is below -1 "
    "point.",
    (Part("effect at 1", effect(1.0), "below", -MARGIN),),
)
H7 = Claim(
    "H7",
    "Depth lowers what the free turn costs: at t = 1, the effect is closer to zero with the middle flow than without.",
    (
        Part("effect at 1 without middle flow", effect(1.0), "below", 0.0),
        Part("effect with middle flow - effect without", effect(1.0, depth=DEEP) + effect(1.0, -1.0), "above", 0.0),
    ),
)
H8 = Claim(
    "H8",
    "Free turns also cost networks that are pointwise first more than Kronecker turns do, which keep what is separable "
    "within filters: their effect at t = 1 is below -1 point.",
    (Part("effect at 1, pointwise first", effect(1.0, module="pointwise"), "below", -MARGIN),),
)
H9 = Claim(
    "H9",
    "It is not only that three spatial filters meet the image: with three filters for each channel, the effect at "
    "t = 1 is below -1 point, too.",
    (Part("effect at 1, three filters for each channel", effect(1.0, module="depthwise3"), "below", -MARGIN),),
)
H10 = Claim(
    "H10",
    "The larger the turn, the more it costs: the effect falls with t.",
    (Part("slope of the effect over t", slope(), "below", 0.0),),
)


def _network(config: ConfigDict) -> ConfigDict:
    """Makes modules of the study meet the pixels, keeps all maps at 7 pixels and more, and turns by no angle yet."""
    config.model.stem = "module"
    config.model.strides = (2, 2, 1, 1)
    config.model.middle_blocks = 0
    config.model.initialization = "variance_preserving"
    config.data.turn = "kronecker"
    config.data.turn_angle = 0.0
    return config


def _cpu() -> ConfigDict:
    """Returns the size for garments stacked as channels: four epochs of 27,000 images of 28 x 28 pixels."""
    config = _network(study_size("cpu").config)
    config.model.width_multiplier = 0.15
    config.model.stem_width = 8
    config.model.head_width = 64
    config.data.name = "fashion_mnist_stacks"
    config.data.image_size = 28
    config.data.train_split = "train"
    config.data.eval_split = "dev"
    config.data.test_split = "test"
    config.duration = "4 epochs"
    config.schedule.learning_rate = 0.05
    config.evaluation.every = "1 epoch"
    config.checkpoint.every = "1 epoch"
    return config


def _smoke() -> ConfigDict:
    config = _cpu()
    config.data.train_split = "train[:640]"
    config.data.eval_split = "dev[:100]"
    config.data.test_split = "test[:100]"
    config.batch_size = 32
    config.duration = "6 steps"
    config.schedule.warmup = "2 steps"
    config.evaluation.batch_size = 100
    config.log_every = "2 steps"
    return config


def _cifar() -> ConfigDict:
    config = _network(study_size("cifar").config)
    config.model.stem_width = 32
    config.model.head_width = 128
    return config


def _imagenet() -> ConfigDict:
    """Returns the size for ImageNet at 150 pixels, from which the stem of modules makes the maps of figure 5."""
    config = _network(study_size("imagenet").config)
    config.model.strides = default_config().model.strides
    config.model.stem_width = 32
    config.model.head_width = 384
    config.data.image_size = 150
    return config


BOTH = ("regular", "depthwise")
SIZES: dict[str, dict[str, Any]] = {
    "smoke": {
        "config": _smoke,
        "arms": tuple(arms(BOTH, ENDS)),
        "seeds": (0, 1),
        "search": None,
        "budget": "two minutes of one core; shows that the study runs",
    },
    "cpu": {
        "config": _cpu,
        "arms": tuple(arms(tuple(MODULES), ENDS)),
        "seeds": tuple(range(1, 11)),  # the pilot had seed 0
        "budget": "4.5 processor hours",
    },
    "cifar": {
        "config": _cifar,
        "arms": (*arms(tuple(MODULES), TURNS), *arms(BOTH, ENDS, deep=8)),
        "seeds": tuple(range(1, 9)),  # the pilot had seed 0
        "budget": "not measured; for one GPU",
    },
    "imagenet": {
        "config": _imagenet,
        "arms": (*arms(BOTH, TURNS), *arms(("pointwise", "depthwise3"), ENDS), *arms(BOTH, ENDS, deep=8)),
        "seeds": (1, 2, 3, 4, 5),
        "budget": "not measured; for a pod",
    },
}


def get_study(size: str = "cpu", control: str = "parameters") -> Study:
    if size not in SIZES:
        raise ConfigError(f"there is no size {size!r}", "the study, after its colon", f"choose {', '.join(SIZES)}")
    parts = SIZES[size] | {"config": SIZES[size]["config"]()}
    names = [arm.name for arm in parts["arms"]]
    rate = parts["config"].schedule.learning_rate
    rates = [float(f"{factor * rate:.3g}") for factor in RATES]
    search = Search(trials=tuple({"schedule.learning_rate": each} for each in rates))
    return Study(
        **{"search": search} | parts,
        name=f"isometry-{size}-{control}",
        question="Do depthwise separable convolutions lose more than regular ones when a lossless turn of the images "
        "mixes channels and space?",
        hypothesis="They do, by more than a point beyond a turn that keeps channels and space apart, because they rely "
        "on correlations across channels and in space that can be mapped apart.",
        margin=MARGIN,
        reference=name("depthwise", *ENDS[0]),
        comparisons=tuple(
            PlannedComparison(name(module, *turn, depth), name("regular", *turn, depth))
            for module in ("depthwise", "pointwise", "depthwise3")
            for turn, depth in (*((turn, "") for turn in TURNS), *((turn, DEEP) for turn in ENDS))
            if {name(module, *turn, depth), name("regular", *turn, depth)} <= set(names)
        ),
        control=control,
        unequal=tuple(cost for cost in ("multiply_adds", "live_multiply_adds") if cost != control),
        tolerance=0.02,  # channels of narrow networks come in coarse steps
        axis="data.turn_angle",
        claims=tuple(claim for claim in (H6, H7, H8, H9, H10) if claim.arms <= set(names)),
        gate=GATES[size],
        gates=(
            Gate("kronecker", 1e-4),
            Gate("free", 0.9),
            *(
                Gate("flat", FLAT, tuple(name("regular", *turn, depth) for turn in ENDS))
                for depth in ("", DEEP)
                if name("regular", *ENDS[0], depth) in names
            ),
        ),
        seeded=("data.turn_seed",),
    )
