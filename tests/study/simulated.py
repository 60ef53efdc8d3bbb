"""Study directories with cells that were never trained: accuracies drawn around known effects, files as a run's."""

import dataclasses
import math

import numpy as np

from xception_jax.config import override, resolve
from xception_jax.logs.metrics_log import MetricsLog
from xception_jax.metrics.predictions import Predictions, save_predictions
from xception_jax.study.cells import PREDICTIONS
from xception_jax.study.controls import ArmCost
from xception_jax.study.design import CHANNELS_PER_SEGMENT, Arm, Interaction, PlannedComparison, Study
from xception_jax.study.sizes import study_size
from xception_jax.study.store import StoredStudy, write_study

IMAGES = 400
POINTS = {"1": 43.1, "2": 28.9, "4": 18.0, "8": 10.8, "16": 6.5, "depthwise": 1.0}


def small_study(**changes) -> Study:
    """Two activations at six points of the spectrum, three seeds."""
    config = override(resolve(study_size("cpu").config), {"data.name": "fashion_mnist_subset"})
    arms = tuple(
        Arm(f"{point}_{activation}", {"model.intermediate_activation": activation}, activation)
        for point in POINTS
        for activation in ("none", "relu")
    )
    pairs = tuple((f"{point}_relu", f"{point}_none") for point in POINTS)
    expected = {"1": "better", "depthwise": "worse"}
    study = Study(
        name="simulated",
        question="Is what was put in found again?",
        hypothesis="The effect rises through zero & <b>nothing</b> is markup.",
        config=config,
        arms=arms,
        seeds=(0, 1, 2, 3, 4),
        margin=0.005,
        reference="depthwise_none",
        comparisons=tuple(PlannedComparison(a, b, expected.get(a.partition("_")[0], "unknown")) for a, b in pairs),
        interactions=(Interaction("relu - none", pairs, "rises through zero"),),
        axis=CHANNELS_PER_SEGMENT,
        search=None,
    )
    return dataclasses.replace(study, **changes)


def write_simulated(root, study, *, slope=0.004, noise=0.0015, fail=()):
    """Writes a finished study in which the effect of ReLU is zero at 8 channels and rises by `slope` a doubling.

    Args:
      root: the directory.
      study: as `small_study` returns it.
      slope: of the effect over log2 of the channels per segment.
      noise: standard deviation of an accuracy, besides that of its seed.
      fail: (arm, seed) of cells that ended with 70.
    """
    rng = np.random.default_rng(0)
    costs = {}
    for number, arm in enumerate(study.arms):
        channels = POINTS[arm.name.partition("_")[0]]
        costs[arm.name] = ArmCost(
            0.2, 720_000 + 3_000 * number, 700_000, 3_200_000 + 20_000 * number, 3_000_000, channels
        )
    root.mkdir(parents=True, exist_ok=True)
    stored = StoredStudy(root, study, costs, ({"time": "2026-01-01 00:00:00", "change": "stated", "cells_done": 0},))
    write_study(stored)
    of_seed = {seed: rng.normal(0, 0.004) for seed in study.seeds}
    for cell in stored.cells():
        cell.prepare()
        x = math.log2(costs[cell.arm].channels_per_segment)
        effect = slope * (x - 3) * cell.arm.endswith("relu")
        accuracy = 0.88 + of_seed[cell.seed] + 0.002 * x + effect + rng.normal(0, noise)
        log = MetricsLog(cell.directory / "metrics.jsonl")
        for step in range(215, 861, 215):
            log.write(
                step,
                "train",
                {
                    "loss": 0.5,
                    "top1": accuracy + 0.02,
                    "images_per_second": 900 + 20 * x + rng.normal(0, 30),
                    "seconds": step / 10,
                },
            )
            log.write(
                step, "dev", {"ema_top1": accuracy - 0.3 * math.exp(-step / 150), "count": 5000, "seconds": step / 10}
            )
        log.write(860, "test", {"ema_top1": accuracy, "count": 10_000, "seconds": 90.0})
        log.close()
        # One that failed has metrics, too: those of before, which do not count.
        failed = (cell.arm, cell.seed) in fail
        message = "error: the loss was not finite" if failed else ""
        cell.write_record(exit_code=70 if failed else 0, seconds=95.0, attempts=1, message=message)
    return stored


def write_predictions(cell, seed, images=IMAGES):
    """Predictions as a cell saves them, in no order; returns which are right, by index."""
    rng = np.random.default_rng(seed)
    label, best = rng.integers(0, 10, images), rng.integers(0, 10, images)
    best[: images // 2] = label[: images // 2]
    order = rng.permutation(images)
    classes = np.stack([best, (best + 1) % 10], axis=1)[order]
    save_predictions(
        cell.directory / PREDICTIONS,
        Predictions(order, label[order], classes, np.full(classes.shape, 0.5, np.float32)),
    )
    return label == best, best
