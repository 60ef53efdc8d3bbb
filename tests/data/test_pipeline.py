from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import assert_batches_equal, write_images
from tests.data.small_imagenet import encoded, jpeg, photograph
from xception_jax.config import DataConfig, MeshConfig, to_dict
from xception_jax.data import augmentation, images
from xception_jax.data.buffers import Buffers
from xception_jax.data.datasets import open_dataset
from xception_jax.data.pipeline import DamagedImages, EvaluationBatches, train_batches
from xception_jax.errors import BadDataError, StorageError
from xception_jax.parallel import batch_sharding, make_mesh, to_devices


def train(data: DataConfig, count: int, *, batch_size: int = 8, start_step: int = 0, seed: int = 3, **processes):
    batches = train_batches(
        data, open_dataset(data, "train"), batch_size=batch_size, seed=seed, start_step=start_step, **processes
    )
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def concatenate(parts: list[list[dict]]) -> list[dict]:
    """Returns the global batches of several processes, given in the order of their process_index."""
    return [
        {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for batches in zip(*parts, strict=True)
    ]


def test_a_batch_is_what_its_docstring_says(photographs_data):
    batch = train(photographs_data, 1)[0]
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "image": ("float32", (8, 48, 48, 3)),
        "label": ("int32", (8,)),
        "index": ("int64", (8,)),
        "damaged": ("bool", (8,)),
    }
    assert -1 <= batch["image"].min() < -0.5
    assert 0.5 < batch["image"].max() <= 1
    np.testing.assert_array_equal(batch["label"], batch["index"] % 5)
    assert not batch["damaged"].any()


def test_what_is_held_of_a_batch_stays_as_it_is(photographs_data):
    batches = train_batches(
        photographs_data, open_dataset(photographs_data, "train"), batch_size=8, seed=3, start_step=0
    )
    sharding = batch_sharding(make_mesh(MeshConfig()))
    views, on_devices = [], []
    for number in range(12):
        batch = next(batches)
        if number < 4:
            views.append(batch["image"][3:5, ::2])
            on_devices.append(to_devices({"image": batch["image"]}, sharding)["image"])
    batches.close()
    for view, devices, expected in zip(views, on_devices, train(photographs_data, 4), strict=True):
        np.testing.assert_array_equal(view, expected["image"][3:5, ::2])
        np.testing.assert_array_equal(devices, expected["image"])


def test_memory_is_used_again_once_nobody_refers_to_it():
    buffers = Buffers()
    array = buffers.array((4, 300, 300))
    view, address = array[1:, ::2], array.ctypes.data
    del array
    others = [buffers.array((4, 300, 300)) for _ in range(3)]
    assert not any(np.shares_memory(view, other) for other in others)
    del view
    others.append(np.empty((4, 300, 300), np.float32))  # would get memory that was returned to the allocator
    assert buffers.array((4, 300, 200)).ctypes.data != address
    assert buffers.array((4, 300, 300)).ctypes.data == address


def test_several_labels_become_zeros_and_ones(data):
    data = data.replace(name="fashion_mnist_scenes", image_size=64)
    source = open_dataset(data, "train")
    batch = train(data, 1)[0]
    assert batch["label"].shape == (8, 10)
    assert batch["label"].dtype == np.float32
    for index, label in zip(batch["index"], batch["label"], strict=True):
        assert tuple(np.nonzero(label)[0]) == source[int(index)]["label"]


@pytest.mark.parametrize("augmentation", ["inception", "shift", "none"])
@pytest.mark.parametrize("process_count", [2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_processes(photographs_data, augmentation, process_count):
    photographs_data = photographs_data.replace(augmentation=augmentation)
    alone = train(photographs_data, 7)
    parts = [
        train(photographs_data, 7, batch_size=8 // process_count, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    assert_batches_equal(concatenate(parts), alone)


@pytest.mark.parametrize("threads", [1, 7])
def test_batches_do_not_depend_on_threads(photographs_data, threads):
    expected = train(photographs_data, 7)
    photographs_data = photographs_data.replace(threads=threads)
    assert_batches_equal(train(photographs_data, 7), expected)


def test_batches_do_not_depend_on_workers(photographs_data):
    expected = train(photographs_data, 7)
    photographs_data = photographs_data.replace(workers=2)
    assert_batches_equal(train(photographs_data, 7), expected)


class Counted:
    """A source that records which examples were read."""

    def __init__(self, source):
        self._source, self.info, self.read = source, source.info, []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        self.read += indices
        return self._source.__getitems__(indices)


def test_a_cache_changes_no_batch_and_saves_reading_again(damaged_data):
    expected = train(damaged_data, 9)
    evaluated = list(EvaluationBatches(damaged_data, open_dataset(damaged_data, "train"), batch_size=5))
    damaged_data = damaged_data.replace(cache=True)
    whole = (1, 5, 6, 7, 8, 9, 10)  # 0 and 4 are also read as replacements of damaged neighbours

    source = Counted(open_dataset(damaged_data, "train"))
    with contextlib.closing(train_batches(damaged_data, source, batch_size=8, seed=3, start_step=0)) as batches:
        assert_batches_equal([next(batches) for _ in range(9)], expected)
    # Two batches of different epochs may be loading at the same time.
    assert all(source.read.count(index) <= 2 for index in whole)

    source = Counted(open_dataset(damaged_data, "train"))
    passes = EvaluationBatches(damaged_data, source, batch_size=5)
    for _ in range(2):
        assert_batches_equal(list(passes), evaluated)
    assert [source.read.count(index) for index in whole] == [1] * len(whole)


@pytest.mark.parametrize("step", [1, 2, 5, 30])
def test_a_run_resumes_from_its_step_alone(photographs_data, step):
    expected = train(photographs_data, step + 3)[step:]
    assert_batches_equal(train(photographs_data, 3, start_step=step), expected)
    halves = [
        train(photographs_data, 3, start_step=step, batch_size=4, process_index=index, process_count=2)
        for index in range(2)
    ]
    assert_batches_equal(concatenate(halves), expected)


def test_every_epoch_has_each_example_once_in_an_order_of_its_own(photographs_data):
    indices = np.concatenate([batch["index"] for batch in train(photographs_data, 23)]).reshape(8, 23)
    for epoch in indices:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(23))
    assert len({tuple(epoch) for epoch in indices}) == 8


def test_a_batch_may_have_more_examples_than_the_dataset(photographs_data):
    indices = np.concatenate([batch["index"] for batch in train(photographs_data, 2, batch_size=50)])
    for epoch in indices[:92].reshape(4, 23):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(23))
    expected = train(photographs_data, 4, batch_size=25)
    assert_batches_equal(train(photographs_data, 2, batch_size=50), concatenate([expected[::2], expected[1::2]]))


@pytest.fixture(scope="module")
def unequal_data(tfds_dir) -> DataConfig:
    """Returns a `config.data` for classes of 17, 4 and 2 images, of which every class is drawn equally often."""
    labels = [0] * 17 + [2] * 4 + [3] * 2
    write_images(tfds_dir, "unequal", [jpeg(photograph(number, 32)) for number in range(23)], labels)
    return DataConfig(
        name="unequal", data_dir=str(tfds_dir), image_size=16, sampling="balanced", augmentation="shift", threads=2
    )


def test_balanced_sampling_draws_every_class_equally_often(unequal_data):
    batches = train(unequal_data, 17, batch_size=6, seed=5)
    blocks = np.concatenate([batch["label"] for batch in batches]).reshape(-1, 3)
    np.testing.assert_array_equal(np.sort(blocks), [[0, 2, 3]] * 34)
    assert len({tuple(block) for block in blocks}) == 6  # in all orders
    index = np.concatenate([batch["index"] for batch in batches])
    counts = np.bincount(index, minlength=23)
    assert (set(counts[:17]), set(counts[17:21]), set(counts[21:])) == ({2}, {8, 9}, {17})
    first_pass = [int(i) for i in index if i < 17][:17]
    assert sorted(first_pass) == list(range(17)) != first_pass
    # Draws of one example in a row have views of their own.
    images = np.concatenate([batch["image"] for batch in batches])[index == 22]
    assert len({image.tobytes() for image in images}) > 8


def test_balanced_batches_resume_and_are_the_same_for_two_processes(unequal_data):
    expected = train(unequal_data, 12)
    assert_batches_equal(train(unequal_data, 5, start_step=7), expected[7:])
    halves = [
        train(unequal_data, 5, start_step=7, batch_size=4, process_index=index, process_count=2) for index in range(2)
    ]
    assert_batches_equal(concatenate(halves), expected[7:])
    assert_batches_equal(train(unequal_data.replace(workers=1), 2), expected[:2])
    assert any((a["index"] != b["index"]).any() for a, b in zip(train(unequal_data, 2, seed=4), expected, strict=False))


def test_seeds_that_follow_each_other_share_no_order(photographs_data):
    epochs = {
        tuple(epoch)
        for seed in range(4)
        for epoch in np.concatenate([batch["index"] for batch in train(photographs_data, 23, seed=seed)]).reshape(8, 23)
    }
    assert len(epochs) == 32


def test_an_augmentation_is_a_function_of_seed_epoch_and_index(photographs_data):
    source = open_dataset(photographs_data, "train")
    position = 0
    for batch in train(photographs_data, 6, seed=11):
        for image, index in zip(batch["image"], batch["index"], strict=True):
            rng = np.random.default_rng((11, position // len(source), int(index)))
            view = augmentation.inception_view(images.decode(source[int(index)]["image"]), 48, (0.05, 1.0), rng)
            expected = np.empty((48, 48, 3), np.float32)
            augmentation.to_float_with_distorted_color(view, expected, rng)
            np.testing.assert_array_equal(image, expected)
            position += 1


def test_without_augmentation_training_sees_what_evaluation_sees(photographs_data):
    photographs_data = photographs_data.replace(augmentation="none")
    evaluated = {}
    for batch in EvaluationBatches(photographs_data, open_dataset(photographs_data, "train"), batch_size=23):
        evaluated |= dict(zip(batch["index"].tolist(), batch["image"], strict=True))
    for batch in train(photographs_data, 3):
        for image, index in zip(batch["image"], batch["index"], strict=True):
            np.testing.assert_array_equal(image, evaluated[int(index)])


def test_color_distortion_can_be_turned_off(photographs_data):
    distorted = train(photographs_data, 1)[0]
    photographs_data = photographs_data.replace(color_distortion=False)
    plain = train(photographs_data, 1)[0]
    assert not np.array_equal(distorted["image"], plain["image"])
    np.testing.assert_array_equal(distorted["index"], plain["index"])


@pytest.mark.parametrize("batch_size", [1, 5, 8, 23, 24, 50])
@pytest.mark.parametrize("process_count", [1, 2, 3])
def test_an_evaluation_counts_every_example_once(photographs_data, batch_size, process_count):
    source = open_dataset(photographs_data, "train")
    parts = []
    for process_index in range(process_count):
        batches = EvaluationBatches(
            photographs_data, source, batch_size=batch_size, process_index=process_index, process_count=process_count
        )
        parts.append(list(batches))
        assert len(parts[-1]) == len(batches)
        assert all(batch["image"].shape == (batch_size, 48, 48, 3) for batch in parts[-1])
    assert len({len(part) for part in parts}) == 1
    everything = concatenate(parts)
    mask = np.concatenate([batch["mask"] for batch in everything])
    index = np.concatenate([batch["index"] for batch in everything])
    label = np.concatenate([batch["label"] for batch in everything])
    assert mask.sum() == len(source)
    np.testing.assert_array_equal(index[mask], np.arange(23))
    np.testing.assert_array_equal(label[mask], np.arange(23) % 5)
    assert (index[~mask] == -1).all()
    assert not np.concatenate([batch["image"] for batch in everything])[~mask].any()


def test_an_evaluation_can_be_repeated(photographs_data):
    batches = EvaluationBatches(photographs_data, open_dataset(photographs_data, "train"), batch_size=10)
    assert_batches_equal(list(batches), list(batches))


def test_an_evaluation_shows_the_central_view(photographs_data):
    source = open_dataset(photographs_data, "train")
    batch = next(iter(EvaluationBatches(photographs_data, source, batch_size=2)))
    expected = np.empty((48, 48, 3), np.float32)
    images.to_float(images.central_view(images.decode(source[1]["image"]), 48, 0.875), expected)
    np.testing.assert_array_equal(batch["image"][1], expected)


@pytest.fixture
def damaged_data(photographs_data, tmp_path):
    """Returns a `config.data` for 12 images, of which 2, 3 and 11 are damaged."""
    files = [jpeg(photograph(number)) for number in range(12)]
    files[2], files[3], files[11] = b"", files[3][:500], encoded(photograph(11), "GIF")
    write_images(tmp_path, "damaged", files)
    photographs_data = photographs_data.replace(name="damaged", data_dir=str(tmp_path))
    return photographs_data


def test_a_damaged_image_is_replaced_by_the_next_whole_one(damaged_data):
    batch = next(iter(EvaluationBatches(damaged_data, open_dataset(damaged_data, "train"), batch_size=12)))
    assert np.nonzero(batch["damaged"])[0].tolist() == [2, 3, 11]
    assert batch["mask"].all()
    np.testing.assert_array_equal(batch["index"], np.arange(12))
    for damaged, neighbour in ((2, 4), (3, 4), (11, 0)):
        np.testing.assert_array_equal(batch["image"][damaged], batch["image"][neighbour])
        assert batch["label"][damaged] == batch["label"][neighbour]


def test_damaged_images_are_the_same_for_any_number_of_processes(damaged_data):
    alone = train(damaged_data, 5)
    assert sum(batch["damaged"].sum() for batch in alone) >= 9
    parts = [train(damaged_data, 5, batch_size=4, process_index=index, process_count=2) for index in range(2)]
    assert_batches_equal(concatenate(parts), alone)


def test_a_source_of_damaged_images_only_ends(photographs_data, tmp_path):
    write_images(tmp_path, "nothing", [b"nothing"] * 4)
    photographs_data = photographs_data.replace(name="nothing", data_dir=str(tmp_path))
    with pytest.raises(BadDataError, match="4 images in a row"):
        train(photographs_data, 1)


def test_too_many_damaged_images_stop_a_run_and_are_named(damaged_data):
    info = open_dataset(damaged_data, "train").info
    counter = DamagedImages(info, max_fraction=0.25)
    for batch in train(damaged_data, 5):
        counter.add(batch)
    assert sorted(counter.indices) == [2, 3, 11]

    strict = DamagedImages(info, max_fraction=0.2)
    batches = train(damaged_data, 5)
    with pytest.raises(BadDataError, match="3 of 12 images are damaged") as error:
        [strict.add(batch) for batch in batches]
    assert "examples " + ", ".join(map(str, strict.indices)) in error.value.where
    assert len(str(error.value).splitlines()) == 3


def test_a_damaged_image_that_comes_again_is_counted_once(damaged_data):
    counter = DamagedImages(open_dataset(damaged_data, "train").info, max_fraction=1.0)
    batch = next(iter(EvaluationBatches(damaged_data, open_dataset(damaged_data, "train"), batch_size=12)))
    assert counter.add(batch) == [f"image {n} of train is damaged and is left out" for n in (2, 3, 11)]
    assert counter.add(batch) == []


def test_ten_of_many_damaged_images_are_named(damaged_data):
    counter = DamagedImages(open_dataset(damaged_data, "train").info, max_fraction=2.0)
    lines = counter.add({"index": np.arange(12), "damaged": np.ones(12, bool)})
    assert len(lines) == 11
    assert lines[9] == "image 9 of train is damaged and is replaced by the next image"
    assert lines[10] == "further damaged images of train are counted, and not named"
    assert counter.add({"index": np.array([12]), "damaged": np.ones(1, bool)}) == []


def test_a_label_out_of_range_stops_a_run(photographs_data, tmp_path):
    from tests.data.test_sources import change_features

    path = write_images(tmp_path, "labels", [jpeg(photograph(number)) for number in range(8)])
    change_features(path, numClasses="4")
    photographs_data = photographs_data.replace(name="labels", data_dir=str(tmp_path))
    with pytest.raises(BadDataError, match="label 4"):
        train(photographs_data, 1)


def test_only_kill_9_ends_a_worker_and_it_is_a_storage_error_never_a_hang(photographs_data):
    photographs_data = photographs_data.replace(workers=1)
    batches = train_batches(
        photographs_data, open_dataset(photographs_data, "train"), batch_size=2, seed=0, start_step=0
    )
    next(batches)
    (worker,) = multiprocessing.active_children()
    for polite in (signal.SIGINT, signal.SIGTERM):  # what Ctrl-C and a scheduler send to every process
        os.kill(worker.pid, polite)
    for _ in range(10):
        next(batches)
    os.kill(worker.pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(StorageError, match="terminated"):
        list(batches)
    assert time.monotonic() - started < 30
    batches.close()


def test_workers_end_when_the_trainer_is_killed(photographs_data):
    code = (
        "import multiprocessing, sys, time\n"
        "from xception_jax.config import DataConfig\n"
        "from xception_jax.data import pipeline; from xception_jax.data.datasets import open_dataset\n"
        "data = DataConfig(**eval(sys.argv[1]))\n"
        "source = open_dataset(data, 'train')\n"
        "batches = pipeline.train_batches(data, source, batch_size=2, seed=0, start_step=0); next(batches)\n"
        "print(multiprocessing.active_children()[0].pid, flush=True); time.sleep(60)"
    )
    photographs_data = photographs_data.replace(workers=1)
    trainer = subprocess.Popen(
        [sys.executable, "-c", code, repr(to_dict(photographs_data))], stdout=subprocess.PIPE, text=True
    )
    worker = int(trainer.stdout.readline())
    trainer.kill()
    trainer.communicate()
    deadline = time.monotonic() + 10
    while _is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(worker)


def _is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_closing_stops_the_threads(photographs_data):
    before = threading.active_count()
    train(photographs_data, 2)
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_an_error_of_a_worker_process_arrives_as_itself(data, tfds_dir):
    """Grain pickles the error; the exit code must survive."""
    write_images(tfds_dir, "all_damaged", [b"not an image"] * 4)
    data = data.replace(name="all_damaged", data_dir=str(tfds_dir), workers=1)
    source = open_dataset(data, "train")
    with contextlib.closing(train_batches(data, source, batch_size=2, seed=0, start_step=0)) as batches:
        with pytest.raises(BadDataError, match="4 images in a row cannot be decoded"):
            next(batches)
