"""Loads one batch: reads its records, decodes and augments its images. pipeline.py decides which batches and when."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from xception_jax.config import DataConfig
from xception_jax.data import images
from xception_jax.data.augmentation import AUGMENTATIONS
from xception_jax.data.buffers import Buffers
from xception_jax.data.sources import Source, check_label
from xception_jax.data.turn import Turn
from xception_jax.environment import usable_cores
from xception_jax.errors import BadDataError

Batch = dict[str, np.ndarray]
"""image float32 [b, s, s, 3], label, index int64 [b], damaged bool [b]; in evaluation also mask bool [b]."""

MAX_DAMAGED_IN_A_ROW = 100
PADDING = -1  # index of an example that fills up the last batch of an evaluation

_PARTS_PER_THREAD = 4  # handing over a part costs more than a small image, but images take different times


class BatchLoader:
    """Turns the (epoch, index) pairs of a batch into its arrays, with `data.threads` threads that decode images.

    Args:
      data: `config.data`.
      source: the examples.
      seed: seeds the augmentation; with None, images have their evaluation view and the batch has a mask.
      view: the evaluation view; by default that of `data`.
    """

    def __init__(self, data: DataConfig, source: Source, seed: int | None, view: images.Preprocessing | None = None):
        self._data, self._source, self._seed = data, source, seed
        self._limits = images.Limits.of(data)
        self._view = view or images.Preprocessing.of(data)
        self._augment, self._turn = AUGMENTATIONS[data.augmentation], Turn.of(data)
        # At least 16, because some wait for a disk.
        self._threads = data.threads or max(16, len(usable_cores()) // max(1, data.workers))
        self._decoders = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")  # starts them on first use
        self._cache: dict[int, tuple[UInt8[np.ndarray, "h w 3"], Any]] = {}  # (image, label) by index

    def __reduce__(self) -> tuple:
        """Pickles without threads and cache: each worker process has its own."""
        return BatchLoader, (self._data, self._source, self._seed, self._view)

    def __call__(self, examples: Int64[np.ndarray, "b 2"], buffers: Buffers) -> Batch:
        """Loads a batch.

        Args:
          examples: (epoch, index) of each example; the index may be `PADDING`.
          buffers: memory for the images.

        Raises:
          BadDataError: a label is out of range, a record is damaged, or too many images in a row are.
        """
        count, info = len(examples), self._source.info
        label = np.zeros((count, info.num_classes), np.float32) if info.multi_label else np.zeros(count, np.int32)
        batch: Batch = {
            "image": buffers.array((count, self._view.size, self._view.size, 3)),
            "label": label,
            "index": examples[:, 1].copy(),
            "damaged": np.zeros(count, np.bool_),
        }
        if self._seed is None:
            batch["mask"] = batch["index"] != PADDING
        pairs = examples.tolist()
        records = self._read([index for _, index in pairs])

        def load(rows: range) -> None:
            for row in rows:
                epoch, index = pairs[row]
                if index == PADDING:
                    batch["image"][row] = 0
                    continue
                with self._decoded(index, records) as (image, label_or_labels, batch["damaged"][row]):
                    self._write_view(image, epoch, index, batch["image"][row])
                if info.multi_label:
                    batch["label"][row, list(label_or_labels)] = 1
                else:
                    batch["label"][row] = label_or_labels

        step = -(-count // (_PARTS_PER_THREAD * self._threads))
        parts = (range(start, min(start + step, count)) for start in range(0, count, step))
        list(self._decoders.map(load, parts))  # waits, and raises what a thread raised
        return batch

    def _read(self, indices: list[int]) -> dict[int, dict[str, Any]]:
        """Reads the records that are not cached, in one call: ten times as fast as one by one."""
        wanted = list({index: None for index in indices if index != PADDING and index not in self._cache})
        return dict(zip(wanted, self._source.__getitems__(wanted), strict=True))

    @contextlib.contextmanager
    def _decoded(self, index: int, records: dict[int, dict[str, Any]]) -> Iterator[tuple[np.ndarray, Any, bool]]:
        """Yields (image, label, damaged) of an example; a damaged one is replaced by the next that can be decoded."""
        info, attempts = self._source.info, min(MAX_DAMAGED_IN_A_ROW, len(self._source))
        for attempt in range(attempts):
            place = (index + attempt) % len(self._source)
            if place in self._cache:
                yield *self._cache[place], attempt > 0
                return
            example = records.get(place) or self._source[place]
            check_label(example, info)
            with contextlib.ExitStack() as memory:
                try:
                    image = memory.enter_context(images.decoded(example["image"], self._limits))
                except images.DamagedImageError as error:
                    reason = error
                    continue
                if self._data.cache:
                    self._cache[place] = image, example["label"]
                yield image, example["label"], attempt > 0
                return
        raise BadDataError(
            f"{attempts} images in a row cannot be decoded; the last: {reason}",
            f"dataset {info.name}, split {info.split}, from example {index} on",
            "prepare the dataset again from an intact copy, or raise max_pixels or max_scans if one of them is named",
        )

    def _write_view(self, image: np.ndarray, epoch: int, index: int, out: np.ndarray) -> None:
        if self._seed is None or self._augment is None:
            self._view(image, out)
        else:
            self._augment(image, self._data, np.random.default_rng((self._seed, epoch, index)), out)
            if self._turn is not None:
                self._turn(out)
