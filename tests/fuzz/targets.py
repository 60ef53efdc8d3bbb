"""The table of what is fuzzed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import readers, seeds
from xception_jax.errors import UserError

REGRESSIONS = Path(__file__).parent / "regressions"


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader of files from strangers.

    Attributes:
      read: takes the bytes of a file, and raises only a `UserError`.
      seeds: returns small files by name.
      longest: bytes of the longest input.
      words: what the files may contain, for the fuzzer.
    """

    read: Callable[[bytes], None]
    seeds: Callable[[], dict[str, bytes]]
    longest: int = 1 << 14
    words: tuple[str, ...] = ()


_JSON = ("null", "true", "[", "]", "{", "}", ":", ",", '""', "NaN", "Infinity", "1e999", "-1", "9223372036854775808")

TARGETS = {
    "image": Target(
        readers.image, seeds.images, words=("eXIf", "tEXt", "IHDR", "IDAT", "VP8X", "VP8L", "EXIF", "Exif")
    ),
    "legacy_h5": Target(functools.partial(readers.weights, suffix=".h5"), seeds.legacy_h5, 1 << 15),
    "weights_h5": Target(functools.partial(readers.weights, suffix=".weights.h5"), seeds.weights_h5, 1 << 15),
    "keras": Target(functools.partial(readers.weights, suffix=".keras"), seeds.keras, 1 << 15),
    "safetensors": Target(readers.safetensors, seeds.safetensors, 1 << 17, _JSON),
    "timm": Target(readers.safetensors, seeds.timm, words=_JSON),
    "config": Target(readers.config, seeds.config, words=_JSON),
    "metrics": Target(readers.metrics, seeds.metrics, words=(*_JSON, "step", "split")),
    "manifest": Target(readers.manifest, seeds.manifest, words=(*_JSON, "sha256", "files", "record")),
    "tfrecord": Target(readers.tfrecord, seeds.tfrecord),
    "array_record": Target(readers.array_record, seeds.array_record),
    "dataset": Target(readers.dataset, seeds.dataset, words=(*_JSON, "shardLengths", "numClasses", "pythonClassName")),
    "archive": Target(readers.archive, seeds.archive, words=("ustar", "GNU.sparse.major=1", "size=", "path=")),
    "arguments": Target(
        readers.arguments, seeds.arguments, words=("--config.", "--config=imagenet", "--", "=", "train")
    ),
}


def check(name: str, data: bytes) -> None:
    """Reads an input. Any exception but a `UserError` passes."""
    with contextlib.suppress(UserError):
        TARGETS[name].read(data)


def regressions(name: str) -> dict[str, bytes]:
    """Returns the inputs of a target that were once found to be read wrongly."""
    return {path.name: path.read_bytes() for path in sorted((REGRESSIONS / name).glob("*")) if path.is_file()}
