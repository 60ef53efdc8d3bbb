"""Writes docs/benchmarks.md and its plots from the samples in docs/data/benchmarks.json."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, CONTESTANTS, MEASURES, Case, Goal

# Share of the cores that other processes may take. With a higher share the comparison is unfair, because threads that
# wait actively for each other, such as those of PyTorch, lose the most.
IDLE = 0.05

GROWTH_TITLES = {
    "batch": "Xception at 71 x 71, training: images in a step",
    "size": "Xception, training, batch 2: side of the image",
    "segments": "small Xception, training, batch 128: segments",
    "devices": "small Xception, training, batch 128: simulated devices on the same cores",
}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a goal.

    Attributes:
      goal: the goal.
      best: name of the peer with the best median.
      ratio: how many times better ours is than the best peer. Quartiles over the rounds, each compared with the same
        round of the peer.
      missing: contestants that failed, or did not take part when the case was measured. If there are any, the goal is
        open.
      others: share of the cores that other processes took, median over rounds and contestants.
    """

    goal: Goal
    best: str | None
    ratio: tuple[float, float, float] | None
    missing: list[str]
    others: float = 0.0

    @property
    def reached(self) -> bool:
        """Whether no peer is missing and the median ratio reaches the goal."""
        return not self.missing and self.ratio is not None and self.ratio[1] >= self.goal.factor

    def __str__(self) -> str:
        """Formats the last column of the table."""
        if self.missing:
            return "open: no figure of " + ", ".join(CONTESTANTS[name].title for name in self.missing)
        assert self.ratio is not None
        disturbed = f"machine not idle ({self.others:.0%} taken)" if self.others >= IDLE else ""
        if self.reached:
            return f"open: {disturbed}" if disturbed else "reached"
        gap = f"**goal {self.goal.factor:g}, reached {self.ratio[1]:.2f}**"
        return f"{gap}; {disturbed}" if disturbed else gap


def judge(goal: Goal, contestants: dict[str, dict[str, Any]]) -> Verdict:
    """Checks whether the samples of a case reach a goal."""
    more_is_better = MEASURES[goal.measure].more_is_better
    samples = {
        name: contestants[name]["samples"][goal.measure]
        for name in (goal.ours, *goal.against)
        if name in contestants and "error" not in contestants[name]
    }
    missing = [name for name in (goal.ours, *goal.against) if name not in samples]
    peers = [name for name in goal.against if name in samples]
    if goal.ours not in samples or not peers:
        return Verdict(goal, None, None, missing)
    choose = max if more_is_better else min
    best = choose(peers, key=lambda name: statistics.median(samples[name]))
    pairs = zip(samples[goal.ours], samples[best], strict=True)
    ratios = [ours / peer if more_is_better else peer / ours for ours, peer in pairs]
    return Verdict(goal, best, quartiles(ratios), missing, _others(contestants)[1])


def _others(contestants: dict[str, dict[str, Any]]) -> tuple[float, float, float]:
    return quartiles([share for c in contestants.values() for share in c["samples"].get("others", [0.0])])


def verdicts(results: dict[str, Any]) -> dict[str, list[Verdict]]:
    """Returns the verdicts on all goals of each measured case."""
    measured = {name: case for name, case in CASES.items() if name in results["cases"]}
    return {
        name: [judge(goal, results["cases"][name]["contestants"]) for goal in case.goals]
        for name, case in measured.items()
    }


def _figure(value: float) -> str:
    """Returns a number with three digits, such as 0.945 or 2,060."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _spread(values: tuple[float, float, float]) -> str:
    low, median, high = values
    return f"{_figure(median)} ({_figure(low)} to {_figure(high)})"


def goals_table(results: dict[str, Any]) -> str:
    """Returns a Markdown table with one row per goal."""
    rows = ["| work | measure | ours | best peer | ratio | goal | |", "|---|---|---|---|---|---|---|"]
    for name, judged in verdicts(results).items():
        for verdict in judged:
            goal, contestants = verdict.goal, results["cases"][name]["contestants"]
            measure = MEASURES[goal.measure]

            def median(name, goal=goal, contestants=contestants):
                samples = contestants.get(name, {}).get("samples", {}).get(goal.measure)
                return _figure(statistics.median(samples)) if samples else "-"

            peer = f"{median(verdict.best)}, {CONTESTANTS[verdict.best].title}" if verdict.best else "-"
            work = CASES[name].title + (", kernels not built yet" if goal.ours == "ours_cold" else "")
            ratio = _spread(verdict.ratio) if verdict.ratio else "-"
            cells = [work, f"{measure.title}, {measure.unit}", median(goal.ours), peer, ratio, f"{goal.factor:g}"]
            rows.append("| " + " | ".join([*cells, str(verdict)]) + " |")
    return "\n".join(rows)


def _not_measured(results: dict[str, Any]) -> str:
    missing = [case.title for name, case in CASES.items() if name not in results["cases"]]
    return f"\nNot measured yet: {'; '.join(missing)}.\n" if missing else ""


def _case_section(case: Case, result: dict[str, Any]) -> str:
    quantities = list(dict.fromkeys(goal.measure for goal in case.goals))
    heads = [f"{MEASURES[quantity].title}, {MEASURES[quantity].unit}" for quantity in quantities]
    rows = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, contestant in result["contestants"].items():
        samples = contestant["samples"]
        cells = [_spread(quartiles(samples[q])) if samples.get(q) else "failed" for q in quantities]
        rows.append(f"| {CONTESTANTS[name].title} | " + " | ".join(cells) + " |")
    about = f"`{result['command']}`; {result['repeats']} rounds; {result['date']}, commit {result['commit']}; "
    about += (
        f"{result['hardware']}; other processes took {_others(result['contestants'])[1]:.1%} of the cores (median)."
    )
    return f"### {case.title}\n\n{about}\n\n" + "\n".join(rows)


def _versions(results: dict[str, Any]) -> str:
    """Lists the package versions of our environment and of the peers' environment."""
    found: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for case in results["cases"].values():
        for name, contestant in case["contestants"].items():
            found[CONTESTANTS[name].is_peer] |= contestant["versions"]
    lines = {False: "ours", True: "peers"}
    return "\n".join(
        f"- {lines[is_peer]}: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        for is_peer, versions in found.items()
        if versions
    )


def markdown(results: dict[str, Any]) -> str:
    """Returns the text of docs/benchmarks.md."""
    cases = "\n\n".join(_case_section(CASES[n], result) for n, result in results["cases"].items() if n in CASES)
    text = f"""# Benchmarks

Generated by `python -m benchmarks`; do not edit. Raw samples: [data/benchmarks.json](data/benchmarks.json).

{_versions(results)}

All measurements use float32, random weights and random images. Every network has exactly the same number of trainable
parameters as ours (the BatchNorm scales of timm's Inception V3, which the other implementations lack, are not trained).
Each contestant runs in its own process. The processes take turns in rounds, and wait while another one works. Every
round begins with an untimed step (before commit 9d2249e, only if a step took less than a second). Values are medians
over the rounds, with quartiles in parentheses. A ratio says how many times better ours is than the best peer (by
median), compared round by round. The goals were set before the measurements.

All contestants use all cores and follow the recommendations of their documentation: Keras on TensorFlow runs a graph
with oneDNN (frozen for inference, so that BatchNorm is folded), Keras on JAX and Flax use jit, PyTorch uses
channels_last (with BatchNorm folded for eager inference, and frozen by Inductor if compiled; two of the cases also
compile training), and ours uses the allocator settings of `make train`. The peers keep the allocator of their
process; `--same_allocator` gives them our settings. Start times are without a compilation cache. On processors with
AMX, our kernels compute float32 products from six bfloat16 products of three parts of each value, as exactly as in
float32 (docs/notebook/2026-11-27-cpu-kernels.md). The libraries of the peers do not use AMX for float32 by default.

{goals_table(results)}
{_not_measured(results)}
![Speed of ours and the peers](images/benchmarks.png)

## Cases

{cases}
"""
    if results.get("growth"):
        text += f"""
## Growth of cost

Only ours, with one process per point: mean time per step, and peak memory of the process.
`{results["growth"]["command"]}`; {results["growth"]["date"]}, commit {results["growth"]["commit"]};
{results["growth"]["hardware"]}.

![Time and memory against batch, size, segments and devices](images/growth.png)
"""
        for axis, points in results["growth"]["points"].items():
            rows = "\n".join(f"| {p['value']} | {p['seconds']:.3g} | {p['memory']:.3g} |" for p in points)
            text += f"\n| {GROWTH_TITLES[axis]} | seconds per step | peak memory, GB |\n|---|---|---|\n{rows}\n"
    return text


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws a bar with quartiles for each contestant of each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in CASES if name in results["cases"]]
    figure, axes = plt.subplots(len(names), 1, figsize=(8, 1.5 * len(names)), layout="constrained", squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        measure = CASES[name].goals[0].measure
        shown = {
            contestant: quartiles(result["samples"][measure])
            for contestant, result in results["cases"][name]["contestants"].items()
            if result["samples"].get(measure)
        }
        for row, (contestant, (low, median, high)) in enumerate(shown.items()):
            color = "tab:gray" if CONTESTANTS[contestant].is_peer else "tab:blue"
            axis.barh(row, median, xerr=[[median - low], [high - median]], color=color, capsize=2)
        axis.set_yticks(range(len(shown)), [CONTESTANTS[contestant].title for contestant in shown], fontsize=7)
        axis.invert_yaxis()
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(f"{CASES[name].title} ({MEASURES[measure].unit})", fontsize=8, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_growth(points: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draws time and memory, with one row of plots per axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(points), 2, figsize=(9, 2.2 * len(points)), layout="constrained", squeeze=False)
    for row, (axis, measured) in zip(axes, points.items(), strict=True):
        values = [point["value"] for point in measured]
        if not all(isinstance(value, int) for value in values):
            values = [str(value) for value in values]  # "depthwise" is not a number, so the axis is categorical
        for plot_axis, quantity, unit in zip(
            row, ("seconds", "memory"), ("seconds per step", "peak memory, GB"), strict=True
        ):
            plot_axis.plot(values, [point[quantity] for point in measured], "o-")
            plot_axis.set_ylim(0, 1.1 * max(point[quantity] for point in measured))
            plot_axis.set_ylabel(unit, fontsize=8)
            plot_axis.set_xlabel(GROWTH_TITLES[axis], fontsize=7)
            plot_axis.tick_params(labelsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
