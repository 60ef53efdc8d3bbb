"""Batches: which examples, in which order, seen how.

A batch is a function of (seed, step), and an augmentation of (seed, epoch, index): neither depends on the number of
processes, threads or workers, and a run resumes from its step alone. So the order of examples, the cut into batches and
the share of this process are all decided on indices; only then are images loaded, one batch at a time.
"""

from __future__ import annotations

import collections
import functools
import math
import multiprocessing
import os
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Float32, Int64, UInt8

from xception_jax.config import DataConfig
from xception_jax.data import images
from xception_jax.data.sources import Source, check_label
from xception_jax.errors import BadDataError, StorageError, UserError

Batch = dict[str, np.ndarray]

MAX_DAMAGED_IN_A_ROW = 100

_BATCHES_IN_THE_MAKING = 2  # so that the last images of a batch do not leave threads idle
_BATCHES_READY = 2
_PARTS_PER_THREAD = 4  # of a batch: few, since handing over costs more than a small image; several, since images differ
_PADDING = -1  # the index of an example that fills up the last batch of an evaluation


def train_batches(
    data: DataConfig,
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Returns the endless batches of a run, from `start_step` on.

    Every epoch has an order of its own and uses each example once; a batch may reach into the next epoch. Batch k of
    the processes, put one after the other in the order of `process_index`, is the same for any number of processes.

    Args:
      data: `config.data`.
      source: examples.
      batch_size: examples in a batch of this process (the global batch divided by `process_count`).
      seed: of the order and of the augmentation.
      start_step: number of batches to leave out.
      process_index: of this process.
      process_count: number of processes.

    Returns:
      An iterator over dicts: image float32 [b, s, s, 3] in [-1, 1]; label int32 [b], or float32 [b, num_classes] of
      zeros and ones for several labels an image; index int64 [b]; damaged bool [b], true where the image (with its
      label) is that of a neighbour because the image `index` cannot be decoded. Close it after use.
    """
    # Grain adds the number of the epoch to the seed, so that seed 1 would begin with the second epoch of seed 0.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    examples = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed).repeat()
    examples = examples.map_with_index(functools.partial(_with_epoch, num_examples=len(source)))
    batches = examples.batch(batch_size, drop_remainder=True)[process_index::process_count][start_step:]
    return BatchIterator(batches, _LoadBatch(data, source, seed), data)


def _with_epoch(position: int, index: int, num_examples: int) -> Int64[np.ndarray, " 2"]:
    return np.array((position // num_examples, index), np.int64)


class EvaluationBatches:
    """The batches of one pass over a source, in its order; every pass over this object begins anew.

    All processes get equally many batches. The last ones are filled up, and `mask` is False where they are: the masks
    of all processes sum to the number of examples. A damaged image stays in (mask is True) with the image and the label
    of its neighbour, and `damaged` says so: a result that counts any must name how many.

    Args:
      data: `config.data`.
      source: examples.
      batch_size: examples in a batch of this process.
      view: of each image; by default the central `data.eval_crop` of it at `data.image_size`.
      process_index: of this process.
      process_count: number of processes.
    """

    def __init__(
        self,
        data: DataConfig,
        source: Source,
        *,
        batch_size: int,
        view: images.Preprocessing | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._data, self._source = data, source
        self._batch_size, self._process_index, self._process_count = batch_size, process_index, process_count
        self._load = _LoadBatch(data, source, None, view)

    def __len__(self) -> int:
        """Number of batches, on every process."""
        return -(-len(self._source) // (self._batch_size * self._process_count))

    def __iter__(self) -> BatchIterator:
        """Begins a pass: batches as those of `train_batches`, and mask bool [b]; `index` is -1 where it is False."""
        total = len(self) * self._batch_size * self._process_count
        examples = grain.MapDataset.range(total).map(functools.partial(_or_padding, num_examples=len(self._source)))
        batches = examples.batch(self._batch_size)[self._process_index :: self._process_count]
        return BatchIterator(batches, self._load, self._data)


def _or_padding(position: int, num_examples: int) -> Int64[np.ndarray, " 2"]:
    return np.array((0, position if position < num_examples else _PADDING), np.int64)


class BatchIterator:
    """Loads batches ahead, in threads of this process or (`data.workers` > 0) in processes of its own.

    Args:
      batches: each an int64 [b, 2] of (epoch, index).
      load: turns one of them into a batch.
      data: `config.data`; workers is read.
    """

    def __init__(self, batches: grain.MapDataset, load: _LoadBatch, data: DataConfig):
        # Each worker holds batches of its own: one in the making, and one that waits to be fetched.
        in_the_making = 1 if data.workers else min(_BATCHES_IN_THE_MAKING, data.threads)
        ahead = 1 if data.workers else in_the_making + _BATCHES_READY
        read_options = grain.ReadOptions(num_threads=in_the_making, prefetch_buffer_size=ahead)
        dataset = batches.map(functools.partial(load, memory=_Memory())).to_iter_dataset(read_options)
        if data.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain hands its flags to the workers
            options = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=1)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        self._iterator = iter(dataset)

    def __iter__(self) -> BatchIterator:
        """Returns itself."""
        return self

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
          BadDataError: a label is out of range, a record is damaged, or too many images in a row are.
          StorageError: a worker process died, or reading failed.
        """
        try:
            return next(self._iterator)
        except (StopIteration, UserError):
            raise
        except (RuntimeError, OSError) as error:
            raise StorageError(
                f"loading data failed: {' '.join(str(error).split())}",
                "the data pipeline",
                "look above for what a worker reported (out of memory?); fewer data.workers need less of it",
            ) from error

    def close(self) -> None:
        """Stops threads and workers."""
        self._iterator.close()


def _start_worker(worker: int, num_workers: int) -> None:
    """Lets a worker live exactly as long as the process that it works for."""
    # A Ctrl-C, and a scheduler's SIGTERM, reach all processes at once; the trainer still wants batches to end its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _Memory:
    """Memory of batches that nobody refers to any more, for those to come.

    To get 34 MB anew for each 32 images, cleared page by page, would cost a sixth of the images per second.
    """

    def __init__(self):
        self._free: dict[int, list[memoryview]] = collections.defaultdict(list)  # by their bytes

    def __reduce__(self):
        return _Memory, ()

    def array(self, shape: tuple[int, ...]) -> Float32[np.ndarray, ...]:
        """Returns an array of any values; its memory comes back when the array and all views of it are gone."""
        size = 4 * math.prod(shape)
        free = self._free[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8).data
        flat = np.frombuffer(memory, np.float32)  # every view refers to it, since its own base is no array
        weakref.finalize(flat, free.append, memory).atexit = False
        return flat.reshape(shape)


class _LoadBatch:
    """Turns the (epoch, index) pairs of one batch into its arrays. Images are decoded in a pool of threads.

    Grain's own threads would each make a whole batch: 33 GB for 16 threads and 1,920 images of 299 x 299.

    Args:
      data: `config.data`.
      source: examples.
      seed: of the augmentation; None gives the evaluation view of each image, and a mask.
      view: another one than that of `data`, for evaluation.
    """

    def __init__(self, data: DataConfig, source: Source, seed: int | None, view: images.Preprocessing | None = None):
        self._data, self._source, self._seed = data, source, seed
        self._pool = ThreadPoolExecutor(
            data.threads, thread_name_prefix="decode"
        )  # has no threads before its first use
        self._view = view or images.Preprocessing(data.image_size, data.eval_crop)
        self._size, self._augmentation, self._color = data.image_size, data.augmentation, data.color_distortion
        self._crop_area, self._shift = data.crop_area, data.shift_pixels
        self._parts, self._cache = _PARTS_PER_THREAD * data.threads, data.cache
        self._cached: dict[int, tuple[UInt8[np.ndarray, "h w 3"], Any]] = {}  # (image, label) by index

    def __reduce__(self):
        return _LoadBatch, (self._data, self._source, self._seed, self._view)

    def __call__(self, examples: Int64[np.ndarray, "b 2"], memory: _Memory) -> Batch:
        count, info = len(examples), self._source.info
        pixels = memory.array((count, self._view.size, self._view.size, 3))
        several = info.multi_label
        labels: np.ndarray = np.zeros(
            (count, info.num_classes) if several else count, np.float32 if several else np.int32
        )
        damaged = np.zeros(count, np.bool_)
        pairs = examples.tolist()
        wanted = list({index: None for _, index in pairs if index != _PADDING and index not in self._cached})
        records = dict(zip(wanted, self._source.__getitems__(wanted), strict=True))  # at once: a tenth of one by one

        def load(rows: range) -> None:
            for row in rows:
                epoch, index = pairs[row]
                if index == _PADDING:
                    pixels[row] = 0
                    continue
                image, label, damaged[row] = self._whole_image(index, records.get(index))
                self._write_view(image, epoch, index, pixels[row])
                if several:
                    labels[row, list(label)] = 1
                else:
                    labels[row] = label

        step = -(-count // self._parts)
        # list() re-raises what a thread raised
        list(self._pool.map(load, (range(start, min(start + step, count)) for start in range(0, count, step))))
        batch = {"image": pixels, "label": labels, "index": examples[:, 1].copy(), "damaged": damaged}
        if self._seed is None:
            batch["mask"] = examples[:, 1] != _PADDING
        return batch

    def _whole_image(self, index: int, example: dict[str, Any] | None) -> tuple[np.ndarray, Any, bool]:
        """Returns (image, label, damaged) of an example that has been read or is cached, or of the next whole one."""
        attempts = min(MAX_DAMAGED_IN_A_ROW, len(self._source))
        for attempt in range(attempts):
            place = (index + attempt) % len(self._source)
            if place in self._cached:
                return *self._cached[place], attempt > 0
            if attempt or example is None:
                example = self._source[place]
            check_label(example, self._source.info)
            try:
                image = images.decode(example["image"])
            except images.DamagedImageError as error:
                reason = error
                continue
            if self._cache:
                self._cached[place] = image, example["label"]
            return image, example["label"], attempt > 0
        raise BadDataError(
            f"{attempts} images in a row cannot be decoded; the last: {reason}",
            f"dataset {self._source.info.name}, split {self._source.info.split}, from example {index} on",
            "prepare the dataset again from a whole copy",
        )

    def _write_view(self, image: np.ndarray, epoch: int, index: int, out: np.ndarray) -> None:
        if self._seed is None or self._augmentation == "none":
            self._view(image, out)
            return
        rng = np.random.default_rng((self._seed, epoch, index))
        if self._augmentation == "shift":
            view = self._view.pixels(image)
            images.to_float(images.shifted_view(view, self._shift, rng), out)
            return
        view = images.inception_view(image, self._size, self._crop_area, rng)
        if self._color:
            images.to_float_with_distorted_color(view, out, rng)
        else:
            images.to_float(view, out)


class DamagedImages:
    """Counts the damaged images that a run has met, each once, and stops it when there are too many.

    Args:
      info: of the source: its name, split and size.
      max_fraction: `config.data.max_bad_fraction`: of the examples in the source, so that a single damaged image in the
        first batch does not end a run over a large set.
    """

    NAMED = 10

    def __init__(self, info: Any, max_fraction: float):
        self._info, self._max_fraction = info, max_fraction
        self.indices: dict[int, None] = {}  # in the order in which they were met

    def add(self, batch: Batch) -> list[int]:
        """Takes note of a batch and returns the indices that are new.

        Raises:
          BadDataError: more than `max_fraction` of the source is damaged.
        """
        new = [int(i) for i in batch["index"][batch["damaged"]] if int(i) not in self.indices]
        self.indices.update(dict.fromkeys(new))
        if len(self.indices) > self._max_fraction * self._info.num_examples:
            first = ", ".join(map(str, list(self.indices)[: self.NAMED]))
            share = len(self.indices) / self._info.num_examples
            raise BadDataError(
                f"{len(self.indices)} of {self._info.num_examples:,} images are damaged, "
                f"more than config.data.max_bad_fraction={self._max_fraction:g}",
                f"dataset {self._info.name}, split {self._info.split}, examples {first}",
                f"prepare the dataset again from a whole copy, or set max_bad_fraction above {share:.2g}",
            )
        return new
