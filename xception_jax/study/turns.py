"""Measures how separable the blocks of pixels are that the arms of a study see, before and after their turns.

The measure is that of patch_covariance.py, on the blocks of 2 x 2 pixels that are turned (data/turn.py). It needs no
network. A Kronecker turn must not change it, and a free turn must lower it.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float

from xception_jax.config import DataConfig
from xception_jax.data.datasets import open_dataset
from xception_jax.data.pipeline import EvaluationBatches
from xception_jax.data.turn import BLOCK, CHANNELS
from xception_jax.files import write_atomically
from xception_jax.study.design import Arm, Study
from xception_jax.study.patch_covariance import covariance, kronecker_share, whiten
from xception_jax.user_files import read_text, reading, writing

FILE = "turns.csv"
_MOST_IMAGES, _MOST_BLOCKS = 500, 400_000


@dataclasses.dataclass(frozen=True)
class TurnedShare:
    """The separability of turned images.

    Attributes:
      turn: kind of the turn.
      angle: angle of the turn; 0 for images as they are.
      seed: seed of its direction.
      raw: the share of the covariance of blocks in its best product of a channel and a space matrix.
      whitened: the same after whitening by the marginal covariances.
    """

    turn: str
    angle: float
    seed: int
    raw: float
    whitened: float


_COLUMNS = [field.name for field in dataclasses.fields(TurnedShare)]

Key = tuple[str, float, int]


def turned_data(study: Study) -> dict[Key, DataConfig]:
    """Returns `config.data` of each turn that cells of the study see, by (kind, angle, seed), and of the study itself.

    'none' is the angle 0, to which the gates compare.
    """
    turned = [arm for arm in study.arms if study.arm_config(arm).data.turn != "none"]
    arms = [Arm("the study", {}), *turned] if turned else []
    configs = [study.arm_config(arm, study.seeded_fields(seed)).data for arm in arms for seed in study.seeds]
    return {(data.turn if data.turn_angle else "none", data.turn_angle, data.turn_seed): data for data in configs}


def measure_turns(study: Study) -> list[TurnedShare]:
    """Measures training images of the study as its networks see them, without augmentation."""
    return [TurnedShare(*key, *_shares(data)) for key, data in turned_data(study).items()]


def lacks_turns(study: Study, shares: Iterable[TurnedShare]) -> bool:
    """Returns whether cells of the study see a turn that was not measured."""
    return not turned_data(study).keys() <= {(share.turn, share.angle, share.seed) for share in shares}


def _shares(data: DataConfig) -> tuple[float, float]:
    count = max(1, min(_MOST_IMAGES, _MOST_BLOCKS // (data.image_size // BLOCK) ** 2))
    batches = EvaluationBatches(data.replace(workers=0), open_dataset(data, data.train_split), batch_size=count)
    iterator = iter(batches)
    try:
        batch = next(iterator)
        found = covariance(_blocks(batch["image"][batch["mask"]]))
    finally:
        iterator.close()
    return kronecker_share(found, CHANNELS), kronecker_share(whiten(found, CHANNELS), CHANNELS)


def _blocks(images: Float[np.ndarray, "b s s 3"]) -> Float[np.ndarray, "n 2 2 3"]:
    count, size = images.shape[0], images.shape[1] // BLOCK
    blocks = images.reshape(count, size, BLOCK, size, BLOCK, CHANNELS).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(-1, BLOCK, BLOCK, CHANNELS).astype(np.float64)


def write_turns(root: Path, shares: Iterable[TurnedShare]) -> None:
    """Writes the table into a study directory."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, shares))
    with writing("table of turns", root / FILE):
        write_atomically(root / FILE, buffer.getvalue())


def read_turns(root: Path) -> list[TurnedShare]:
    """Reads the table of a study directory; [] if there is none.

    Raises:
      BadDataError: it is damaged.
    """
    path = root / FILE
    if not os.path.lexists(path):
        return []
    with reading("table of turns", path, "remove it, then run the study again, which measures the turns anew"):
        rows = csv.DictReader(io.StringIO(read_text(path)))
        if rows.fieldnames != _COLUMNS:
            raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
        return [
            TurnedShare(row["turn"], float(row["angle"]), int(row["seed"]), float(row["raw"]), float(row["whitened"]))
            for row in rows
        ]


def mean_shares(shares: Iterable[TurnedShare]) -> dict[tuple[str, float], TurnedShare]:
    """Returns the mean over seeds of each (kind, angle)."""

    def key(share: TurnedShare) -> tuple[str, float]:
        return share.turn, share.angle

    groups = itertools.groupby(sorted(shares, key=key), key)
    return {name: _mean(list(group)) for name, group in groups}


def _mean(shares: list[TurnedShare]) -> TurnedShare:
    raw, whitened = (math.fsum(getattr(share, name) for share in shares) / len(shares) for name in ("raw", "whitened"))
    return dataclasses.replace(shares[0], raw=raw, whitened=whitened)
