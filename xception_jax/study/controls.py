"""Controls: finds the width at which an arm costs as much as the reference, and its position on the segment axis.

At a fixed width the segment axis would compare networks of very different size. A separable convolution with one
segment has about ten times the parameters of a depthwise one. Costs are counted from abstract shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from xception_jax.config import ModelConfig, to_dict
from xception_jax.errors import ConfigError
from xception_jax.models import create_model
from xception_jax.models.cost import Cost, count_cost
from xception_jax.models.layers import Conv
from xception_jax.models.modules import RegularConv, SeparableConv
from xception_jax.models.trace import trace_layers
from xception_jax.study.design import COSTS, Arm, Study

# The search tries widths from 1/8 to 8 times that of the reference, on a logarithmic grid.
_OCTAVE = 512  # grid steps for a factor of two
_STEP = 2 ** (1 / _OCTAVE)
_RANGE = 3 * _OCTAVE

_FREE_OF_COST = ("intermediate_activation", "intermediate_slope", "initialization", "dropout_rate")

EQUAL_WITHIN = 0.1  # costs that differ by more are not called equal


@dataclasses.dataclass(frozen=True)
class ArmCost:
    """The width of an arm and what it costs.

    Attributes:
      width_multiplier: chosen by the control.
      parameters: number of trainable parameters.
      live_parameters: the same without weights that meet only padding.
      multiply_adds: multiply-adds of one forward pass on one image.
      live_multiply_adds: the same without products of padding.
      channels_per_segment: geometric mean, over the separable or regular layers, of the channels that a spatial filter
        sees; NaN if there is no such layer.
    """

    width_multiplier: float
    parameters: int
    live_parameters: int
    multiply_adds: int
    live_multiply_adds: int
    channels_per_segment: float


def solve_costs(
    study: Study, solved: Mapping[str, ArmCost], report: Callable[[str], None] = lambda line: None
) -> dict[str, ArmCost]:
    """Chooses the width of every arm of a study according to its control.

    Args:
      study: the study.
      solved: costs that are already known, by arm.
      report: called with a line of progress for each arm.

    Returns:
      The costs by arm.

    Raises:
      ConfigError: no width brings an arm within the study's tolerance of the reference.
    """
    known: dict[str, Cost] = {}

    def cost_at(arm: Arm, width: float) -> Cost:
        config = study.arm_config(arm, {"model.width_multiplier": width})
        # Arms that differ only in what costs nothing, such as an activation or a learning rate, are counted once.
        key = repr((_without(config.model, *_FREE_OF_COST), config.data.image_size))
        if key not in known:
            known[key] = count_cost(create_model(config.model), config.data.image_size)
        return known[key]

    reference = cost_at(study.arm(study.reference), study.config.model.width_multiplier)
    costs = {}
    for number, arm in enumerate(study.arms, 1):
        if arm.name in solved:
            costs[arm.name] = solved[arm.name]
            continue
        report(f"choosing the width of arm {number} of {len(study.arms)}")
        if study.control == "width":
            width = study.arm_config(arm).model.width_multiplier
        elif arm.name != study.reference:
            width = _match(study, arm, reference, cost_at)
        else:
            width = study.config.model.width_multiplier
        costs[arm.name] = arm_cost(study, arm, width, cost_at(arm, width))
    return costs


def arm_cost(study: Study, arm: Arm, width: float, cost: Cost | None = None) -> ArmCost:
    """Returns the cost of an arm at a width; `cost` is that of its network if it has been counted."""
    config = study.arm_config(arm, {"model.width_multiplier": width})
    model = create_model(config.model)
    cost = cost or count_cost(model, config.data.image_size)
    counted = {name: getattr(cost, name) for name in COSTS}
    return ArmCost(width, **counted, channels_per_segment=channels_per_segment(model, config.data.image_size))


def deviations(study: Study, costs: Mapping[str, ArmCost]) -> dict[str, float]:
    """Returns the largest relative deviation of an arm from the reference, by cost, where it is above 10 %.

    The cost that the study controls is left out.
    """
    reference, found = costs[study.reference], {}
    for name in COSTS:
        ratios = [getattr(cost, name) / getattr(reference, name) for cost in costs.values()]
        farthest = max(ratios, key=lambda ratio: abs(math.log(ratio)))
        if name != study.control and abs(farthest - 1) > EQUAL_WITHIN:
            found[name] = farthest - 1
    return found


def cost_headline(study: Study, costs: Mapping[str, ArmCost]) -> str:
    """Returns what the arms have in common, in the words that a report may use.

    Arms are called equal only if no cost differs by more than 10 %, or if the study itself says which costs do.
    """
    found = deviations(study, costs)
    listed = ", ".join(f"{COSTS[name]} by up to {deviation:+.0%}" for name, deviation in found.items())
    if study.control == "width":
        return "fixed width" + (f"; arms differ in {listed}" if found else "")
    control = COSTS[study.control]
    if not found:
        return f"equal {control}"
    if set(found) <= set(study.unequal):
        return f"equal {control}, unequal {listed}"
    return f"{control} matched, but the arms do not cost the same: they differ in {listed}"


def _match(study: Study, arm: Arm, reference: Cost, cost_at: Callable[[Arm, float], Cost]) -> float:
    """Returns the width at which the controlled cost of an arm is closest to that of the reference."""
    target, width = getattr(reference, study.control), study.config.model.width_multiplier

    def width_at(k: int) -> float:
        return float(f"{width * _STEP**k:.4g}")

    def cost(k: int) -> int:
        return getattr(cost_at(arm, width_at(k)), study.control)

    if cost(0) == target:
        return width
    # Widen the bracket step by step: a network 1/8 as wide may have layers without channels.
    low = high = best = 0
    while high < _RANGE and cost(high) < target:
        low, high = high, high + _OCTAVE
    while low > -_RANGE and cost(low) > target:
        low, high = low - _OCTAVE, low
    for turn in itertools.count():  # costs never decrease as the width grows
        best = min((best, low, high), key=lambda k: abs(cost(k) - target))
        error = cost(best) / target - 1
        if high - low <= 1 or abs(error) < study.tolerance / 10:
            break
        middle = (low + high) // 2
        if turn % 2 == 0 and cost(low) < target < cost(high):
            # Costs are nearly powers of the width, so interpolate between logarithms.
            share = math.log(target / cost(low)) / math.log(cost(high) / cost(low))
            middle = min(max(round(low + share * (high - low)), low + 1), high - 1)
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    if abs(error) > study.tolerance:
        raise ConfigError(
            f"no width gives arm {arm.name} the {target:,} {study.control} of {study.reference} within "
            f"{study.tolerance:.1%}; the closest, {width_at(best):g}, has {cost(best):,} ({error:+.1%})",
            f"arm {arm.name} of {study.name}",
            "channels are rounded to multiples of the segments; use a wider reference, fewer segments, more tolerance",
        )
    return width_at(best)


def channels_per_segment(model: nn.Module, image_size: int) -> float:
    """Returns the geometric mean, over the separable or regular layers, of the channels that a spatial filter sees."""
    sizes: list[int] = []

    def visit(layer: nn.Module, inputs: Any, output: Any) -> None:
        if (
            isinstance(layer, Conv)
            and layer.name == "spatial"
            and isinstance(layer.parent, RegularConv | SeparableConv)
        ):
            sizes.append(layer.get_variable("params", "kernel").shape[2])

    trace_layers(model, image_size, visit)
    return math.exp(sum(map(math.log, sizes)) / len(sizes)) if sizes else math.nan


def _without(model: ModelConfig, *names: str) -> dict[str, Any]:
    fields = to_dict(model)
    return {name: value for name, value in fields.items() if name not in names}
