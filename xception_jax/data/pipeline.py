"""Batches of a training run or an evaluation.

A batch is a function of (seed, step), and an augmentation of (seed, epoch, index). Neither depends on the number of
processes, threads or workers, and a run resumes from its step. To achieve this, Grain shuffles, batches and shares out
*indices* first, and images are loaded afterwards, a whole batch at a time. What runs where:

    Grain's order of indices      shuffle -> (epoch, index) -> batches of this process, from the first step on
              |
              |  int64 [b, 2] for one batch
              v
    2 prefetch threads (Grain)    BatchLoader: allocates the batch, reads its records in one call, divides its rows
              |                   among the decoding threads and waits for them
              |  some rows
              v
    data.threads decoding threads decode, augment, write the image into its row of the batch
              |
              |  at most 2 batches, loading or ready, in order
              v
    caller of next()              in training, a thread that copies the batch to the devices during the previous step

There are two prefetch threads because the decoding threads would be idle while a single one reads the records of the
next batch, and while the last images of a batch are decoded. Two batches are prefetched because one is consumed in a
step and the other bridges differences in time. The memory of a batch is reused when its consumer drops it (buffers.py).

With `data.workers` > 0, each worker process has its own loader and decoding threads instead, without prefetch threads:
it loads one batch while another waits in shared memory. Workers take turns, so the order of batches is the same.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading

import grain
import numpy as np
from absl import flags
from jaxtyping import Int64

from xception_jax.config import DataConfig
from xception_jax.data import images
from xception_jax.data.buffers import Buffers
from xception_jax.data.features import FeatureLoader, FeatureSource
from xception_jax.data.loading import PADDING, Batch, BatchLoader
from xception_jax.data.sources import Source, SourceInfo
from xception_jax.errors import BadDataError, StorageError, UserError
from xception_jax.names import one_line, printable

_CLOSING_SECONDS = 3.0  # Grain would wait for a worker that is stuck, such as on a dead network disk
_PREFETCHED_BATCHES = 2


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
    """Returns the endless batches of a run, starting at `start_step`.

    Every epoch has its own order and uses each example once; a batch may reach into the next epoch. With
    `data.sampling='balanced'`, every class is drawn equally often instead, see `_balanced`. Batch k of all processes,
    concatenated in the order of `process_index`, is the same for any number of processes.

    Args:
      data: `config.data`.
      source: the examples.
      batch_size: examples in a batch of this process (the global batch size divided by `process_count`).
      seed: seeds the order and the augmentation.
      start_step: number of batches to skip.
      process_index: index of this process.
      process_count: number of processes.

    Returns:
      An iterator over dicts: image float32 [b, s, s, 3] in [-1, 1]; label int32 [b], or float32 [b, num_classes] of
      zeros and ones for a multi-label dataset; index int64 [b]; damaged bool [b], true where the image `index` cannot
      be decoded and image and label are those of a neighbour. Close it after use.
    """
    examples = _balanced(source, seed) if data.sampling == "balanced" else _uniform(len(source), seed)
    batches = examples.batch(batch_size, drop_remainder=True)[process_index::process_count][start_step:]
    return BatchIterator(batches, *_loader(data, source, seed))


def _loader(
    data: DataConfig, source: Source, seed: int | None, view: images.Preprocessing | None = None
) -> tuple[BatchLoader | FeatureLoader, int]:
    """Returns what loads a batch, and the number of worker processes in which it runs."""
    if isinstance(source, FeatureSource):
        return FeatureLoader(source.features, masked=seed is None), 0
    return BatchLoader(data, source, seed, view), data.workers


def _uniform(num_examples: int, seed: int) -> grain.MapDataset:
    """Returns (epoch, index) by position: every epoch has each example once."""
    # Grain adds the epoch to the seed. With our seed itself, seed 1 would start with the second epoch of seed 0.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    examples = grain.MapDataset.range(num_examples).shuffle(seed=shuffle_seed).repeat()
    return examples.map_with_index(functools.partial(_with_epoch, num_examples=num_examples))


def _with_epoch(position: int, index: int, num_examples: int) -> Int64[np.ndarray, " 2"]:
    return np.array((position // num_examples, index), np.int64)


def _balanced(source: Source, seed: int) -> grain.MapDataset:
    """Returns (epoch, index) by position: consecutive blocks have one example of each class, in random order.

    Within its class, every example is drawn once before any is drawn again. `epoch` counts these passes through the
    class, so that each draw of an example has an augmentation of its own.
    """
    labels = np.asarray(source.column("label"))
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    seeds = np.random.SeedSequence(seed).generate_state(1 + len(members)).tolist()
    orders = [
        grain.MapDataset.range(len(of_class)).shuffle(seed=class_seed).repeat()
        for of_class, class_seed in zip(members, seeds[1:], strict=True)
    ]
    classes = grain.MapDataset.range(len(members)).shuffle(seed=seeds[0]).repeat()
    return classes.map_with_index(functools.partial(_draw, members=members, orders=orders))


def _draw(
    position: int, number: int, members: list[Int64[np.ndarray, " n"]], orders: list[grain.MapDataset]
) -> Int64[np.ndarray, " 2"]:
    block = position // len(members)  # also the number of earlier draws from each class
    return np.array((block // len(members[number]), members[number][orders[number][block]]), np.int64)


class EvaluationBatches:
    """The batches of one pass over a source, in its order. Each `iter()` starts a new pass.

    All processes get the same number of batches. The last ones are padded, and `mask` is False in the padding: the
    masks of all processes sum to the number of examples. A damaged image keeps its place (its mask is True) with the
    image and label of its neighbour, and `damaged` marks it: leave it out, and report how many there are with every
    result.

    Args:
      data: `config.data`.
      source: the examples.
      batch_size: examples in a batch of this process.
      view: view of each image; by default its central `data.eval_crop` at `data.image_size`.
      process_index: index of this process.
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
        self._num_examples = len(source)
        self._batch_size, self._process_index, self._process_count = batch_size, process_index, process_count
        self._load, self._workers = _loader(data, source, None, view)

    def __len__(self) -> int:
        """Number of batches on every process."""
        return -(-self._num_examples // (self._batch_size * self._process_count))

    def __iter__(self) -> BatchIterator:
        """Starts a pass. Batches are like those of `train_batches` with mask bool [b]; padding has index -1."""
        total = len(self) * self._batch_size * self._process_count
        examples = grain.MapDataset.range(total).map(functools.partial(_or_padding, num_examples=self._num_examples))
        batches = examples.batch(self._batch_size)[self._process_index :: self._process_count]
        return BatchIterator(batches, self._load, self._workers)


def _or_padding(position: int, num_examples: int) -> Int64[np.ndarray, " 2"]:
    return np.array((0, position if position < num_examples else PADDING), np.int64)


class BatchIterator:
    """Loads batches ahead, in threads of this process or in worker processes.

    Args:
      batches: int64 [b, 2] of (epoch, index) for each batch.
      load: loads one of them.
      workers: number of worker processes; 0 loads in this process.
    """

    def __init__(self, batches: grain.MapDataset, load: BatchLoader | FeatureLoader, workers: int):
        loaded = batches.map(functools.partial(load, buffers=Buffers()))
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain passes its flags on to the workers
            dataset = loaded.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)).mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
                worker_init_fn=_start_worker,
            )
        else:
            dataset = loaded.to_iter_dataset(
                grain.ReadOptions(num_threads=_PREFETCHED_BATCHES, prefetch_buffer_size=_PREFETCHED_BATCHES)
            )
        self._iterator, self._workers = iter(dataset), workers

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
            fix = "check the disk that holds the dataset"
            if self._workers:
                fix = "see the message of the worker above; if memory ran out, set a smaller data.workers"
            what = f"loading data failed: {one_line(error)}"
            raise StorageError(what, "the data pipeline", fix) from error

    def close(self) -> None:
        """Stops threads and workers. Leaves behind those that do not stop within `_CLOSING_SECONDS`."""
        closing = threading.Thread(target=self._iterator.close, name="close", daemon=True)
        closing.start()
        closing.join(_CLOSING_SECONDS)


def _start_worker(worker: int, num_workers: int) -> None:
    """Makes a worker live exactly as long as its parent process."""
    # Ctrl-C and a scheduler's SIGTERM reach all processes at once, but the trainer needs batches to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class DamagedImages:
    """Counts the distinct damaged images of a run, and stops the run when there are too many.

    Args:
      info: the source's name, split and size.
      max_fraction: `config.data.max_bad_fraction`, relative to all examples of the source: a single damaged image in
        the first batch does not end a run on a large dataset.
      fix: what the user can do about too many; by default also that the fraction can be raised.
    """

    NAMED = 10

    def __init__(self, info: SourceInfo, max_fraction: float, fix: str = ""):
        self._info, self._max_fraction, self._fix = info, max_fraction, fix
        self.indices: dict[int, None] = {}  # in the order of their first appearance

    def add(self, batch: Batch) -> list[str]:
        """Adds the damaged images of a batch and returns lines about those that are new, of which `NAMED` are named.

        In training the next image replaces a damaged one. In an evaluation, whose batches have a mask, it is left out.

        Raises:
          BadDataError: more than `max_fraction` of the source is damaged.
        """
        before = len(self.indices)
        self.indices.update(dict.fromkeys(map(int, batch["index"][batch["damaged"]])))
        self.check(len(self.indices))
        of = f"of {printable(self._info.split)}"
        named = list(self.indices)[before : self.NAMED]
        done = "is left out" if "mask" in batch else "is replaced by the next image"
        lines = [f"image {index} {of} is damaged and {done}" for index in named]
        if before <= self.NAMED < len(self.indices):
            lines.append(f"further damaged images {of} are counted, and not named")
        return lines

    def check(self, count: int) -> None:
        """Raises BadDataError if `count` damaged images, here and on other hosts, are more than `max_fraction`."""
        if count > self._max_fraction * self._info.num_examples:
            first = ", ".join(map(str, list(self.indices)[: self.NAMED]))
            share = count / self._info.num_examples
            raise BadDataError(
                f"{count} of {self._info.num_examples:,} images are damaged, "
                f"more than config.data.max_bad_fraction={self._max_fraction:g}",
                f"dataset {self._info.name}, split {self._info.split}, examples {first or 'that other hosts read'}",
                self._fix
                or f"prepare the dataset again from an intact copy, or set max_bad_fraction above {share:.2g}",
            )
