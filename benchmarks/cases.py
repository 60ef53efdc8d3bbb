"""Defines the benchmark cases, contestants and goals.

Imports only the standard library, because the environments of all contestants import this module.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from xception_jax import environment


@dataclasses.dataclass(frozen=True)
class Contestant:
    """An implementation to measure.

    Attributes:
      title: name in the tables.
      module: its module in benchmarks/contestants/.
      is_peer: whether it runs in the environment of the peers.
      options: options of its `prepare`.
      environment: environment variables of its process. {scratch} in a value is replaced by an empty directory.
    """

    title: str
    module: str
    is_peer: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


# Those of `xception-jax train`.
ALLOCATOR = {environment.TUNABLES: environment.ALLOCATOR}

CONTESTANTS = {
    "ours": Contestant("xception_jax", "ours", is_peer=False, environment=ALLOCATOR),
    "ours_cold": Contestant(
        "xception_jax, kernels not built yet",
        "ours",
        is_peer=False,
        environment=ALLOCATOR | {"XDG_CACHE_HOME": "{scratch}"},
    ),
    "keras_tensorflow": Contestant(
        "Keras on TensorFlow",
        "keras_applications",
        environment={"KERAS_BACKEND": "tensorflow", "TF_ENABLE_ONEDNN_OPTS": "1"},
    ),
    "keras_jax": Contestant("Keras on JAX", "keras_applications", environment={"KERAS_BACKEND": "jax"}),
    "flax": Contestant("plain Flax", "plain_flax"),
    "timm": Contestant("timm on PyTorch, eager", "pytorch"),
    "timm_compiled": Contestant("timm on PyTorch, compiled", "pytorch", options={"compile": True}),
    "pytorch": Contestant("PyTorch", "pytorch"),
    "pytorch_nchw": Contestant("PyTorch, channels first", "pytorch", options={"channels_last": False}),
    "pytorch_compiled": Contestant("PyTorch, compiled", "pytorch", options={"compile": True}),
    "tf_data": Contestant("tf.data", "tf_data"),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measured quantity."""

    title: str
    unit: str
    more_is_better: bool


MEASURES = {
    "rate": Measure("speed", "images/s", True),
    "start": Measure("time from process start to the end of the first step", "s", False),
    "memory": Measure("peak memory of the process", "GB", False),
}


@dataclasses.dataclass(frozen=True)
class Goal:
    """A goal: `ours` must be at least `factor` times better than the best contestant of `against`."""

    measure: str
    factor: float
    against: tuple[str, ...]
    ours: str = "ours"


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload that contestants run.

    Attributes:
      title: name in the tables.
      work: argument of `prepare`: kind ('train', 'infer' or 'input'), network, batch, size (in pixels), and model
        (fields of `config.model`).
      goals: the goals of the case.
      parameters: number of trainable parameters that every network must have.
      fresh: whether to start new processes in every round and to measure their start, instead of the speed of running
        processes.
    """

    title: str
    work: dict[str, Any]
    goals: tuple[Goal, ...]
    parameters: int | None = None
    fresh: bool = False

    @property
    def contestants(self) -> list[str]:
        """Names of the contestants, in the order of `CONTESTANTS`."""
        named = {name for goal in self.goals for name in (goal.ours, *goal.against)}
        return [name for name in CONTESTANTS if name in named]


XCEPTION = {"network": "xception", "size": 299}
INCEPTION_V3 = {"network": "inception_v3", "size": 299, "batch": 8}
SMALL = {"kind": "train", "network": "small", "size": 32, "batch": 128}
INFERENCE = ("keras_tensorflow", "keras_jax", "timm", "timm_compiled")
TRAINING = ("keras_tensorflow", "timm")
PYTORCH = ("pytorch", "pytorch_nchw")


def _inference(batch: int) -> Case:
    work = XCEPTION | {"kind": "infer", "batch": batch}
    return Case(f"Xception, inference, batch {batch}", work, (Goal("rate", 1.2, INFERENCE),), 22_855_952)


def _segments(segments: int, parameters: int) -> Case:
    work = SMALL | {"model": {"segments": segments}}
    return Case(f"small Xception, {segments} segments, training", work, (Goal("rate", 1.0, PYTORCH),), parameters)


CASES = {
    "infer_8": _inference(8),
    "infer_1": _inference(1),
    "train": Case(
        "Xception, training step, batch 8",
        XCEPTION | {"kind": "train", "batch": 8},
        (Goal("rate", 1.25, TRAINING), Goal("rate", 1.0, ("timm_compiled",)), Goal("rate", 8.0, ("keras_jax", "flax"))),
        22_855_952,
    ),
    "inception_v3_infer": Case(
        "Inception V3, inference, batch 8",
        INCEPTION_V3 | {"kind": "infer"},
        (Goal("rate", 1.0, INFERENCE),),
        23_817_352,
    ),
    "inception_v3_train": Case(
        "Inception V3, training step, batch 8",
        INCEPTION_V3 | {"kind": "train"},
        (Goal("rate", 1.0, TRAINING),),
        23_817_352,
    ),
    "small": Case(
        "small Xception, training",
        SMALL,
        (Goal("rate", 1.25, PYTORCH), Goal("rate", 1.0, ("pytorch_compiled",))),
        722_576,
    ),
    "segments_2": _segments(2, 3_047_420),
    "segments_4": _segments(4, 1_895_810),
    "segments_8": _segments(8, 1_301_594),
    "inception": Case(
        "small network of Inception modules, training",
        SMALL | {"model": {"module": "inception"}},
        (Goal("rate", 1.0, PYTORCH),),
        2_015_795,
    ),
    "input": Case(
        "input: JPEG to batches of 32 at 299",
        {"kind": "input", "size": 299, "batch": 32},
        (Goal("rate", 1.5, ("tf_data",)),),
    ),
    "start": Case(
        "Xception, first training step, batch 8",
        XCEPTION | {"kind": "train", "batch": 8},
        (
            Goal("start", 1.0, ("keras_jax",), ours="ours_cold"),
            Goal("start", 1.0, ("keras_jax",)),
            Goal("memory", 1.0, ("keras_jax",)),
        ),
        22_855_952,
        fresh=True,
    ),
}
