"""Every field of a config: its default, what it may be, and where the default comes from.

Labels of the defaults: **paper** (stated in Chollet 2017), **reference** (read from the public Keras implementation
or its released weights), **inferred** (argued in docs/paper.md), **modern** (a later practice), **local** (a choice of
this code base).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

_DURATION = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:e\d+)?)\s+(step|epoch|example)s?", re.IGNORECASE)


def duration_in_steps(duration: str, batch_size: int, num_examples: int) -> int:
    """Turns '10 epochs', '500 steps' or '3e6 examples' into a number of steps, rounded to the nearest.

    Args:
      duration: a number and one of the units steps, epochs, examples.
      batch_size: examples that one step takes from the dataset.
      num_examples: examples in one epoch.
    """
    match = _DURATION.fullmatch(duration.strip())
    if match is None:
        raise ValueError(f"{duration!r} is not a duration")
    number = float(match[1].replace("_", ""))
    examples_per_unit = {"step": batch_size, "epoch": num_examples, "example": 1}[match[2].lower()]
    return round(number * examples_per_unit / batch_size)


# A check takes a value, returns it in its canonical type, and raises ValueError or TypeError otherwise.
Check = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config: its default, the check a value must pass, and what the check expects in words."""

    default: Any
    check: Check
    expects: str
    source: str
    kind: type = int  # of the value, where the default is None


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def whole(default: int | None, low: int, source: str) -> Field:
    """A whole number of at least `low`."""

    def check(value):
        value = _whole(value)
        _require(value >= low)
        return value

    return Field(default, check, f"a whole number, at least {low}", source)


def number(default: float, low: float, high: float, source: str, *, above: bool = False) -> Field:
    """A float in [low, high], or in (low, high] if `above`."""

    def check(value):
        value = _number(value)
        _require((value > low if above else value >= low) and value <= high)
        return value

    limit = "" if high == math.inf else f", at most {high:g}"
    return Field(default, check, f"a number {'above' if above else 'of at least'} {low:g}{limit}", source)


def choice(default: str, options: tuple[str, ...], source: str) -> Field:
    """One of a few words."""

    def check(value):
        _require(value in options)
        return value

    return Field(default, check, "one of " + ", ".join(map(repr, options)), source)


def choice_or_whole(default: str | int, word: tuple[str, ...], low: int, source: str) -> Field:
    """One of the words, or a whole number (which the command line hands over as a string)."""

    def check(value):
        if value in word:
            return value
        value = _whole(value)
        _require(value >= low)
        return value

    return Field(default, check, " or ".join(map(repr, word)) + f", or a whole number of at least {low}", source)


def flag(default: bool | None, source: str) -> Field:
    """True or False."""

    def check(value):
        _require(isinstance(value, bool))
        return value

    return Field(default, check, "True or False", source, kind=bool)


def text(default: str, source: str) -> Field:
    """Any string."""

    def check(value):
        _require(isinstance(value, str))
        return value

    return Field(default, check, "a string", source)


def pattern(default: str, source: str) -> Field:
    """A regular expression over names of parameters."""

    def check(value):
        _require(isinstance(value, str))
        re.compile(value)
        return value

    return Field(default, check, "a regular expression over parameter names such as 'block2_sepconv1/kernel'", source)


def duration(default: str, source: str) -> Field:
    """A number and a unit, see `duration_in_steps`."""

    def check(value):
        _require(isinstance(value, str))
        duration_in_steps(value, 1, 1)
        return value.strip()

    return Field(default, check, "a number and a unit: '500 steps', '10 epochs', '3e6 examples'", source)


def numbers(default: tuple[float, ...], length: int | None, source: str) -> Field:
    """A sequence of numbers, of a fixed length if `length` is given."""

    def check(value):
        _require(not isinstance(value, str))
        value = tuple(_number(v) for v in value)
        _require(length is None or len(value) == length)
        return value

    return Field(default, check, f"{length or 'some'} numbers", source)


def factors(source: str) -> Field:
    """Pairs of a regular expression over names of parameters and a factor; none by default."""

    def check(value):
        _require(not isinstance(value, str))
        pairs = tuple((pattern, _number(factor)) for pattern, factor in value)
        for pattern, factor in pairs:
            re.compile(pattern)
            _require(factor > 0)
        return pairs

    return Field((), check, "pairs of a regular expression and a factor above 0, such as (('^head/', 10.0),)", source)


FIELDS: dict[str, Field] = {
    "name": text("", "local: what the run is called in reports"),
    "seed": whole(0, 0, "local: initialisation, data order, augmentation and dropout all derive from it"),
    # --- the network ---------------------------------------------------------------------------------------------
    "model.name": choice("xception", ("xception", "inception_v3", "inception_v3_2016"), "paper: section 3, table 3"),
    "model.num_classes": whole(1000, 1, "paper: section 4.1, ImageNet"),
    "model.width_multiplier": number(1.0, 0.0, 64.0, "paper: figure 5 has 1", above=True),
    "model.middle_blocks": whole(8, 0, "paper: figure 5"),
    "model.segments": choice_or_whole("depthwise", ("depthwise",), 1, "paper: section 1.2, the end of the spectrum"),
    "model.group_width": whole(None, 1, "local: channels per segment; an alternative to `segments`"),
    "model.order": choice("depthwise_first", ("depthwise_first", "pointwise_first"), "reference: as Keras' layer"),
    "model.intermediate_activation": choice("none", ("none", "relu", "elu"), "paper: section 4.7, figure 10"),
    "model.module": choice("separable", ("separable", "inception"), "paper: figure 5 has separable convolutions"),
    "model.residual": flag(True, "paper: section 4.6, figure 9"),
    "model.depth_multiplier": whole(1, 1, "reference"),
    "model.kernel_size": whole(3, 1, "paper: figure 5"),
    "model.stem": choice("imagenet", ("imagenet", "small"), "paper: figure 5; 'small' keeps the size, for 32 x 32"),
    "model.fc_layers": whole(0, 0, "paper: section 4.3, layers of 4,096 units before the classifier (JFT: 2)"),
    "model.fc_width": whole(4096, 1, "paper: section 4.3"),
    "model.dropout_rate": number(0.5, 0.0, 0.99, "paper: section 4.2 (ImageNet 0.5, JFT none)"),
    "model.aux_head": flag(False, "paper: section 4.2, not used; Inception V3 only"),
    "model.padding": choice("same", ("same", "symmetric"), "reference: Keras; 'symmetric' is what PyTorch ports do"),
    "model.dtype": choice("float32", ("float32", "bfloat16", "float64"), "local: of the computation"),
    "model.batch_norm.momentum": number(0.99, 0.0, 1.0, "reference: Keras"),
    "model.batch_norm.epsilon": number(1e-3, 0.0, 1.0, "reference: Keras", above=True),
    "model.batch_norm.scale": flag(
        None, "paper: table 3 counts it; None is True, and False for Inception V3 (reference)"
    ),
    "model.batch_norm.statistics": choice_or_whole(
        "global", ("global", "device"), 1, "inferred: the paper's is per device"
    ),
    # --- the data ------------------------------------------------------------------------------------------------
    "data.name": text("imagenet2012", "paper: section 4.1; a TFDS name, or 'synthetic'"),
    "data.data_dir": text("", "local: empty is TFDS_DATA_DIR, else ~/tensorflow_datasets"),
    "data.train_split": text("train[:98%]", "modern: the rest is the development split"),
    "data.eval_split": text("train[98%:]", "modern: watched while training, so that test images are not tuned on"),
    "data.test_split": text("validation", "paper: table 1; evaluated once, at the end"),
    "data.image_size": whole(299, 1, "paper: section 4"),
    "data.augmentation": choice("inception", ("inception", "shift", "none"), "inferred: Inception preprocessing"),
    "data.color_distortion": flag(True, "inferred: brightness 32/255, saturation 0.5 to 1.5"),
    "data.crop_area": numbers((0.05, 1.0), 2, "inferred: smallest and largest share of the image"),
    "data.shift_pixels": whole(2, 0, "modern: for augmentation 'shift', after padding the image by as much"),
    "data.eval_crop": number(0.875, 0.0, 1.0, "inferred: central share of the image's sides", above=True),
    "data.threads": whole(16, 1, "local: decoding threads in each process"),
    "data.workers": whole(0, 0, "local: decoding processes beside the trainer; 0 decodes in threads"),
    "data.cache": flag(False, "local: keep decoded images in memory, which a small dataset fits into"),
    "data.max_bad_fraction": number(0.001, 0.0, 1.0, "local: share of damaged images above which the run stops"),
    "data.synthetic_examples": whole(10_000, 1, "local: size of the synthetic source"),
    # --- training ------------------------------------------------------------------------------------------------
    "batch_size": whole(1920, 1, "inferred: 60 replicas of 32"),
    "accumulation_steps": whole(1, 1, "local: microbatches whose gradients are averaged in one step"),
    "duration": duration("169 epochs", "inferred: 113,000 steps"),
    "init.weights": text("", "local: a weight file to start from, for fine-tuning; read at step 0 alone"),
    "loss.name": choice("softmax", ("softmax", "sigmoid"), "paper: section 4.1 (ImageNet); inferred for JFT"),
    "loss.label_smoothing": number(0.1, 0.0, 0.99, "inferred: as in Inception V3"),
    "loss.aux_weight": number(0.4, 0.0, 10.0, "modern: weight of the auxiliary head's loss, if there is one"),
    "optimizer.name": choice("sgd", ("sgd", "rmsprop"), "paper: section 4.2"),
    "optimizer.momentum": number(0.9, 0.0, 1.0, "paper: section 4.2"),
    "optimizer.nesterov": flag(False, "inferred"),
    "optimizer.rmsprop_decay": number(0.9, 0.0, 1.0, "inferred: as in Inception V3"),
    "optimizer.rmsprop_epsilon": number(1.0, 0.0, 10.0, "inferred: as in Inception V3", above=True),
    "optimizer.weight_decay": number(1e-5, 0.0, 1.0, "paper: section 4.2; coupled, i.e. the gradient of L2"),
    "optimizer.decayed": pattern("kernel$", "inferred: every kernel, neither BatchNorm nor biases"),
    "optimizer.frozen": pattern("", "modern: parameters that stay as they start, with their BN statistics; '' is none"),
    "optimizer.multipliers": factors("modern: of the learning rate; the first pattern found in a name counts"),
    "optimizer.clip_norm": number(0.0, 0.0, math.inf, "local: 0 does not clip"),
    "schedule.name": choice("staircase", ("staircase", "cosine", "constant"), "paper: section 4.2"),
    "schedule.learning_rate": number(0.045, 0.0, 1e12, "paper: section 4.2", above=True),
    "schedule.decay_rate": number(0.94, 0.0, 1.0, "paper: section 4.2", above=True),
    "schedule.decay_every": duration("2 epochs", "paper: section 4.2"),
    "schedule.warmup": duration("0 steps", "modern: 5 epochs is common"),
    "ema.decay": number(0.9999, 0.0, 1.0, "inferred: Polyak average of weights and BN statistics; 0 turns it off"),
    "max_bad_steps": whole(10, 1, "local: non-finite steps in a row before the run goes back to a checkpoint"),
    # --- the run -------------------------------------------------------------------------------------------------
    "mesh.data": whole(-1, -1, "local: devices along the batch; -1 takes all that are left"),
    "mesh.fsdp": whole(1, 1, "local: devices over which parameters and optimiser state are sharded"),
    "distributed.coordinator": text("", "local: host:port of process 0; empty lets the cluster tell, or runs alone"),
    "distributed.num_processes": whole(1, 1, "local: with a coordinator"),
    "distributed.process_id": whole(0, 0, "local: with a coordinator"),
    "log_every": duration("50 steps", "local"),
    "profile": whole(0, 0, "local: steps to trace, after the first two, into <workdir>/profile; 0 is off"),
    "evaluation.batch_size": whole(512, 1, "local"),
    "evaluation.every": duration("1 epoch", "local"),
    "evaluation.map_at": whole(100, 1, "paper: section 4.1, MAP@100"),
    "checkpoint.every": duration("1 epoch", "local"),
    "checkpoint.keep_latest": whole(2, 1, "local"),
    "checkpoint.keep_best": whole(1, 0, "local: besides the latest; by top-1, or MAP for several labels"),
    "checkpoint.allow_dataset_change": flag(False, "local: resume although the dataset is another one"),
    "logs.tensorboard": flag(False, "local: needs tensorboardX"),
    "logs.wandb_project": text("", "local: needs wandb; empty is off"),
}
