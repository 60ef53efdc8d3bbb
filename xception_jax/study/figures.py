"""Draws the figures of a study's report as SVG, each mean with its interval over the seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from xception_jax.names import printable
from xception_jax.reports.style import (
    BLUE,
    COLORS,
    FONT_SIZE,
    GREEN,
    MARGIN,
    QUIET,
    VERMILION,
    ZERO,
    draw_svg,
    legend_label,
)
from xception_jax.study.results import ArmResult, Results
from xception_jax.study.verdicts import TestedClaim

CLAIMED_DIFFERENCES = "Differences in accuracy that the claims are about"
# Lines differ in colour, marker and dash.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 2)))


def _style(number: int) -> dict[str, Any]:
    return {"color": COLORS[number % 7], "marker": _MARKERS[number % 7], "linestyle": _DASHES[number % 7]}


def _half(mean: float, low: float) -> float:
    return mean - low if math.isfinite(low) else 0.0


def forest(results: Results) -> str | None:
    """Draws each comparison with its interval, with zero and the margin."""
    shown = [entry for entry in results.comparisons if entry.difference.n]
    if not shown:
        return None
    margin = 100 * results.stored.study.margin
    names = [f"{printable(entry.comparison.name)}  (n={entry.difference.n})" for entry in shown]
    left, height = 20 + 6.6 * max(map(len, names)), 60 + 24 * len(shown)
    width = left + 440

    def draw(axes: Axes) -> None:
        axes.axvspan(-margin, margin, color=MARGIN, zorder=0, linewidth=0)
        axes.axvline(0, color=ZERO, linewidth=1)
        for y, entry in enumerate(shown):
            d = entry.difference
            color = {"better": BLUE, "worse": VERMILION, "equivalent": GREEN}.get(entry.verdict, QUIET)
            half = 100 * _half(d.mean, d.low)
            axes.errorbar(100 * d.mean, y, xerr=half, fmt="o", color=color, markersize=5, capsize=3)
        _label_rows(axes, names)

    return draw_svg(width, height, (left / width, 42 / height, 425 / width, 1 - 54 / height), draw)


def claimed_differences(claims: Sequence[TestedClaim], margin: float) -> str | None:
    """Draws a row for each part of a claim about points of accuracy: its mean or median, its interval and its seeds."""
    parts = [(claim, part) for claim in claims for part in claim.parts if part.unit == "points" and part.estimate.n]
    if not parts:
        return None
    names = [f"{claim.code}: {legend_label(part.name.removeprefix('median of '))}" for claim, part in parts]
    left, height = 20 + 5.8 * max(map(len, names)), 56 + 26 * len(parts)
    width = left + 360

    def draw(axes: Axes) -> None:
        axes.axvspan(-100 * margin, 100 * margin, color=MARGIN, zorder=0, linewidth=0)
        axes.axvline(0, color=ZERO, linewidth=1)
        for y, (_, part) in enumerate(parts):
            found = part.estimate
            dots = [100 * value for value in part.seeds]
            axes.scatter(dots, [y] * len(dots), 14, QUIET, alpha=0.6, linewidth=0, zorder=3)
            axes.plot([100 * found.low, 100 * found.high], [y, y], color=COLORS[0], linewidth=1.5)
            axes.plot(100 * found.mean, y, marker="|", markersize=13, markeredgewidth=2, color=COLORS[0])
        _label_rows(axes, names)

    return draw_svg(width, height, (left / width, 40 / height, 345 / width, 1 - 50 / height), draw)


def _label_rows(axes: Axes, names: Sequence[str]) -> None:
    """Labels the rows of a figure of differences, the first one at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("difference in test accuracy, percentage points", color=QUIET)


def _axis(axes: Axes, results: Results, x: Sequence[float]) -> None:
    if results.stored.study.logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("channels per segment, mean over layers (1: depthwise)", color=QUIET)
    else:
        axes.set_xticks(sorted(set(x)))
        axes.set_xlabel(results.stored.study.axis.removeprefix("model.").replace("_", " "), color=QUIET)
    axes.tick_params(length=3)


def over_axis(results: Results) -> str | None:
    """Draws the accuracy over the study's axis, with a line for each group of arms."""
    arms = [arm for arm in results.arms if math.isfinite(arm.x) and arm.accuracy.n]
    if len({arm.x for arm in arms}) < 2:
        return None

    def draw(axes: Axes) -> None:
        for number, line in enumerate(dict.fromkeys(arm.line for arm in arms)):
            points = sorted((arm for arm in arms if arm.line == line), key=lambda arm: arm.x)
            mean = [arm.accuracy.mean for arm in points]
            half = [_half(arm.accuracy.mean, arm.accuracy.low) for arm in points]
            # Shift the lines slightly, so that intervals at the same position do not cover each other.
            shift = 1.035 ** (number - 1) if results.stored.study.logarithmic else 1.0
            x = [arm.x * shift for arm in points]
            axes.errorbar(
                x, mean, half, label=legend_label(line) or None, capsize=2.5, markersize=4.5, **_style(number)
            )
        _axis(axes, results, [arm.x for arm in arms])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("test accuracy", color=QUIET)
        if any(arm.line for arm in arms):
            axes.legend()

    return draw_svg(420, 300, (0.17, 0.17, 0.81, 0.79), draw)


def effects(results: Results) -> str | None:
    """Draws paired effects over the axis, with zero and the margin."""
    shown = [entry for entry in results.interactions if any(effect.n for effect in entry.effects)]
    if not shown:
        return None
    margin = 100 * results.stored.study.margin

    def draw(axes: Axes) -> None:
        axes.axhspan(-margin, margin, color=MARGIN, zorder=0, linewidth=0)
        axes.axhline(0, color=ZERO, linewidth=1)
        for number, entry in enumerate(shown):
            shift = 1.035 ** (number - 0.5) if results.stored.study.logarithmic else 1.0
            mean = [100 * effect.mean for effect in entry.effects]
            half = [100 * _half(effect.mean, effect.low) for effect in entry.effects]
            x = [value * shift for value in entry.x]
            style = _style(number + 1)
            axes.errorbar(
                x, mean, half, label=legend_label(entry.interaction.name), capsize=2.5, markersize=4.5, **style
            )
        _axis(axes, results, [x for entry in shown for x in entry.x])
        axes.set_ylabel("difference in test accuracy, points", color=QUIET)
        axes.legend()

    return draw_svg(420, 300, (0.17, 0.17, 0.81, 0.79), draw)


def over_cost(results: Results, name: str, label: str) -> str | None:
    """Draws the accuracy of each arm against one of its costs, or against `images_per_second`."""

    def cost(arm: ArmResult) -> float:
        return arm.images_per_second.mean if name == "images_per_second" else getattr(arm.cost, name)

    arms = [arm for arm in results.arms if arm.accuracy.n and math.isfinite(cost(arm))]
    if not arms:
        return None
    lines = list(dict.fromkeys(arm.line for arm in arms))

    def draw(axes: Axes) -> None:
        for number, line in enumerate(lines):
            points = [arm for arm in arms if arm.line == line]
            half = [_half(arm.accuracy.mean, arm.accuracy.low) for arm in points]
            style = _style(number) | {"linestyle": "none"}
            axes.errorbar(
                [cost(arm) for arm in points],
                [arm.accuracy.mean for arm in points],
                half,
                label=legend_label(line) or None,
                capsize=2,
                markersize=4.5,
                **style,
            )
        if len(arms) <= 8:
            middle = (min(map(cost, arms)) + max(map(cost, arms))) / 2
            for arm in arms:
                at, right = (cost(arm), arm.accuracy.mean), cost(arm) > middle
                axes.annotate(
                    printable(arm.name),
                    at,
                    (-5 if right else 5, 3),
                    textcoords="offset points",
                    horizontalalignment="right" if right else "left",
                    fontsize=FONT_SIZE,
                    color=QUIET,
                )
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.margins(x=0.15)
        axes.set_xlabel(label, color=QUIET)
        axes.set_ylabel("test accuracy", color=QUIET)
        axes.tick_params(length=3)
        if len(lines) > 1:
            axes.legend()

    return draw_svg(340, 260, (0.2, 0.19, 0.77, 0.76), draw)


def learning_curves(arms: Sequence[ArmResult]) -> str | None:
    """Draws the development accuracy over the steps, mean and interval, as in figures 6 to 10 of the paper.

    Thin lines are the accuracy on the augmented training images.
    """
    shown = [arm for arm in arms if len(arm.curve[0])]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for number, arm in enumerate(shown):
            steps, mean, half = arm.curve
            style = _style(number) | {"marker": _MARKERS[number % 7] if len(steps) <= 12 else ""}
            axes.plot(steps, mean, label=legend_label(arm.name), markersize=3.5, linewidth=1.4, **style)
            axes.fill_between(steps, mean - half, mean + half, color=style["color"], alpha=0.15, linewidth=0)
            axes.plot(*arm.train_curve[:2], color=style["color"], linestyle=style["linestyle"], linewidth=0.6)
        ends = np.array([arm.curve[1][-1] for arm in shown])
        starts = np.concatenate([arm.curve[1] for arm in shown])
        # The first evaluations are near chance. Including them would squeeze the rest into the upper margin.
        axes.set_ylim(bottom=max(float(starts.min()), float(ends.min()) - 0.15))
        axes.set_xlabel("step", color=QUIET)
        axes.set_ylabel("accuracy", color=QUIET)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.tick_params(length=3)
        axes.legend(loc="lower right")

    return draw_svg(340, 280, (0.2, 0.17, 0.77, 0.79), draw)
