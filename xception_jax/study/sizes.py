"""The sizes of a study: small networks for a CPU, larger ones for one GPU, and the paper's for a pod.

`study_size` has the networks of the first studies, whose stem follows the width and whose last maps have one pixel.
`fair_size` has those of later studies: the stem is not part of the comparison, and every weight meets a pixel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from xception_jax.config import default_config
from xception_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Size:
    """The parts that all studies of one size share.

    Attributes:
      config: the base config.
      seeds: paired over the arms.
      margin: the smallest difference in accuracy that matters, as a share.
      budget: the cost of the study in words.
    """

    config: ConfigDict
    seeds: tuple[int, ...]
    margin: float
    budget: str


def study_size(size: str) -> Size:
    """Returns the size named 'cpu', 'cifar' or 'imagenet'.

    Raises:
      ConfigError: there is no such size.
    """
    return _chosen(size, {"cpu": _cpu, "cifar": _cifar, "imagenet": _imagenet})


def fair_size(size: str) -> Size:
    """Returns the size named 'smoke', 'cpu', 'cifar' or 'imagenet', with a fixed stem and no map below 7.

    Raises:
      ConfigError: there is no such size.
    """
    return _chosen(size, {"smoke": _fair_smoke, "cpu": _fair_cpu, "cifar": _fair_cifar, "imagenet": _fair_imagenet})


def _chosen(size: str, sizes: Mapping[str, Callable[[], Size]]) -> Size:
    if size not in sizes:
        raise ConfigError(f"there is no size {size!r}", "the study, after its colon", f"choose {', '.join(sizes)}")
    return sizes[size]()


def _small(num_classes: int) -> ConfigDict:
    config = default_config()
    config.model.num_classes = num_classes
    config.model.dropout_rate = 0.0
    config.data.image_size = 32
    config.data.augmentation = "shift"
    config.data.eval_crop = 1.0
    config.data.threads = 1  # for small images, passing work between threads costs more than the work
    config.data.cache = True
    config.data.test_split = "test"
    config.loss.label_smoothing = 0.0
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.evaluation.batch_size = 500
    return config


def _cpu() -> Size:
    """Returns the size for Fashion-MNIST: two epochs of 55,000 images, a fifth of the width, one middle module."""
    config = _small(num_classes=10)
    config.model.width_multiplier = 0.2
    config.model.middle_blocks = 1
    config.model.batch_norm.momentum = 0.9
    config.data.name = "fashion_mnist"
    config.data.train_split = "train[:55000]"
    config.data.eval_split = "train[55000:]"
    config.data.shift_pixels = 1
    config.batch_size = 64
    config.duration = "2 epochs"
    config.schedule.warmup = "200 steps"
    config.ema.decay = 0.99
    config.log_every = "50 steps"
    config.evaluation.every = "430 steps"
    config.checkpoint.every = "860 steps"
    return Size(config, (0, 1, 2, 3, 4), 0.005, "two to four minutes per cell on two cores")


def _cifar() -> Size:
    """Returns the size for CIFAR-10: 60 epochs, half the width, four middle modules, a stem without strides."""
    config = _small(num_classes=10)
    config.model.width_multiplier = 0.5
    config.model.middle_blocks = 4
    config.model.stem = "small"
    config.data.name = "cifar10"
    config.data.train_split = "train[:45000]"
    config.data.eval_split = "train[45000:]"
    config.data.shift_pixels = 4
    config.data.threads = 8
    config.batch_size = 256
    config.duration = "60 epochs"
    config.schedule.learning_rate = 0.4
    config.schedule.warmup = "5 epochs"
    config.optimizer.weight_decay = 5e-4
    config.ema.decay = 0.999
    config.evaluation.every = "2 epochs"
    config.checkpoint.every = "5 epochs"
    return Size(config, (0, 1, 2, 3, 4), 0.005, "1.1 PFLOP per cell (3.6 M parameters), on one GPU")


def _imagenet() -> Size:
    """Returns the size for ImageNet at 299 x 299: the paper's network, 30 epochs instead of 169."""
    config = default_config()
    config.model.dtype = "bfloat16"
    config.model.batch_norm.statistics = "device"
    config.data.train_split = "train[:98%]"
    config.data.eval_split = "train[98%:]"
    config.data.test_split = "validation"
    config.duration = "30 epochs"
    config.schedule.name = "cosine"
    config.schedule.learning_rate = 0.6
    config.schedule.warmup = "5 epochs"
    config.ema.decay = 0.999
    return Size(config, (0, 1, 2), 0.005, "1.1 to 2.4 H100-hours per cell, estimated by a roofline")


def _fair_cpu() -> Size:
    """Returns the size for Fashion-MNIST at its 28 pixels: four epochs, maps of 28, 14 and 7, one middle module."""
    config = _cpu().config
    config.model.stem = "small"
    config.model.stem_width = 8
    config.model.width_multiplier = 0.1
    config.model.strides = (2, 2, 1, 1)
    config.data.image_size = 28
    config.data.eval_crop = 0.875  # without the black frame of two pixels
    config.duration = "4 epochs"
    config.evaluation.every = "1 epoch"
    config.checkpoint.every = "2 epochs"
    return Size(config, tuple(range(5)), 0.003, "")


def as_smoke(size: Size) -> Size:
    """Returns a size for Fashion-MNIST cut down to ten steps on the images in the package."""
    config = size.config
    config.model.width_multiplier = 0.1
    config.model.middle_blocks = 0
    config.data.name = "fashion_mnist_subset"
    config.data.train_split = "train[:320]"
    config.data.eval_split = "train[9400:]"
    config.data.test_split = "test[:200]"
    config.batch_size = 32
    config.duration = "10 steps"
    config.schedule.warmup = "0 steps"
    config.log_every = "5 steps"
    config.evaluation.every = "10 steps"
    config.checkpoint.every = "10 steps"
    config.evaluation.batch_size = 200
    return Size(config, (0, 1), size.margin, "about two minutes of one core; shows that the study runs")


def _fair_smoke() -> Size:
    return as_smoke(_fair_cpu())


def _fair_cifar() -> Size:
    """Returns the size for CIFAR-10: 60 epochs, maps of 32, 16 and 8, four middle modules."""
    config = _cifar().config
    config.model.stem_width = 32
    config.model.strides = (1, 2, 2, 1)
    return Size(config, tuple(range(10)), 0.003, "not measured; for one GPU")


def _fair_imagenet() -> Size:
    """Returns the size for ImageNet: the paper's network, whose last maps have ten pixels, with its stem."""
    config = _imagenet().config
    config.model.stem_width = 32
    return Size(config, (0, 1, 2), 0.005, "not measured; for a pod")
