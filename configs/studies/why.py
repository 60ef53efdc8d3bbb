"""Asks why a ReLU between the two convolutions of a separable one harms (figure 10, section 4.7).

    xception-jax study run studies/why --workdir runs/why

The paper explains the harm by the depth of the intermediate feature spaces. There are two simpler explanations: the
initialization makes what enters the activation small, so that an ELU starts as the identity, and no BatchNorm stands
between the convolutions, so that channels which are negative for all images stay dead. Here both are factors, and each
cell measures dead channels and scales, at its start and at its end.

Sizes: smoke (shows that the study runs), cpu (default), cifar, imagenet; controls: width (default, all arms have the
same convolutions), or a cost: studies/why:cifar,live_parameters. Design, gate and claims: docs/studies/why.md.
"""

import itertools
from typing import Any

from xception_jax.study.claims import Claim, Part, Term
from xception_jax.study.design import Arm, PlannedComparison, Search, Study
from xception_jax.study.sizes import as_smoke, study_size

INITIALIZATIONS = {"glorot": "glorot", "preserving": "variance_preserving"}
NORMS = {"plain": False, "bn": True}
ORDERS = {"depthwise": "depthwise_first", "pointwise": "pointwise_first"}
ACTIVATIONS = ("none", "relu")  # in every network
SCALED = ("elu", "scaled", "scaled_elu")  # in the networks of W5
SLOPES = (0.1, 0.5)  # of leaky ReLUs; a slope of 0 is the ReLU, a slope of 1 is no activation
RATES = {"cpu": (0.0125, 0.035, 0.1), "cifar": (0.05, 0.14, 0.4), "imagenet": (0.15, 0.3, 0.6)}
GATES = {"smoke": 0.85, "cpu": 0.85, "cifar": 0.9, "imagenet": None}  # a ReLU, whose harm is measured, must pass, too
MARGIN = 0.003
FIGURE_10 = "glorot_plain_depthwise"  # the network of figure 10
LEAKY = ((f"{FIGURE_10}_leaky_relu_0.5", f"{FIGURE_10}_leaky_relu_0.1", 1.0),)
WORSE = "worse"


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
    deciding = SCALED[1:] if activation in SCALED[1:] else ACTIVATIONS
    tuned_as = tuple(name(initialization, norm, order, each) for each in deciding)
    return Arm(name(initialization, norm, order, label), overrides, f"{norm}, {order} first", tuned_as)


def effect(
    groups: list[tuple[str, str, str]], activation: str, baseline: str = "none", weight: float = 1.0
) -> tuple[Term, ...]:
    """Returns the terms of the mean effect of an activation over several networks."""
    share = weight / len(groups)
    return tuple((name(*group, activation), name(*group, baseline), share) for group in groups)


def claims(groups: list[tuple[str, str, str]], scaled: list[tuple[str, str, str]], margin: float) -> tuple[Claim, ...]:
    """Returns the claims about networks without ('plain') and with BatchNorm between the convolutions."""
    plain = [group for group in groups if group[1] == "plain"]
    normed = [group for group in groups if group[1] == "bn"]
    harm = Part("relu - none, without BN", effect(plain, "relu"), "below", -margin)
    exists = Claim(
        "W1",
        "Without BatchNorm between the convolutions, a ReLU there harms by more than the margin, on average over "
        "initializations and orders.",
        (harm,),
    )
    if not normed:  # the size that only shows that the study runs
        return (exists,)
    halved: tuple[Term, ...] = effect(normed, "relu") + effect(plain, "relu", weight=-0.5)
    found = [
        exists,
        Claim(
            "W2",
            "BatchNorm between the convolutions halves the harm of the ReLU, or more.",
            (
                Part("relu - none, without BN", effect(plain, "relu"), "below", 0.0),
                Part("relu - none with BN, minus half of that without", halved, "above", 0.0),
            ),
        ),
    ]
    every = tuple((name(*group, "relu"), name(*group, "none"), 1.0) for group in groups)
    without = tuple((name(*group, "relu"), name(*group, "none"), 1.0) for group in plain)
    for code, moment, when in (("W3", "start", "at initialization"), ("W4", "end", "after training")):
        column, text = f"dead_{moment}", f"r of dead channels {when} and harm"
        parts = (
            Part(text, every, "above", 0.8, "correlation", column),
            Part(f"{text}, without BN", without, "above", 0.0, "correlation", column),
        )
        claim = (
            f"The share of dead channels {when} goes with the harm of a ReLU, also among networks without BatchNorm."
        )
        found.append(Claim(code, claim, parts))
    dose = {"relu": 0.0, **{f"leaky_relu_{slope}": slope for slope in SLOPES}, "none": 1.0}
    mean = sum(dose.values()) / len(dose)
    spread = sum((slope - mean) ** 2 for slope in dose.values())
    slopes = tuple((f"{FIGURE_10}_{label}", "", (slope - mean) / spread) for label, slope in dose.items())
    found += [
        Claim(
            "W5",
            "Depthwise first, an ELU harms by more than the margin once its input has a root mean square of one, and "
            "more than the ELU of figure 10, which is close to the identity on small values.",
            (
                Part("scaled elu - scaled", effect(scaled, "scaled_elu", "scaled"), "below", -margin),
                Part("scaled elu - elu", effect(scaled, "scaled_elu", "elu"), "below", 0.0),
            ),
        ),
        Claim(
            "W6",
            "The harm has a dose: accuracy rises with the slope of a leaky ReLU, from 0 (ReLU) to 1 (none).",
            (
                Part("accuracy per unit of slope, figure 10's network", slopes, "above", 0.0),
                Part("slope of 0.5 - slope of 0.1", LEAKY, "above", 0.0),
            ),
        ),
    ]
    return tuple(found)


def get_study(size: str = "cpu", control: str = "width") -> Study:
    smoke = size == "smoke"
    sized = as_smoke(study_size("cpu")) if smoke else study_size(size)
    groups = [("glorot", "plain", "depthwise")] if smoke else list(itertools.product(INITIALIZATIONS, NORMS, ORDERS))
    scaled = [] if smoke else [group for group in groups if group[1:] == ("plain", "depthwise")]
    arms = [arm(*group, activation) for group in groups for activation in ACTIVATIONS]
    arms += [arm(*group, activation) for group in scaled for activation in SCALED]
    arms += [arm("glorot", "plain", "depthwise", "leaky_relu", intermediate_slope=s) for s in SLOPES if not smoke]
    comparisons = [
        PlannedComparison(name(*group, activation), name(*group, "none"), expected, f"{activation} - none")
        for activation, expected, networks in (("relu", WORSE, groups), ("elu", "unknown", scaled))
        for group in networks
    ]
    if size == "cpu":
        sized.config.duration = "6 epochs"
        sized.config.evaluation.every = "2 epochs"
    return Study(
        name=f"why-{size}-{control}",
        question="Why does a ReLU between the two convolutions of a separable convolution harm?",
        hypothesis="Channels that are negative for all images die: the initialization leaves what enters the "
        "activation without scale, and no BatchNorm gives it one. BatchNorm between the convolutions takes away half "
        "of the harm or more, and over the networks the share of dead channels goes with the harm.",
        config=sized.config,
        arms=tuple(arms),
        seeds=sized.seeds if smoke or size == "imagenet" else tuple(range(5)),
        margin=MARGIN,
        reference=f"{FIGURE_10}_none",
        comparisons=tuple(comparisons),
        control=control,
        search=None if smoke else Search(tuple({"schedule.learning_rate": rate} for rate in RATES[size])),
        analysis="welch",
        gate=GATES[size],
        claims=claims(groups, scaled, MARGIN),
        activations=True,
        budget=sized.budget,
    )
