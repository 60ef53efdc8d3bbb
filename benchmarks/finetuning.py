"""Compares fine-tuning with training from scratch: python -m benchmarks.finetuning runs/finetuning

Trains a small Xception on five classes of Fashion-MNIST, then learns the other five from 20 images each in the same
number of steps: from these weights (nothing frozen, the entry flow frozen, or everything but the classifier frozen) and
from scratch, with three learning rates and three seeds each. Prints a Markdown table. Choose a learning rate by the
development split (1,000 other training images), and report the test accuracy on the five classes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from benchmarks.cases import ALLOCATOR
from xception_jax.data.prepare.fashion_mnist import CLASS_NAMES, SHIPPED, read_split
from xception_jax.data.prepare.writer import Dataset, write_dataset
from xception_jax.logs.metrics_log import read_metrics

FIRST, OTHER = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
IMAGES_PER_CLASS, DEVELOPMENT_PER_CLASS = 20, 200
SEEDS = (0, 1, 2)
STEPS = 100
RATES = (0.01, 0.03, 0.1)
COMMON = [
    "--config=configs/finetune.py:fashion_mnist",
    "--config.model.num_classes=5",
    "--config.data.train_split=train",
    "--config.data.eval_split=dev",
    "--config.data.test_split=test",
]
FROM_NOTHING = [
    "--config.init.weights=",
    "--config.optimizer.frozen=",
    "--config.optimizer.multipliers=()",
    "--config.model.width_multiplier=0.25",
    "--config.model.middle_blocks=2",
]
SHORT = [
    "--config.data.name=fashion_mnist_other",
    "--config.batch_size=50",
    f"--config.duration={STEPS} steps",
    "--config.schedule.warmup=10 steps",
    f"--config.evaluation.every={STEPS} steps",
    f"--config.checkpoint.every={STEPS} steps",
]


def main() -> None:
    """Runs everything that is not finished yet, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetuning", description=__doc__)
    parser.add_argument("directory", type=Path, help="directory for datasets and runs; finished runs are reused")
    directory = parser.parse_args().directory.absolute()
    data_dir = directory / "datasets"
    weights = directory / "first.safetensors"
    for name, classes, per_class in (("first", FIRST, None), ("other", OTHER, IMAGES_PER_CLASS)):
        if not (data_dir / f"fashion_mnist_{name}").is_dir():
            write_dataset(classes_of_fashion_mnist(f"fashion_mnist_{name}", classes, per_class), data_dir)
    common = [*COMMON, f"--config.data.data_dir={data_dir}"]
    first = [*common, *FROM_NOTHING, "--config.data.name=fashion_mnist_first", "--config.schedule.learning_rate=0.1"]
    run("train.py", *first, "--config.optimizer.weight_decay=1e-4", f"--workdir={directory / 'first'}")
    run("-m", "xception_jax", "export", directory / "first", weights, "--format=safetensors", "--no_check")

    start = f"--config.init.weights={weights}"
    ways = {
        "from scratch": FROM_NOTHING,
        "fine-tuned, entry flow frozen": [start],
        "fine-tuned, nothing frozen": [start, "--config.optimizer.frozen="],
        "fine-tuned, the classifier alone": [start, "--config.optimizer.frozen=^(?!head/)"],
    }
    arms = {
        f"{way}, learning rate {rate}": [*arguments, f"--config.schedule.learning_rate={rate}"]
        for way, arguments in ways.items()
        for rate in RATES
    }
    print("| | development | test, mean of three seeds | smallest to largest |\n|---|---|---|---|")
    for number, (arm, arguments) in enumerate(arms.items()):
        dev, test = [], []
        for seed in SEEDS:
            workdir = directory / f"arm{number}_seed{seed}"
            run("train.py", *common, *SHORT, *arguments, f"--config.seed={seed}", f"--workdir={workdir}")
            last = {entry["split"]: entry["ema_top1"] for entry in read_metrics(workdir / "metrics.jsonl")[-2:]}
            dev.append(last["dev"])
            test.append(last["test"])
        spread = f"{mean(test):.3f} ± {stdev(test):.3f} | {min(test):.3f} to {max(test):.3f}"
        print(f"| {arm} | {mean(dev):.3f} | {spread} |", flush=True)


def classes_of_fashion_mnist(name: str, classes: tuple[int, ...], per_class: int | None) -> Dataset:
    """Returns a dataset of some classes, with `per_class` training images each (None for all), dev and test images."""
    (images, labels), test = read_split(SHIPPED, "train"), read_split(SHIPPED, "test")
    places = {label: np.flatnonzero(labels == label) for label in classes}
    dev = np.concatenate([place[-DEVELOPMENT_PER_CLASS:] for place in places.values()])
    train = np.concatenate([place[:-DEVELOPMENT_PER_CLASS][:per_class] for place in places.values()])
    at_test = np.flatnonzero(np.isin(test[1], classes))
    splits = {"train": (images[train], labels[train]), "dev": (images[dev], labels[dev])}
    splits["test"] = (test[0][at_test], test[1][at_test])

    def examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = cv2.imencode(".png", np.pad(image, 2))[1].tobytes()
            yield str(index), {"image": png, "label": classes.index(int(label))}

    return Dataset(
        name=name,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(32, 32, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[CLASS_NAMES[label] for label in classes]),
            }
        ),
        splits={split: examples(*arrays) for split, arrays in splits.items()},
        description="Some classes of the Fashion-MNIST images that are included in xception_jax.",
        expected={split: len(arrays[1]) for split, arrays in splits.items()},
    )


def run(*arguments: object) -> None:
    """Runs a command of this checkout, with its output on standard error."""
    environment = os.environ | ALLOCATOR
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=sys.stderr, env=environment)


if __name__ == "__main__":
    main()
