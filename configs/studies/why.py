"""Asks why a ReLU between the two convolutions of a separable one lowers accuracy (figure 10, section 4.7).

    xception-jax study run studies/why --workdir runs/why

The paper explains the loss by the depth of the intermediate feature spaces. There is a simpler explanation: no
BatchNorm stands between the convolutions, so that channels which are negative for all images stay dead. Here BatchNorm
is a factor, a leaky ReLU keeps channels alive, and each cell measures dead channels and scales, at its start and at its
end. The initialization of figure 10's network makes what enters the activation so small that an ELU starts as the
identity; it is a factor where that matters.

Sizes: smoke (shows that the study runs), cpu (default), cifar, imagenet; controls: width (default, all arms have the
same convolutions), or a cost: studies/why:cifar,live_parameters. Design, gate and claims: docs/studies/why.md.
"""

from collections.abc import Sequence
from typing import Any

from xception_jax.study.claims import Claim, Part, Term
from xception_jax.study.design import Arm, PlannedComparison, Search, Study
from xception_jax.study.sizes import as_smoke, study_size

INITIALIZATIONS = {"glorot": "glorot", "preserving": "variance_preserving"}
NORMS = {"plain": False, "bn": True}
ORDERS = {"depthwise": "depthwise_first", "pointwise": "pointwise_first"}
FIGURE_10 = ("glorot", "plain", "depthwise")  # the network of figure 10
BOTH_ORDERS = (FIGURE_10, ("glorot", "plain", "pointwise"))
PLAIN = (FIGURE_10, ("preserving", "plain", "depthwise"), ("glorot", "plain", "pointwise"))
NORMED = (("glorot", "bn", "depthwise"), ("glorot", "bn", "pointwise"))  # BOTH_ORDERS, with BatchNorm
ACTIVATIONS = ("none", "relu")  # in every network
SCALED = ("scaled", "scaled_elu")  # in the network of figure 10
SLOPE = 0.1  # of a leaky ReLU there; a slope of 0 is the ReLU, a slope of 1 is no activation
RATES = {"cpu": (0.0125, 0.035, 0.1), "cifar": (0.05, 0.14, 0.4), "imagenet": (0.15, 0.3, 0.6)}
GATES = {"smoke": 0.85, "cpu": 0.85, "cifar": 0.9, "imagenet": None}  # a ReLU, whose loss is measured, must pass, too
MARGIN = 0.003

Network = tuple[str, str, str]


def name(initialization: str, norm: str, order: str, activation: str) -> str:
    """Returns the name of an arm."""
    return f"{initialization}_{norm}_{order}_{activation}"


def arm(initialization: str, norm: str, order: str, activation: str, **fields: Any) -> Arm:
    """Returns an arm; `fields` are further fields of the network."""
    overrides = {
        "model.initialization": INITIALIZATIONS[initialization],
        "model.intermediate_batch_norm": NORMS[norm],
        "model.order": ORDERS[order],
        "model.intermediate_activation": activation,
        **{f"model.{field}": value for field, value in fields.items()},
    }
    label = activation + "".join(f"_{value}" for value in fields.values())
    deciding = SCALED if activation in SCALED else ACTIVATIONS
    tuned_as = tuple(name(initialization, norm, order, each) for each in deciding)
    return Arm(name(initialization, norm, order, label), overrides, f"{norm}, {order} first", tuned_as)


def effect(
    networks: Sequence[Network], activation: str, baseline: str = "none", weight: float = 1.0
) -> tuple[Term, ...]:
    """Returns the terms of the mean effect of an activation over several networks."""
    share = weight / len(networks)
    return tuple((name(*network, activation), name(*network, baseline), share) for network in networks)


ALIVE = (
    (name(*FIGURE_10, f"leaky_relu_{SLOPE}"), name(*FIGURE_10, "relu"), 1.0),
    (name(*FIGURE_10, "none"), name(*FIGURE_10, "relu"), -0.5),
)
W1 = Claim(
    "W1",
    "Without BatchNorm between the convolutions, a ReLU there lowers accuracy by more than the margin, on average over "
    "three networks.",
    (Part("relu - none, without BN", effect(PLAIN, "relu"), "below", -MARGIN),),
)
W2 = Claim(
    "W2",
    "BatchNorm between the convolutions removes half of what the ReLU costs, or more.",
    (
        Part("relu - none, without BN", effect(BOTH_ORDERS, "relu"), "below", 0.0),
        Part(
            "relu - none with BN, minus half of that without",
            effect(NORMED, "relu") + effect(BOTH_ORDERS, "relu", weight=-0.5),
            "above",
            0.0,
        ),
    ),
)
W3 = Claim(
    "W3",
    "Keeping channels alive does so, too: a slope of 0.1 for negative values, with which no channel can die, removes "
    "half of what the ReLU costs in the network of figure 10, or more.",
    (
        Part("relu - none, figure 10's network", effect((FIGURE_10,), "relu"), "below", 0.0),
        Part("leaky 0.1 - relu, minus half of none - relu", ALIVE, "above", 0.0),
    ),
)
W4 = Claim(
    "W4",
    "An ELU costs more than the margin once its input has a root mean square of one, and more than the ELU of "
    "figure 10, which is close to the identity on small values.",
    (
        Part("scaled elu - scaled", effect((FIGURE_10,), "scaled_elu", "scaled"), "below", -MARGIN),
        Part(
            "(scaled elu - scaled) - (elu - none)",
            effect((FIGURE_10,), "scaled_elu", "scaled") + effect((FIGURE_10,), "elu", weight=-1.0),
            "below",
            0.0,
        ),
    ),
)


def get_study(size: str = "cpu", control: str = "width") -> Study:
    smoke = size == "smoke"
    sized = as_smoke(study_size("cpu")) if smoke else study_size(size)
    networks = (FIGURE_10,) if smoke else (*PLAIN, *NORMED)
    arms = [arm(*network, activation) for network in networks for activation in ACTIVATIONS]
    if not smoke:
        arms += [arm(*FIGURE_10, activation) for activation in ("elu", *SCALED)]
        arms.append(arm(*FIGURE_10, "leaky_relu", intermediate_slope=SLOPE))
    comparisons = [
        PlannedComparison(name(*network, activation), name(*network, "none"), "unknown", f"{activation} - none")
        for activation, compared in (("relu", networks), ("elu", () if smoke else (FIGURE_10,)))
        for network in compared
    ]
    if size == "cpu":
        sized.config.duration = "6 epochs"
        sized.config.evaluation.every = "2 epochs"
    return Study(
        name=f"why-{size}-{control}",
        question="Why does a ReLU between the two convolutions of a separable convolution lower accuracy?",
        hypothesis="Channels that are negative for all images die. BatchNorm between the convolutions, or a slope for "
        "negative values, keeps them alive and removes half of the loss or more.",
        config=sized.config,
        arms=tuple(arms),
        seeds=sized.seeds if smoke or size == "imagenet" else tuple(range(8)),
        margin=MARGIN,
        reference=name(*FIGURE_10, "none"),
        comparisons=tuple(comparisons),
        control=control,
        search=None if smoke else Search(tuple({"schedule.learning_rate": rate} for rate in RATES[size])),
        analysis="welch",
        gate=GATES[size],
        # The size that only shows that the study runs has two arms.
        claims=() if smoke else (W1, W2, W3, W4),
        activations=True,
        budget=sized.budget,
    )
