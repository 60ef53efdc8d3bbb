"""A divergence that a stretch of the data causes: the run goes back once, passes over the stretch, and ends."""

from __future__ import annotations

import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import write_images
from tests.tiny_run import three_lines
from xception_jax.config import DataConfig
from xception_jax.data.pipeline import train_batches
from xception_jax.data.sources import TfdsSource
from xception_jax.errors import DivergedError
from xception_jax.logs.metrics_log import read_metrics

BATCH, EXAMPLES, BAD_STEPS = 8, 256, (13, 14)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def indices_of(path, steps) -> list[int]:
    """Returns the examples that these steps (from 1) train on."""
    data = DataConfig(image_size=32, augmentation="none", threads=1)
    batches = train_batches(data, TfdsSource(path, "train"), batch_size=BATCH, seed=0, start_step=min(steps) - 1)
    found = [int(index) for _ in steps for index in next(batches)["index"]]
    batches.close()
    return found


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Noise, but all black wherever steps 13 and 14 look: their batches have no variance to divide by."""
    directory = tmp_path_factory.mktemp("tfds")
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(EXAMPLES)]
    black = indices_of(write_images(directory, "noise", images), BAD_STEPS)
    for index in black:
        images[index] = png(np.zeros((32, 32, 3), np.uint8))
    write_images(directory, "noise_and_black", images)
    return directory


def arguments(data_dir, workdir, duration):
    return [
        "train.py",
        "--config=configs/fashion_mnist.py",
        f"--workdir={workdir}",
        f"--config.data.data_dir={data_dir}",
        "--config.data.name=noise_and_black",
        "--config.data.augmentation=none",
        "--config.data.train_split=train",
        "--config.data.eval_split=",
        "--config.data.test_split=",
        "--config.model.num_classes=5",
        "--config.model.width_multiplier=0.05",
        "--config.model.middle_blocks=0",
        "--config.model.batch_norm.epsilon=1e-30",  # so that the gradient of a constant batch overflows
        "--config.schedule.name=constant",
        "--config.schedule.warmup=0 steps",
        f"--config.batch_size={BATCH}",
        f"--config.duration={duration} steps",
        "--config.checkpoint.every=5 steps",
        "--config.log_every=4 steps",
        "--config.max_bad_steps=2",
    ]


def sha256(process) -> str:
    return re.search("state sha256: ([0-9a-f]{64})", process.stdout)[1]


def entries(workdir, split):
    return [
        {
            name: value
            for name, value in entry.items()
            if not re.match("seconds|images_per_second|input_share|time", name)
        }
        for entry in read_metrics(workdir / "metrics.jsonl")
        if entry["split"] == split
    ]


@pytest.fixture(scope="module")
def recovered(run_python, data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    process = run_python(*arguments(data_dir, workdir, 24))
    assert process.returncode == 0, process.stderr
    return workdir, process


@pytest.mark.slow
def test_the_stretch_is_passed_over(recovered):
    workdir, process = recovered
    assert "went back to the checkpoint of step 10" in process.stderr
    assert entries(workdir, "recovery") == [{"step": 14, "split": "recovery", "restored_step": 10}]
    last = entries(workdir, "train")[-1]
    assert last["step"] == 24
    assert last["skipped_steps"] == 4  # 11 to 14: the same batches would give the same state
    assert np.isfinite(last["loss"])


@pytest.mark.slow
@pytest.mark.parametrize(("every", "restored"), [(4, 8), (1, 11)])
def test_a_checkpoint_of_the_streak_is_not_restored(run_python, data_dir, tmp_path, every, restored):
    """Step 12 is the last good one: its checkpoint, and that of step 13, hold what the loss was not finite with."""
    options = [f"--config.checkpoint.every={every} steps", "--config.checkpoint.keep_latest=1"]
    process = run_python(*arguments(data_dir, tmp_path, 16), *options)
    assert process.returncode == 0, process.stderr
    assert entries(tmp_path, "recovery") == [{"step": 14, "split": "recovery", "restored_step": restored}]
    assert entries(tmp_path, "train")[-1]["skipped_steps"] == 14 - restored


@pytest.mark.slow
def test_without_a_checkpoint_before_the_streak_the_run_ends(run_python, data_dir, tmp_path):
    process = run_python(*arguments(data_dir, tmp_path, 24), "--config.checkpoint.every=12 steps")
    assert process.returncode == DivergedError.exit_code, process.stderr
    assert "no checkpoint of config.checkpoint.every before step 12" in three_lines(process)[0]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [12, 17])
def test_an_interrupted_run_recovers_in_the_same_way(recovered, run_python, data_dir, tmp_path, stop):
    """It stops before or after the divergence, with a checkpoint that the other run does not have."""
    first = run_python(*arguments(data_dir, tmp_path, stop))
    assert first.returncode == 0, first.stderr
    second = run_python(*arguments(data_dir, tmp_path, 24))
    assert second.returncode == 0, second.stderr
    assert sha256(second) == sha256(recovered[1])
    assert entries(tmp_path, "recovery") == entries(recovered[0], "recovery")
    # The last entry of the first run is of a run that ends there; all others cover the same steps.
    ours, theirs = ({entry["step"]: entry for entry in entries(path, "train")} for path in (tmp_path, recovered[0]))
    assert {step: ours[step] for step in theirs if step > stop + 4} == {s: theirs[s] for s in theirs if s > stop + 4}


@pytest.mark.slow
def test_a_second_divergence_ends_the_run_also_after_a_resume(recovered, run_python, data_dir):
    """The images come again in the second epoch of 32 steps, scattered; a rate that no network survives does it."""
    workdir, _ = recovered
    again = [*arguments(data_dir, workdir, 40), "--config.schedule.learning_rate=1e12", "--config.max_bad_steps=1"]
    process = run_python(*again)
    assert process.returncode == 70, process.stderr
    assert "also after a recovery" in three_lines(process)[0]


@pytest.mark.slow
def test_what_the_message_says_leads_out_of_a_divergence(run_python, data_dir, tmp_path):
    """Its first update destroys the parameters, and a checkpoint of them is saved before the run ends."""
    fields = ["--config.data.name=noise", "--config.checkpoint.every=2 steps", "--config.max_bad_steps=4"]
    command = [*arguments(data_dir, tmp_path, 8), *fields]
    process = run_python(*command, "--config.schedule.learning_rate=1e12")
    assert process.returncode == 70, process.stderr
    named = re.search("delete the checkpoints ([0-9, ]+) first", three_lines(process)[2])[1].split(", ")
    assert sorted(named) == sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    process = run_python(*command)
    assert process.returncode == 70, process.stderr  # a lower rate alone does not help
    for name in named:
        shutil.rmtree(tmp_path / "checkpoints" / name)
    process = run_python(*command)
    assert process.returncode == 0, process.stderr
