"""The whole config of an experiment, and the sections that have only one form."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from xception_jax.config.fields import address, choice, flag, integer, number, numbers, span, text
from xception_jax.config.model import NETWORKS, ModelConfig
from xception_jax.config.section import Section, variants
from xception_jax.config.training import OPTIMIZERS, SCHEDULES, LossConfig, OptimizerConfig, ScheduleConfig
from xception_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DataConfig(Section):
    """The dataset, and how its images are read and augmented."""

    path: ClassVar[str] = "data."

    name: str = text("imagenet2012", "paper: section 4; a TFDS name, or 'synthetic'")
    data_dir: str = text("", "local: empty is TFDS_DATA_DIR, else ~/tensorflow_datasets")
    train_split: str = text("train[:98%]", "modern: split to train on; the rest is the development split")
    eval_split: str = text("train[98%:]", "modern: watched while training, so that test images are not tuned on")
    test_split: str = text("validation", "paper: table 1; split that is evaluated once, at the end")
    image_size: int = integer(299, 1, "paper: section 4; side of the images that the network sees", high=4096)
    augmentation: str = choice("inception", ("inception", "shift", "none"), "inferred: Inception preprocessing")
    random_labels: int = integer(
        -1, -1, "local: seed of a random label for each image of all splits, as a control; -1 keeps the labels"
    )
    sampling: str = choice("uniform", ("uniform", "balanced"), "modern: 'balanced' draws every class equally often")
    color_distortion: bool = flag(True, "inferred: brightness 32/255, saturation 0.5 to 1.5")
    crop_area: tuple[float, float] = numbers((0.05, 1.0), 2, "inferred: smallest and largest share of the image")
    shift_pixels: int = integer(2, 0, "modern: for augmentation 'shift', after padding the image by as much")
    turn: str = choice(
        "none",
        ("none", "kronecker", "free"),
        "local: orthogonal mixing of channels and pixels in blocks of 2 x 2, after everything else, see data/turn.py",
    )
    turn_angle: float = number(
        1.0, 0.0, 1.0, "local: how far images are turned; 0 leaves them as they are", unless={"turn": ("none",)}
    )
    turn_seed: int = integer(0, 0, "local: draws the direction of the turn", unless={"turn": ("none",)})
    eval_crop: float = number(0.875, 0.0, 1.0, "inferred: central share of the image's sides", above=True)
    threads: int = integer(0, 0, "local: decoding threads in each process; 0 is as many as cores, but at least 16")
    workers: int = integer(0, 0, "local: decoding processes beside the trainer; 0 decodes in threads")
    cache: bool = flag(False, "local: keep decoded images in memory, which a small dataset fits into")
    cache_features: bool = flag(
        False, "modern: keep what frozen layers compute on disk, if only the head is trained without augmentation"
    )
    max_pixels: int = integer(1 << 26, 1, "local: width x height above which an image counts as damaged")
    max_scans: int = integer(100, 1, "local: scans of a JPEG above which it counts as damaged; encoders write 1 to 20")
    decoding_memory: int = integer(2048, 1, "local: MiB for all images that are being decoded in a process")
    max_bad_fraction: float = number(0.001, 0.0, 1.0, "local: share of damaged images above which the run stops")
    synthetic_examples: int = integer(10_000, 1, "local: size of the synthetic source")

    def check(self) -> None:
        """Checks the crop interval, the training split, shifts, and that images that are turned have even sides."""
        if self.augmentation == "shift" and self.shift_pixels > self.image_size:
            raise ConfigError(
                f"images of {self.image_size} x {self.image_size} pixels cannot be moved by {self.shift_pixels}",
                "config.data.shift_pixels",
                "set it to a small part of config.data.image_size",
            )
        if self.turn != "none" and self.image_size % 2:
            raise ConfigError(
                f"images of {self.image_size} x {self.image_size} pixels cannot be turned in blocks of 2 x 2 pixels",
                "config.data.image_size",
                f"set it to an even number, such as {self.image_size + 1}, or config.data.turn='none'",
            )
        if not self.train_split.strip():
            fix = "set it to a split, such as 'train' or 'train[:98%]'"
            raise ConfigError("config.data.train_split is empty", "config.data.train_split", fix)
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"config.data.crop_area is {self.crop_area}",
                "config.data.crop_area",
                "set it to two shares of the image, 0 < smallest <= largest <= 1",
            )


@dataclasses.dataclass(frozen=True)
class InitConfig(Section):
    """The initial weights of a run."""

    path: ClassVar[str] = "init."

    weights: str = text("", "local: a weight file to start from, or its name, for fine-tuning; read at step 0 only")


@dataclasses.dataclass(frozen=True)
class EMAConfig(Section):
    """The Polyak average of weights and BatchNorm statistics."""

    path: ClassVar[str] = "ema."

    decay: float = number(0.9999, 0.0, 1.0, "inferred: Polyak average of weights and BN statistics; 0 turns it off")


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section):
    """How devices are arranged."""

    path: ClassVar[str] = "mesh."

    data: int = integer(-1, -1, "local: devices along the batch; -1 takes all that are left")
    fsdp: int = integer(1, 1, "local: devices over which parameters and optimizer state are sharded")

    def check(self) -> None:
        """Refuses a mesh without devices."""
        if self.data == 0:
            raise ConfigError(
                "config.mesh.data is 0",
                "config.mesh.data",
                "set it to the number of devices along the batch, or -1 for all",
            )


@dataclasses.dataclass(frozen=True)
class DistributedConfig(Section):
    """How the processes of a run find each other."""

    path: ClassVar[str] = "distributed."

    start: str = choice("auto", ("auto", "on", "off"), "local: auto connects the processes that a launcher started")
    coordinator: str = address("", "local: HOST:PORT of process 0; empty: ask the launcher, or run one process")
    num_processes: int | None = integer(None, 1, "local: with a coordinator; None: ask the launcher")
    process_id: int | None = integer(None, 0, "local: with a coordinator; None: ask the launcher")
    timeout: int = integer(300, 1, "local: seconds in which all processes have to connect")
    heartbeat: int = integer(60, 2, "local: seconds without a sign of life after which a process is lost")

    def check(self) -> None:
        """Refuses a process number without a coordinator, and one that is not below the number of processes."""
        count, number = self.num_processes or 1, self.process_id or 0
        if not self.coordinator and (count > 1 or number > 0):
            raise ConfigError(
                f"config.distributed says that this is process {number} of {count}, but not where process 0 is",
                "config.distributed.coordinator",
                "set it to HOST:PORT of process 0",
            )
        if self.num_processes is not None and number >= count:
            raise ConfigError(
                f"config.distributed.process_id is {number}, but there are {count} processes",
                "config.distributed.process_id",
                f"number the processes from 0 to {count - 1}, or set config.distributed.num_processes",
            )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Section):
    """Evaluation while training and at its end."""

    path: ClassVar[str] = "evaluation."

    batch_size: int = integer(512, 1, "local: images in a batch of an evaluation")
    every: str = span("1 epoch", "local: how often the development split is evaluated")
    map_at: int = integer(100, 1, "paper: section 4.1, MAP@100; number of best classes that count in MAP@k")
    heat_maps: int = integer(0, 0, "local: images in the report with a heat map of the predicted class; 0 is off")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Section):
    """When checkpoints are written and which of them are kept."""

    path: ClassVar[str] = "checkpoint."

    every: str = span("1 epoch", "local: how often the state is saved")
    keep_latest: int = integer(2, 1, "local: number of the newest checkpoints that are kept")
    keep_best: int = integer(
        1, 0, "local: number of the best that are kept as well; by top-1, or MAP for several labels"
    )
    allow_dataset_change: bool = flag(False, "local: resume although the dataset is another one")


@dataclasses.dataclass(frozen=True)
class WatchdogConfig(Section):
    """When a stalled run is ended, so that the scheduler starts it again."""

    path: ClassVar[str] = "watchdog."

    factor: int = integer(
        20, 0, "local: end the run if no step finishes within this multiple of the median step; 0 is off"
    )
    min_seconds: int = integer(
        600,
        1,
        "local: shortest time without a step that ends the run; ten times as long before the first step",
        unless={"factor": (0,)},
    )


@dataclasses.dataclass(frozen=True)
class LogsConfig(Section):
    """Trackers beside metrics.jsonl."""

    path: ClassVar[str] = "logs."

    tensorboard: bool = flag(False, "local: needs tensorboardX")
    wandb_project: str = text("", "local: needs wandb; empty is off")
    images: int = integer(16, 0, "local: augmented training images sent to trackers at each evaluation; 0 is off")
    histograms: bool = flag(False, "local: distributions of all parameters sent to trackers at each evaluation")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig(Section):
    """The config of an experiment; the defaults are the paper's Xception on ImageNet."""

    path: ClassVar[str] = ""

    name: str = text("", "local: what the run is called in reports")
    seed: int = integer(0, 0, "local: initialization, data order, augmentation and dropout all derive from it")
    model: ModelConfig = variants(NETWORKS, "paper: section 3, table 3")
    data: DataConfig = DataConfig()
    batch_size: int = integer(1920, 1, "inferred: 60 replicas of 32; images in a step, on all devices together")
    accumulation_steps: int = integer(1, 1, "local: microbatches whose gradients are averaged in one step")
    duration: str = span("169 epochs", "inferred: 113,000 steps; length of the run")
    init: InitConfig = InitConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = variants(OPTIMIZERS, "paper: section 4.2; the optimizer")
    schedule: ScheduleConfig = variants(SCHEDULES, "paper: section 4.2; how the learning rate changes")
    ema: EMAConfig = EMAConfig()
    max_bad_steps: int = integer(10, 1, "local: non-finite steps in a row before the run goes back to a checkpoint")
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    log_every: str = span("50 steps", "local: how often training metrics are logged")
    profile: int = integer(0, 0, "local: steps to trace, after the first two, into <workdir>/profile; 0 is off")
    watchdog: WatchdogConfig = WatchdogConfig()
    compilation_cache: str = text("", "local: directory for compiled programs; empty leaves it to JAX")
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logs: LogsConfig = LogsConfig()

    @property
    def num_classes(self) -> int:
        """Number of classes that the network tells apart: a single logit separates two."""
        return 2 if self.model.num_classes == 1 and not self.loss.multi_label else self.model.num_classes

    def check(self) -> None:
        """Rejects balancing classes twice, batches that do not divide evenly, and images that are too small."""
        if self.loss.class_weights == "balanced" and self.data.sampling == "balanced":
            raise ConfigError(
                "class_weights='balanced' and sampling='balanced' would correct the sizes of the classes twice",
                "config.loss.class_weights",
                "set one of them; sampling shows images of small classes more often, weights count them more",
            )
        if self.batch_size % self.accumulation_steps:
            nearest = max(1, round(self.batch_size / self.accumulation_steps)) * self.accumulation_steps
            raise ConfigError(
                f"config.batch_size={self.batch_size} is not divisible by accumulation_steps={self.accumulation_steps}",
                "config.batch_size",
                f"the nearest valid batch size is {nearest}",
            )
        if self.data.image_size < self.model.smallest_side:
            raise ConfigError(
                f"images of {self.data.image_size} pixels are too small for {self.model.name}: no pixel would be left",
                "config.data.image_size",
                f"set it to at least {self.model.smallest_side}",
            )
        group = self.model.batch_norm.statistics
        microbatch = self.batch_size // self.accumulation_steps
        if isinstance(group, int) and microbatch % group:
            raise ConfigError(
                f"config.model.batch_norm.statistics={group} does not divide the {microbatch} images of a (micro)batch",
                "config.model.batch_norm.statistics",
                "set it to a divisor, to 'global' or to 'device'",
            )
